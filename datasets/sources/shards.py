"""Finished shards, to be filtered, changed or given features anew: a folder that mm shard wrote."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from mm.datasets.manifest import MANIFEST
from mm.datasets.shard_reader import ShardDataset
from mm.datasets.source import Source
from mm.types import Sample


class Shards(Source[int]):
    """The samples of a folder of shards, in its order, without the features that it may hold: whatever is made of the
    media here, they would not follow. Raises ValueError as ShardDataset does."""

    def __init__(self, path: Path) -> None:
        self.samples = ShardDataset(path)

    def __len__(self) -> int:
        return len(self.samples)

    def records(self) -> Iterable[int]:
        return range(len(self.samples))

    def sample(self, record: int) -> Sample:
        sample = self.samples[record]
        return replace(sample, media=[replace(item, features=None) for item in sample.media])

    def fingerprint(self) -> dict[str, Any]:
        return {shard["file"]: shard["sha256"] for shard in self.samples.manifest["shards"]}

    @classmethod
    def recognises(cls, path: Path) -> bool:
        file = path / MANIFEST
        return file.is_file() and b'"format": "mm-shards-' in file.read_bytes()  # a damaged one says so when it is read
