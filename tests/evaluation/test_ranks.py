"""Ranks share an evaluation, and a killed one goes on: nothing is lost and nothing counted twice."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mm.evaluation.journal import Journal, request_key
from mm.evaluation.records import Response
from mm.evaluation.runner import evaluate

from .toys import ColorBenchmark, Seer

ROOT = Path(__file__).parents[2]


def start(out: Path, rank: int, world: int, dies_after: int = 0) -> subprocess.Popen:
    (out / "model").mkdir(parents=True, exist_ok=True)
    (out / "model" / "manifest.json").write_text("{}")
    command = [
        sys.executable,
        "-m",
        "tests.evaluation.rank_worker",
        str(rank),
        str(world),
        str(out / "meeting"),
        str(out),
    ]
    return subprocess.Popen([*command, str(dies_after)], cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"})


def run(out: Path, world: int) -> list[dict]:
    (out / "meeting").unlink(missing_ok=True)
    ranks = [start(out, rank, world) for rank in range(world)]
    try:
        assert [rank.wait(300) for rank in ranks] == [0] * world
    finally:
        for rank in ranks:
            rank.kill()
    return [json.loads((out / f"rank{rank}.json").read_text()) for rank in range(world)]


def predictions(out: Path) -> str:
    return (out / "colors.predictions.jsonl").read_text()


def test_two_ranks_do_what_one_does(tmp_path):
    first, second = run(tmp_path / "two", 2)
    alone = evaluate(
        None,
        ColorBenchmark(n=40, distinct=True),
        output=tmp_path / "one",
        model_path=tmp_path,
        respond=Seer(),
        show_progress=False,
    )
    assert first["scores"] == second["scores"] == alone["scores"]
    assert first["controls"] == second["controls"] == alone["controls"]
    assert predictions(tmp_path / "two") == predictions(tmp_path / "one")
    asked = first["asked"] + second["asked"]
    assert abs(len(first["asked"]) - len(second["asked"])) <= 3, "each rank has its share of every control"
    everything = ["plain", *(f"q{i}" for i in range(40)), *(f"q{i}" for i in range(40)), *(f"q{i}" for i in range(40))]
    assert sorted(asked) == sorted(everything), "every question once, and once for each control"
    assert not list((tmp_path / "two").glob("*.journal")), "a finished run leaves no journal"


@pytest.mark.slow
def test_a_killed_rank_and_then_another_number_of_them(tmp_path):
    out = tmp_path / "out"
    ranks = [start(out, 0, 2), start(out, 1, 2, dies_after=8)]
    try:
        assert ranks[1].wait(300) == -9
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    known = Journal(out / "colors.journal", {}).folder.glob("*.jsonl")
    before = sum(line.startswith('{"key"') for file in known for line in file.read_text().splitlines())
    assert before >= 8
    [resumed] = run(out, 1)
    assert len(resumed["asked"]) == 121 - before
    [whole] = run(tmp_path / "whole", 1)
    assert predictions(out) == predictions(tmp_path / "whole")
    assert resumed["scores"] == whole["scores"]


class Stops(Seer):
    """Breaks after so many requests."""

    def __init__(self, after: int) -> None:
        super().__init__()
        self.after = after

    def __call__(self, model, benchmark, samples, batch_size):
        if len(self.asked) >= self.after:
            raise KeyboardInterrupt
        return super().__call__(model, benchmark, samples, batch_size)


def attempt(out: Path, seer: Seer, benchmark: ColorBenchmark | None = None, **options):
    (model := out.parent / "model").mkdir(exist_ok=True)
    (model / "manifest.json").write_text("{}")
    options = {"output": out, "model_path": model, "batch_size": 1, "show_progress": False, **options}
    return evaluate(None, benchmark or ColorBenchmark(n=12, distinct=True), respond=seer, **options)


def test_an_interrupted_run_goes_on(tmp_path):
    whole = Seer()
    expected = attempt(tmp_path / "whole", whole)
    asked = []
    for after in (4, 4, 4):
        seer = Stops(after)
        with pytest.raises(KeyboardInterrupt):
            attempt(tmp_path / "cut", seer)
        asked += seer.asked
    last = Seer()
    result = attempt(tmp_path / "cut", last)
    assert [s.key for s in asked + last.asked] == [s.key for s in whole.asked], (
        "nothing is asked twice, nothing left out"
    )
    assert result["scores"] == expected["scores"] and result["controls"] == expected["controls"]
    assert predictions(tmp_path / "cut") == predictions(tmp_path / "whole")


def test_a_journal_of_something_else_is_not_used(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        attempt(tmp_path / "out", Stops(4))
    longer = ColorBenchmark(n=12, distinct=True)
    longer.max_new_tokens = 9
    seer = Seer()
    attempt(tmp_path / "out", seer, longer)
    assert len(seer.asked) == 37, "other decoding: everything is asked again"


def test_journal_survives_a_torn_line(tmp_path):
    journal = Journal(tmp_path / "j", {"model": 1})
    journal.add({"a": Response("é\n", (-1.5, -2.0), (1, 2), 0.5), "b": Response("x")})
    journal.close()
    data = journal.path.read_bytes()
    journal.path.write_bytes(data[:-5])
    assert Journal(tmp_path / "j", {"model": 1}).read() == {"a": Response("é\n", (-1.5, -2.0), (1, 2), 0.5)}
    again = Journal(tmp_path / "j", {"model": 1}, rank=0)
    again.add({"b": Response("x")})
    again.close()
    assert set(Journal(tmp_path / "j", {"model": 1}).read()) == {"a", "b"}
    assert Journal(tmp_path / "j", {"model": 2}).read() == {}


def test_request_keys_see_everything_the_model_sees():
    samples = ColorBenchmark(n=5).samples()
    keys = [request_key(sample) for sample in samples]
    assert keys[0] == keys[4] and len(set(keys)) == 5
    samples[0].meta["choices"] = ["red"]
    assert request_key(samples[0]) != keys[0]
