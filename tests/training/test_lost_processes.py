"""Two ranks that are not alike end together; a killed worker or rank ends the run soon, and is named."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mm.training.cli import _lost_process
from mm.training.testing import make_run


def start(config: Path, *options: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "mm.cli", "fit", "--config", str(config), *options],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip


def logged(folder: Path) -> list[dict[str, object]]:
    path = folder / "log" / "samples.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def wait_for(condition: Callable[[], bool], seconds: float = 180) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it did not happen"
        time.sleep(0.05)


def children(pid: int) -> list[int]:
    return [int(text) for text in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


RANKS = ("--trainer.devices", "2", "--trainer.strategy", "ddp")


@pytest.mark.slow
def test_one_two_and_one_rank_read_the_same_stream(tmp_path: Path) -> None:
    """Sets of 7 and of 50 samples a shard, and batches in which a rank has text alone."""
    config = make_run(tmp_path / "one", samples=24, steps=9, save_every=3)
    assert start(config).wait() == 0
    alone = {line["step"]: line["keys"] for line in logged(tmp_path / "one")}
    config = make_run(tmp_path / "both", samples=24, steps=9, save_every=3)
    for steps, ranks in ((3, ()), (6, RANKS), (9, ())):
        resume = ("--ckpt_path", "last") if steps > 3 else ()
        until = ("--trainer.max_steps", str(steps), "--allow-change", "trainer.max_steps")
        process = start(config, *ranks, *until, *resume)
        output = process.communicate()[0]
        assert process.returncode == 0, output
    lines = sorted(logged(tmp_path / "both"), key=lambda line: (line["step"], line["rank"]))
    assert [(line["step"], line["rank"]) for line in lines if 3 < int(str(line["step"])) <= 6] == [
        (step, rank) for step in (4, 5, 6) for rank in (0, 1)
    ]
    together: dict[object, list[str]] = {}
    for line in lines:
        together.setdefault(line["step"], []).extend(line["keys"])  # type: ignore[arg-type]
    assert together == alone


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["worker", "rank 1", "rank 0"])
def test_a_killed_process_is_named_within_half_a_minute(tmp_path: Path, victim: str) -> None:
    config = make_run(tmp_path, samples=24, steps=100_000, save_every=1000)
    process = start(config, *(("--data.workers", "1") if victim == "worker" else RANKS))
    wait_for(lambda: len(logged(tmp_path)) > 4)
    offspring = children(process.pid)
    assert len(offspring) == 1
    os.kill(process.pid if victim == "rank 0" else offspring[0], signal.SIGKILL)
    killed = time.monotonic()
    output = process.communicate(timeout=60)[0]  # of all processes that write to it
    assert time.monotonic() - killed < 30
    assert process.returncode != 0
    if victim == "worker":
        assert f"mm fit: error: a loader worker has died (process {offspring[0]}" in output
    elif victim == "rank 1":
        assert f"[rank: 1] Child process with PID {offspring[0]} terminated with code -9" in output or (
            "rank 0 has lost another rank" in output
        )
    else:
        assert "rank 1 has lost another rank" in output


def test_messages_of_torch_are_understood() -> None:
    for message in (
        "DataLoader worker (pid 123) is killed by signal: Killed. ",
        "DataLoader worker (pid(s) 123, 124) exited unexpectedly",
    ):
        assert "(process 123" in str(_lost_process(message))
    assert "lost another rank" in str(_lost_process("[gloo/pair.cc:534] Connection closed by peer [127.0.0.1]:39129"))
    assert _lost_process("mat1 and mat2 shapes cannot be multiplied") is None
