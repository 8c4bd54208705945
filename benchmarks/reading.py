"""Samples a second from shards: this project's reader against webdataset's, on the same tars.

    OMP_NUM_THREADS=1 python benchmarks/reading.py --clock cpu

Both read every sample of shards of media of so many `--bytes` each, and their JSON, from the page cache, in one thread;
webdataset gives dictionaries of bytes, this reader Samples, with every byte checked against its CRC-32. Order: as
stored, and shuffled (webdataset with a buffer of 1000 and shuffled shards; here the seeded permutation of an epoch).
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import webdataset
from common import Bench

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


def main() -> int:
    bench = Bench(__doc__, _arguments)
    for size in bench.args.bytes:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name) / "shards"
            write_shards(samples(bench.args.samples, size), folder, samples_per_shard=500)
            for shuffled in (False, True):
                calls = {run.__name__: partial(run, folder, shuffled) for run in (theirs, ours)}
                assert calls["ours"]() == calls["theirs"]() == bench.args.samples * size
                seconds = bench.times(calls, warmup=0)
                taken, noise = seconds["ours"]
                bench.add(
                    what=f"samples of {size / 1000:.0f} kB, {'shuffled' if shuffled else 'as stored'}", run="mm",
                    rate=bench.args.samples / taken, unit="samples/s", noise=noise, peer="webdataset",
                    ratio=seconds["theirs"][0] / taken, judged="ratio", floor=2, goal=4,
                )  # fmt: skip
    return bench.end()


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--samples", type=int, default=4000)
    parser.add_argument("--bytes", type=int, nargs="+", default=[8_000, 60_000])


if __name__ == "__main__":
    sys.exit(main())
