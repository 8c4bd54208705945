"""Reading side of shards: samples by number, each checked, from memory-mapped tars.

number -> shard, row of its index -> bytes, checked against their CRC-32 -> Sample
"""

from __future__ import annotations

import mmap
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from isal.isal_zlib import crc32  # zlib's CRC-32, four times as fast

from mm.datasets.manifest import damaged_files, read_manifest
from mm.datasets.shard_cache import RemoteFolder, ShardCache, ShardError
from mm.datasets.shard_format import decode_sample, read_index
from mm.datasets.source import sha256_file
from mm.types import Sample

MAX_OPEN = 64  # shards; each takes a file handle and address space


class ShardDataset:
    """Random access to the samples of a directory of shards, in the order in which they were written.

    Tars and indexes are memory-mapped when first read, `MAX_OPEN` at a time; an index is checked against its SHA-256,
    every sample against its CRC-32. Instances pickle small, for loader workers.

    Args:
        directory: a folder, or a URL that fsspec opens (s3://, gs://, https://, ...).
        cache: where shards behind a URL are kept.

    Raises:
        ShardError: a shard that is missing or not as long as the manifest says, a damaged index, a store that does not
            answer.
        ValueError: no manifest; on reading, a damaged sample, naming shard, offset and key.
    """

    def __init__(self, directory: Path | str, cache: ShardCache | None = None) -> None:
        self.remote = RemoteFolder(str(directory), cache or ShardCache()) if "://" in str(directory) else None
        self.directory = Path(directory)  # of a URL, only its name
        self.name = self.remote.url if self.remote else str(self.directory)
        self.manifest = self.remote.manifest() if self.remote else read_manifest(self.directory)
        self.ends: list[int] = np.cumsum([shard["samples"] for shard in self.manifest["shards"]]).tolist()
        self._open: OrderedDict[int, tuple[mmap.mmap, np.ndarray]] = OrderedDict()
        if self.remote is None:
            for shard in self.manifest["shards"]:
                _check_length(self.directory / shard["file"], shard)

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, index: int) -> Sample:
        shard, offset, length, crc, key = self._find(index)
        data = self._shard(shard)[0][offset : offset + length]
        where = f"{self.name}/{self.manifest['shards'][shard]['file']}: offset {offset}: sample {key}"
        if crc32(data) != crc:
            raise ValueError(f"{where}: damaged (CRC-32 differs); write the shards again")
        return decode_sample(key, data, where)

    def __iter__(self) -> Iterator[Sample]:
        return (self[index] for index in range(len(self)))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict()}  # a map of a file cannot be sent to another process

    def locate(self, index: int) -> dict[str, Any]:
        """Where a sample lies, for whoever reports it: "shard", "offset" (bytes) and "key"."""
        shard, offset, _, _, key = self._find(index)
        return {"shard": f"{self.name}/{self.manifest['shards'][shard]['file']}", "offset": offset, "key": key}

    def verify(self) -> None:
        """Compares the SHA-256 of every file with the manifest's. Raises ValueError naming the first that differs."""
        if self.remote is None:
            for line in damaged_files(self.directory, self.manifest):
                raise ValueError(line)
        for number in range(len(self.ends)):
            self._shard(number)  # a download is checked as it comes

    def block(self) -> int:
        """Samples that are best read together: whole shards, about a thousand samples."""
        largest = max(shard["samples"] for shard in self.manifest["shards"])
        return largest * -(-1000 // largest)

    def _find(self, index: int) -> tuple[int, int, int, int, str]:
        """Shard, offset, length, CRC-32 and key of a sample."""
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} of {len(self)} samples in {self.name}")
        shard = bisect_right(self.ends, index)
        key, offset, length, crc = self._shard(shard)[1][index - (self.ends[shard - 1] if shard else 0)].item()
        return shard, offset, length, crc, key.decode(errors="replace")

    def _shard(self, number: int) -> tuple[mmap.mmap, np.ndarray]:
        if number in self._open:
            self._open.move_to_end(number)
            return self._open[number]
        shard = self.manifest["shards"][number]
        tar, index = self._file(shard["file"], shard["sha256"]), self._file(shard["index"], shard["index_sha256"])
        _check_length(tar, shard)
        try:
            if sha256_file(index) != shard["index_sha256"]:
                mend = "remove it" if self.remote else "mm shard --index writes it again"
                raise ShardError(f"{index}: damaged (SHA-256 differs from the manifest's); {mend}")
            entries = np.array(read_index(index))  # some kilobytes
            with tar.open("rb") as file:
                opened = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise ShardError(f"{self.name}: {error}") from error
        if len(entries) != shard["samples"]:
            raise ShardError(f"{index}: {len(entries)} samples, the manifest says {shard['samples']}")
        self._open[number] = opened, entries
        if len(self._open) > MAX_OPEN:
            self._open.popitem(last=False)
        return opened, entries

    def _file(self, name: str, sha256: str) -> Path:
        return self.directory / name if self.remote is None else self.remote.fetch(name, sha256)


def _check_length(path: Path, shard: dict[str, Any]) -> None:
    size = path.stat().st_size if path.is_file() else -1
    if size != shard["bytes"]:
        found = "is missing" if size < 0 else f"has {size:,} bytes"
        raise ShardError(f"{path} {found}, the manifest says {shard['bytes']:,}; write the shards again")
