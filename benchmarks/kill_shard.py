"""SIGKILLs of `mm shard` at random moments: no half file under a final name, and the same bytes in the end.

    python benchmarks/kill_shard.py [--kills 200] [--group-kills 20] [--seed 0]

Each run is killed after a random share of the time that a whole one takes, and started again into the same folder until
it ends by itself; then its folder is compared with that of a run that nobody killed. `--kills` are of a process that
works alone (forked, so that starting costs nothing), `--group-kills` of the main process of a run with two workers:
those must end by themselves. Half of the runs remove duplicates too, which takes two passes and joins pieces.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from mm.cli import main as mm

SOURCE = ["world_audio", "--set", "n=16", "--samples-per-shard", "2", "--quiet"]
VARIANTS = ([], ["--dedupe", "exact", "--filter", "min_words=30"])
FINAL = ("shard-*", "manifest.json", "removed.jsonl", "quarantine.jsonl")


def contents(folder: Path) -> dict[str, bytes]:
    """Everything under a final name."""
    return {path.name: path.read_bytes() for pattern in FINAL for path in sorted(folder.glob(pattern))}


def forked(arguments: list[str]) -> Callable[[], int | None]:
    """Runs `mm shard` in a fork of this process. Returns what polls it: None while it runs."""
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        os._exit(mm(["shard", *arguments]))

    def poll() -> int | None:
        done, status = os.waitpid(child, os.WNOHANG)
        return os.waitstatus_to_exitcode(status) if done else None

    poll.pid = child  # type: ignore[attr-defined]
    return poll


def spawned(arguments: list[str]) -> Callable[[], int | None]:
    """The same in a process of its own, with workers; its standard error closes when the last of them is gone."""
    command = [sys.executable, "-m", "mm.cli", "shard", *arguments]
    process = subprocess.Popen(command, stderr=subprocess.PIPE)

    def poll() -> int | None:
        return process.poll()

    poll.pid = process.pid  # type: ignore[attr-defined]
    poll.process = process  # type: ignore[attr-defined]
    return poll


def wait(poll: Callable[[], int | None], seconds: float) -> int | None:
    """The exit status, or None if it is still running after so long."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        status = poll()
        if status is not None:
            return status
        time.sleep(0.002)
    return poll()


def rounds(start: Callable[..., Callable[[], int | None]], extra: list[str], kills: int, draw: random.Random) -> int:
    """Kills `kills` runs and returns in how many rounds, each ending with a folder like the reference's."""
    done = finished = 0
    with tempfile.TemporaryDirectory() as scratch:
        references = []
        for number, variant in enumerate(VARIANTS):
            out = Path(scratch) / f"whole-{number}"
            begun = time.monotonic()
            assert wait(start([*SOURCE, *variant, *extra, "--out", str(out)]), 600) == 0
            references.append((contents(out), time.monotonic() - begun))
        while done < kills:
            number = finished % len(VARIANTS)
            whole, duration = references[number]
            out = Path(scratch) / f"round-{finished}"
            while True:
                poll = start([*SOURCE, *VARIANTS[number], *extra, "--out", str(out)])
                limit = draw.uniform(0, 1.2 * duration) if done < kills else 600
                status = wait(poll, limit)
                if status is not None:
                    assert status == 0, f"a run ended with {status}"
                    break
                os.kill(poll.pid, signal.SIGKILL)  # type: ignore[attr-defined]
                assert wait(poll, 60) is not None
                done += 1
                check_orphans(poll)
                if out.exists():
                    for name, data in contents(out).items():
                        assert data == whole[name], f"{name}: not what a whole run writes, under its final name"
            assert contents(out) == whole, "the folder differs from that of a whole run"
            assert sorted(path.name for path in out.iterdir()) == sorted(whole), "something is left over"
            finished += 1
    return finished


def check_orphans(poll: Callable[[], int | None]) -> None:
    """Reads a killed run's standard error to its end: it stays open as long as a worker lives."""
    process = getattr(poll, "process", None)
    if process is not None:
        begun = time.monotonic()
        process.stderr.read()
        seconds = time.monotonic() - begun
        assert seconds < 30, f"the workers of a killed run lived on for {seconds:.0f} s"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--group-kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    draw = random.Random(options.seed)
    for name, start, extra, kills in (
        ("one process", forked, ["--workers", "1"], options.kills),
        ("two workers", spawned, ["--workers", "2"], options.group_kills),
    ):
        if kills:
            finished = rounds(start, extra, kills, draw)
            print(f"{name}: {kills} SIGKILLs in {finished} runs: 0 half files, 0 differing bytes", flush=True)


if __name__ == "__main__":
    main()
