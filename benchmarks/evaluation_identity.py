"""One evaluation in many ways: one rank and two, batch 1 and 16, killed and resumed. All must say the same.

    python benchmarks/evaluation_identity.py MODEL [--benchmark easy_vqa] [--questions 200] [--kills 5]

Each way is an `mm validate` of its own, on CPU in float32. Compared are the prediction and the score of every
sample, and the aggregate scores and controls. Exit status 0 if all agree.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

MM = [sys.executable, "-m", "mm.cli"]


def command(options: argparse.Namespace, out: Path, batch: int, ranks: int) -> list[str]:
    settings = {
        "model.model": options.model,
        "model.limit": options.questions,
        "model.batch_size": batch,
        "model.output": out,
        "model.show_progress": "false",
        "trainer.accelerator": "cpu",
        "trainer.precision": "32-true",
        "trainer.devices": ranks,
        "trainer.strategy": "ddp" if ranks > 1 else "auto",
    }
    line = [*MM, "validate", "--benchmarks", options.benchmark]
    return [*line, *(part for name, value in settings.items() for part in (f"--{name}", str(value)))]


def start(line: list[str], log: Path) -> subprocess.Popen[bytes]:
    """In a process group of its own, so that a kill takes all ranks."""
    with log.open("ab") as file:
        return subprocess.Popen(line, stdout=file, stderr=file, start_new_session=True)


def whole(line: list[str], out: Path) -> None:
    status = start(line, out.with_suffix(".log")).wait()
    if status:
        raise SystemExit(f"{' '.join(line)}\nfailed with status {status}: see {out.with_suffix('.log')}")


def killed(line: list[str], out: Path, benchmark: str, kills: int, rng: random.Random) -> int:
    """Kills the run again and again, each time after some more answers are on disk; returns how often it could."""
    done = 0
    for _ in range(kills):
        process = start(line, out.with_suffix(".log"))
        before, wanted = answers(out, benchmark), rng.randint(1, 3)
        while process.poll() is None and answers(out, benchmark) < before + wanted:
            time.sleep(0.02)
        if process.poll() is not None:
            return done  # it was faster
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        done += 1
    whole(line, out)
    return done


def answers(out: Path, benchmark: str) -> int:
    """Writes of the journal so far (its lines may still be under way)."""
    return sum(file.stat().st_size // 400 for file in out.glob(f"{benchmark}.journal/*.jsonl"))


def said(out: Path, benchmark: str) -> dict[str, Any]:
    result = json.loads((out / f"{benchmark}.json").read_text())
    lines = [json.loads(line) for line in (out / f"{benchmark}.predictions.jsonl").read_text().splitlines()]
    return {
        "predictions": {line["id"]: (line["prediction"], line["score"]) for line in lines},
        "scores": result["scores"],
        "controls": result["controls"],
        "n": result["n"],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model", type=Path, nargs="?", default=Path("runs/demo/model"), help="a model directory")
    parser.add_argument("--benchmark", default="easy_vqa")
    parser.add_argument("--questions", type=int, default=200)
    parser.add_argument("--kills", type=int, default=5)
    options = parser.parse_args()
    rng = random.Random(0)
    with tempfile.TemporaryDirectory() as folder:
        ways = {
            "1 rank, batch 16": lambda out: whole(command(options, out, 16, 1), out),
            "1 rank, batch 1": lambda out: whole(command(options, out, 1, 1), out),
            "2 gloo ranks, batch 16": lambda out: whole(command(options, out, 16, 2), out),
            "1 rank, killed": lambda out: killed(
                command(options, out, 1, 1), out, options.benchmark, options.kills, rng
            ),
            "2 ranks, killed": lambda out: killed(
                command(options, out, 1, 2), out, options.benchmark, options.kills, rng
            ),
        }
        found: dict[str, dict[str, Any]] = {}
        for number, (name, run) in enumerate(ways.items()):
            out = Path(folder) / str(number)
            started, kills = time.perf_counter(), run(out)
            found[name] = said(out, options.benchmark)
            same = found[name] == next(iter(found.values()))
            note = f", {kills} kills" if kills is not None else ""
            print(
                f"{name}{note}: {'identical' if same else 'DIFFERENT'} ({time.perf_counter() - started:.0f} s)",
                flush=True,
            )
    first = next(iter(found.values()))
    print(f"{options.benchmark}, {first['n']} questions: {first['scores']}")
    return 0 if all(other == first for other in found.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
