"""Small versions of benchmarks/kill_shard.py, bitflips.py and media_fuzz.py; the large counts are `slow`."""

from __future__ import annotations

import importlib.util
import random
import sys
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"benchmarks_{name}", BENCHMARKS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its processes look functions up there
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("kills", [6, pytest.param(200, marks=pytest.mark.slow)])
def test_kills_of_the_shard_writer_leave_no_half_file_and_change_no_byte(kills):
    module = script("kill_shard")
    module.rounds(module.forked, ["--workers", "1"], kills, random.Random(0))


@pytest.mark.slow
def test_workers_do_not_outlive_a_killed_main_process():
    module = script("kill_shard")
    module.rounds(module.spawned, ["--workers", "2"], 4, random.Random(0))


@pytest.mark.parametrize("flips", [24, pytest.param(1000, marks=pytest.mark.slow)])
def test_every_flipped_bit_is_noticed(flips):
    counts = script("bitflips").run(flips, seed=1)
    assert (counts["undetected"], counts["wrong bytes"]) == (0, 0)


@pytest.mark.parametrize("files", [100, pytest.param(10_000, marks=pytest.mark.slow)])
def test_mutated_media_are_read_or_refused(files):
    module = script("media_fuzz")
    media = module.seeds()
    draw = random.Random(2)
    if files == 100:  # in this process, which is quicker to start; crashes and hangs are for the large count
        for number in range(files):
            item = media[number % len(media)]
            mutated = module.Media(item.kind, module.mutate(item.data, draw), item.name)
            try:
                module.use(mutated)
            except module.MediaError as error:
                assert item.name in str(error) and "\n" not in str(error)
        return
    counts, longest, most = module.run(files, seed=2)
    assert counts["wrong"] == 0, (longest, most)
