"""Kills a process with SIGKILL while it saves checkpoints: the one under the final name must always be whole.

    python benchmarks/kill_checkpoint.py --kills 200                      folder and TMPDIR on one file system
    python benchmarks/kill_checkpoint.py --kills 200 --tmpdir /dev/shm    TMPDIR on another (checked)
    python benchmarks/kill_checkpoint.py --full-disk DIR                  DIR lies on a small file system

A child saves checkpoint after checkpoint over one name, and is killed at a random moment of a save. After each kill the
file is verified, loaded and compared with what its step must hold; halves are swept, and none may be left. With
`--full-disk` the disk is filled first: the save must end in one line that says so, and the previous file must load.
Exits with 1 if anything was unreadable.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

import torch

from mm.training import checkpoint_file
from mm.training.checkpoint_file import check_space, sweep, verify_checkpoint
from mm.training.checkpoints import AtomicCheckpointIO


def state(step: int, numbers: int) -> dict[str, object]:
    return {"global_step": step, "state_dict": {"weight": torch.full((numbers,), float(step))}}


def save_forever(path: Path, numbers: int, asynchronous: bool) -> None:
    """What the child does: step n holds the number n everywhere."""
    io = AtomicCheckpointIO(asynchronous)
    step = int(verify_checkpoint(path)["step"]) if path.exists() else 0
    while True:
        step += 1
        io.save_checkpoint(state(step, numbers), path)


def kill_once(path: Path, numbers: int, asynchronous: bool, wait: float) -> None:
    pid = os.fork()
    if pid == 0:
        try:
            save_forever(path, numbers, asynchronous)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    before = path.stat().st_mtime_ns if path.exists() else 0
    while not path.exists() or path.stat().st_mtime_ns == before:  # it is at work
        if os.waitpid(pid, os.WNOHANG)[0]:
            raise RuntimeError("the child ended by itself")
        time.sleep(0.0005)
    time.sleep(wait)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def unreadable(path: Path) -> str | None:
    """Why the checkpoint cannot be used, if so."""
    try:
        step = verify_checkpoint(path)["step"]
        weight = torch.load(path, weights_only=True)["state_dict"]["weight"]
    except (ValueError, RuntimeError) as error:
        return str(error)
    return None if bool((weight == step).all()) else f"{path}: does not hold its own step"


def kills(arguments: argparse.Namespace, folder: Path) -> int:
    generator, bad, halves = random.Random(arguments.seed), 0, 0
    path = folder / "last.ckpt"
    for number in range(arguments.kills):
        kill_once(path, arguments.numbers, arguments.asynchronous, generator.random() * arguments.wait)
        why = unreadable(path)
        if why is not None:
            bad += 1
            print(f"kill {number}: {why}", flush=True)
        halves += len(sweep(folder))
        left = sorted(file.name for file in folder.iterdir())
        if left != ["last.ckpt"]:
            bad += 1
            print(f"kill {number}: left {left}", flush=True)
    other = os.stat(tempfile.gettempdir()).st_dev != folder.stat().st_dev
    print(
        f"{arguments.kills} kills, TMPDIR on {'another' if other else 'the same'} file system, last step "
        f"{verify_checkpoint(path)['step']}, {halves} halves swept: {bad} unreadable or left over"
    )
    return bad


def full_disk(folder: Path, numbers: int) -> int:
    """On a small file system: fills it, and saves over a good checkpoint."""
    path, filler = folder / "last.ckpt", folder / "filler"
    io = AtomicCheckpointIO()
    io.save_checkpoint(state(1, numbers), path)
    bad = 0
    for leave, look in ((0, check_space), (numbers, lambda *_: None)):  # noticed before it writes, and while it does
        checkpoint_file.check_space = look
        with filler.open("wb") as file:
            status = os.statvfs(folder)
            os.posix_fallocate(file.fileno(), 0, max(1, status.f_bavail * status.f_frsize - leave))
        try:
            io.save_checkpoint(state(2, numbers), path)
            print("a full disk was not noticed")
            bad += 1
        except OSError as error:
            print(f"full disk: {error}")
        bad += unreadable(path) is not None or verify_checkpoint(path)["step"] != 1 or bool(sweep(folder))
        filler.unlink()
    print(f"full disk: the previous checkpoint {'is damaged' if bad else 'loads'}")
    return bad


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--numbers", type=int, default=500_000, help="float32 values of a checkpoint")
    parser.add_argument("--wait", type=float, default=0.05, help="at most so many seconds after the first save")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", help="of the checkpoints; default: a temporary one below the working directory")
    parser.add_argument("--tmpdir", help="what the child takes for TMPDIR")
    parser.add_argument("--asynchronous", action="store_true")
    parser.add_argument("--full-disk", metavar="DIR")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.full_disk:
        return min(1, full_disk(Path(arguments.full_disk), arguments.numbers))
    if arguments.tmpdir:
        os.environ["TMPDIR"] = tempfile.tempdir = arguments.tmpdir
    with tempfile.TemporaryDirectory(dir=arguments.folder or ".") as name:
        return min(1, kills(arguments, Path(name)))


if __name__ == "__main__":
    sys.exit(main())
