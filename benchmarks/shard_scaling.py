"""`mm shard` with one and with two workers: how much faster, and how much memory.

    python benchmarks/shard_scaling.py [--images 2000] [--repeats 3] [--lines 2000000]

The work is that of a typical data set: JPEGs of 1600x1200 made smaller and written again. One and two workers take
turns; the best of the repeats counts. The time to start (imports, some seconds) is taken off: it does not grow with
the source. Memory is the sum over all processes of a run of what each has for itself and its share of what they share
(PSS); it is also taken of a JSONL corpus of `--lines` lines.
"""

from __future__ import annotations

import argparse
import io
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
from PIL import Image


def make_images(folder: Path, count: int) -> None:
    """Photograph-like noise: smooth fields with some grain."""
    draw = np.random.default_rng(0)
    coarse = Image.fromarray(draw.integers(0, 256, (60, 80, 3), np.uint8)).resize(
        (1600, 1200), Image.Resampling.BICUBIC
    )
    file = io.BytesIO()
    grain = draw.integers(-8, 9, (1200, 1600, 3))
    Image.fromarray((np.asarray(coarse) + grain).clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=88)
    folder.mkdir()
    with (folder / "metadata.jsonl").open("w") as rows:
        for number in range(count):
            (folder / f"{number:05d}.jpg").write_bytes(file.getvalue())
            rows.write(json.dumps({"file_name": f"{number:05d}.jpg", "text": f"picture {number}"}) + "\n")


def family(process: int) -> list[int]:
    """A process and all below it."""
    found = [process]
    for task in Path(f"/proc/{process}/task").glob("*/children"):
        for child in task.read_text().split():
            found += family(int(child))
    return found


def memory(process: int) -> float:
    """PSS of a process and all below it, MiB; what has just ended counts nothing."""
    total = 0
    try:
        for member in family(process):
            for line in Path(f"/proc/{member}/smaps_rollup").read_text().splitlines():
                if line.startswith("Pss:"):
                    total += int(line.split()[1])
    except (FileNotFoundError, ProcessLookupError):
        pass
    return total / 1024


def shard(arguments: list[str], out: Path) -> tuple[float, float]:
    """Seconds and peak MiB of one run."""
    command = [sys.executable, "-m", "mm.cli", "shard", *arguments, "--out", str(out), "--quiet"]
    begun = time.perf_counter()
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    peaks = [0.0]

    def watch() -> None:
        while process.poll() is None:
            peaks.append(memory(process.pid))
            time.sleep(0.2)

    watcher = threading.Thread(target=watch)
    watcher.start()
    status = process.wait()
    seconds = time.perf_counter() - begun
    watcher.join()
    assert status == 0, f"mm shard ended with {status}"
    return seconds, max(peaks)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--lines", type=int, default=2_000_000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        make_images(folder / "images", options.images)
        work = [str(folder / "images"), "--transform", "image_side=512", "--samples-per-shard", "25"]
        best: dict[tuple[int, str], float] = {}
        most: dict[int, float] = {1: 0.0, 2: 0.0}
        for repeat in range(options.repeats):
            for workers in (1, 2):
                for what, limit in (("start", "1"), ("whole", str(options.images))):
                    out = folder / f"{what}-{workers}-{repeat}"
                    seconds, peak = shard([*work, "--workers", str(workers), "--limit", limit], out)
                    best[workers, what] = min(best.get((workers, what), 1e9), seconds)
                    most[workers] = max(most[workers], peak)
        rates = {n: options.images / max(1e-9, best[n, "whole"] - best[n, "start"]) for n in (1, 2)}
        print(f"1 worker {rates[1]:.1f} images/s, 2 workers {rates[2]:.1f}: {rates[2] / rates[1]:.2f} times as fast")
        print(f"memory: {most[1]:.0f} MiB with 1 worker, {most[2]:.0f} MiB with 2")
        if options.lines:
            corpus = folder / "corpus.jsonl"
            with corpus.open("w") as file:
                for number in range(options.lines):
                    file.write(json.dumps({"text": f"{number} " + "some words of a document " * 20}) + "\n")
            _, peak = shard([str(corpus), "--workers", "2", "--samples-per-shard", "5000"], folder / "corpus")
            print(f"memory: {peak:.0f} MiB for a corpus of {corpus.stat().st_size / 1e6:,.0f} MB, 2 workers")


if __name__ == "__main__":
    main()
