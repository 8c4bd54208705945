"""Kills training with SIGKILL at random moments and resumes it: keys, losses and weights must be the unbroken run's.

    python benchmarks/kill_train.py --runs 50

Each run is killed once or twice, goes on with 0, 1 or 2 loader workers, and ends with `samples.jsonl` and a last
checkpoint that are compared bit by bit. Runs are forked from one process that has parsed the config once; `--real`
starts `mm fit` anew each time instead, which takes longer. Exits with 1 if any run differs.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

from mm.training.cli import MultimodalCLI
from mm.training.testing import make_run, weights_of

Start = Callable[[int, bool], int]  # loader workers, whether to resume -> process id


class Parsed(MultimodalCLI):
    """Everything that `mm fit` makes of its config, not started yet."""

    def _run_subcommand(self, subcommand: str) -> None:
        pass


def forking(config: Path) -> Start:
    """Starts a run in a forked process."""
    parsed = Parsed(["fit", "--config", str(config)])

    def start(workers: int, resume: bool) -> int:
        sys.stdout.flush()
        pid = os.fork()
        if pid:
            return pid
        status = 1
        try:
            with open(config.parent / "output.txt", "w") as output:
                os.dup2(output.fileno(), 1)
                os.dup2(output.fileno(), 2)
            parsed.datamodule.workers = workers
            parsed.trainer.fit(parsed.model, parsed.datamodule, ckpt_path="last" if resume else None)
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)

    return start


def real(config: Path) -> Start:
    """Starts `mm fit`."""

    def start(workers: int, resume: bool) -> int:
        command = [sys.executable, "-m", "mm.cli", "fit", "--config", str(config), f"--data.workers={workers}"]
        command += ["--ckpt_path", "last"] if resume else []
        with open(config.parent / "output.txt", "w") as output:
            return subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT).pid

    return start


def run(folder: Path, start: Start, kills: list[tuple[int, float]], workers: list[int]) -> int:
    """A run that is killed at each of `kills` (after so many logged steps, and so many seconds more); returns how many
    of them hit a running process. Raises RuntimeError where the last part fails."""
    for name in ("log", "checkpoints"):
        shutil.rmtree(folder / name, ignore_errors=True)
    hits = 0
    for (after, delay), count in zip(kills, workers, strict=False):
        pid = start(count, (folder / "checkpoints" / "last.ckpt").exists())
        while os.waitpid(pid, os.WNOHANG)[0] == 0:
            if steps(folder) >= after:
                time.sleep(delay)
                os.kill(pid, signal.SIGKILL)
                hits += os.waitpid(pid, 0)[1] == signal.SIGKILL
                break
            time.sleep(0.002)
    pid = start(workers[-1], (folder / "checkpoints" / "last.ckpt").exists())
    if os.waitpid(pid, 0)[1] != 0:
        raise RuntimeError(f"the resumed run failed: {(folder / 'output.txt').read_text()}")
    return hits


def steps(folder: Path) -> int:
    path = folder / "log" / "samples.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def outcome(folder: Path) -> tuple[bytes, dict[str, torch.Tensor]]:
    """The log of samples and losses, and the last weights."""
    return (folder / "log" / "samples.jsonl").read_bytes(), weights_of(folder / "checkpoints" / "last.ckpt")


def same(one: tuple[bytes, dict[str, torch.Tensor]], other: tuple[bytes, dict[str, torch.Tensor]]) -> bool:
    """Bit for bit."""
    weights = zip(one[1].items(), other[1].items(), strict=True)
    return one[0] == other[0] and all(a == b and torch.equal(x, y) for (a, x), (b, y) in weights)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--real", action="store_true", help="a new `mm fit` each time")
    arguments = parser.parse_args()
    generator = random.Random(arguments.seed)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = make_run(folder, steps=arguments.steps)
        start = real(config) if arguments.real else forking(config)
        run(folder, start, [], [0])
        unbroken, wrong, hits = outcome(folder), 0, 0
        for number in range(arguments.runs):
            points = sorted(generator.randrange(arguments.steps) for _ in range(1 + (number % 3 == 0)))
            kills = [(point, generator.random() * 0.1) for point in points]
            workers = [generator.choice((0, 1, 2)) for _ in range(len(kills) + 1)]
            hits += run(folder, start, kills, workers)
            equal = same(unbroken, outcome(folder))
            wrong += not equal
            print(f"run {number}: {'equal' if equal else 'DIFFERS'}: killed at {kills}, workers {workers}", flush=True)
        print(f"{arguments.runs} runs of {arguments.steps} steps, {hits} kills: {wrong} differ from the unbroken run")
    return min(wrong, 1)


if __name__ == "__main__":
    sys.exit(main())
