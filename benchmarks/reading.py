"""Samples a second from shards: this project's reader against webdataset's, on the same tars.

    OMP_NUM_THREADS=1 python benchmarks/reading.py

Both read every sample of shards of media of so many `--bytes` each, and their JSON, from the page cache, in one thread;
webdataset gives dictionaries of bytes, this reader Samples, with every byte checked against its CRC-32. Order: as
stored, and shuffled (webdataset with a buffer of 1000 and shuffled shards; here the seeded permutation of an epoch).
Process CPU time, in turn, medians.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import webdataset

from mm.datasets.order import order
from mm.datasets.shard_reader import ShardDataset
from mm.datasets.shards import write_shards
from mm.types import Media, Sample


def samples(number: int, size: int) -> Iterator[Sample]:
    generator = random.Random(0)
    for i in range(number):
        parts = [{"type": "image", "media": 0}, {"type": "text", "text": "what is shown?"}]
        messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": f"number {i}"}]
        yield Sample(f"sample_{i:06d}", messages, [Media("image", generator.randbytes(size), f"{i}.jpg")])


def ours(folder: Path, shuffled: bool) -> int:
    data = ShardDataset(folder)
    places = order(1, 0, len(data), data.block()) if shuffled else range(len(data))
    return sum(len(data[place].media[0].data) for place in places)  # type: ignore[arg-type]


def theirs(folder: Path, shuffled: bool) -> int:
    urls = sorted(str(path) for path in folder.glob("*.tar"))
    data: Any = webdataset.WebDataset(  # pyright: ignore[reportAttributeAccessIssue]
        urls, shardshuffle=len(urls) if shuffled else False, seed=1
    )
    if shuffled:
        data = data.shuffle(1000)
    return sum(len(sample["0.jpg"]) for sample in data)


def timed(function: Callable[[], int]) -> tuple[float, int]:
    start = time.process_time()
    total = function()
    return time.process_time() - start, total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=4000)
    parser.add_argument("--bytes", type=int, nargs="+", default=[8_000, 60_000])
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    print("| media | order | webdataset, samples/s | here, samples/s | ratio |\n| --- | --- | --- | --- | --- |")
    for size in arguments.bytes:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name) / "shards"
            write_shards(samples(arguments.samples, size), folder, samples_per_shard=500)
            for shuffled in (False, True):
                seconds: dict[str, list[float]] = {"theirs": [], "ours": []}
                for _ in range(arguments.rounds):
                    spent, one = timed(lambda: theirs(folder, shuffled))  # noqa: B023
                    seconds["theirs"].append(spent)
                    spent, other = timed(lambda: ours(folder, shuffled))  # noqa: B023
                    seconds["ours"].append(spent)
                    assert one == other == arguments.samples * size
                rates = {name: arguments.samples / statistics.median(times) for name, times in seconds.items()}
                ratio = statistics.median(a / b for a, b in zip(seconds["theirs"], seconds["ours"], strict=True))
                order_name = "shuffled" if shuffled else "as stored"
                print(f"| {size / 1000:.0f} kB | {order_name} | {rates['theirs']:,.0f} | {rates['ours']:,.0f} "
                      f"| {ratio:.2f}x |", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
