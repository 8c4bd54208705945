"""Shards: samples as plain WebDataset tars, with an index per shard and a manifest that says what all of it is.

    DIR/shard-000000.tar        key.json, key.0.png, key.1.wav, ... per sample; any WebDataset reader reads it
    DIR/shard-000000.index.npy  (S,) of INDEX_DTYPE: key, offset, length and CRC-32 of each sample's run of members
    DIR/manifest.json           counts, SHA-256 of every file, source, settings, versions; its presence means "complete"

Files are written beside their final name, fsynced and renamed: index after tar, manifest last. So a killed writer
leaves no half file under a final name, and a second run keeps the shards that the first one finished.
"""

from __future__ import annotations

import io
import json
import mmap
import multiprocessing
import platform
import zlib
from bisect import bisect_right
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

import mm
from mm.datasets.shard_format import INDEX_DTYPE, TAR_END, decode_sample, encode_sample, read_index, write_file
from mm.datasets.source import Samples, Source, sha256_file
from mm.types import KINDS, Sample

FORMAT = "mm-shards-1"
MANIFEST = "manifest.json"
STARTED = "settings.json"  # what an unfinished directory is being written from


def write_shards(
    samples: Iterable[Sample] | Source[Any],
    out: Path | str,
    *,
    samples_per_shard: int = 500,
    workers: int = 1,
    limit: int | None = None,
    settings: dict[str, Any] | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> dict[str, Any]:
    """Writes samples, in their order, into shards under `out` and returns the manifest.

    Shard s holds records s * samples_per_shard onwards whatever `workers` (processes; 1 works in this one), so the
    bytes do not depend on it. Finished shards of an interrupted run with the same settings are verified and kept.

    Args:
        settings: what the samples come from, kept in the manifest under "settings".
        progress: called with the number of samples of each shard as it is finished, in order.

    Raises:
        ValueError: no samples; a sample's key does not match KEY; a medium of unknown type; `out` already holds shards
            of other settings, or complete ones. MediaError and ValueError of the source pass through.
    """
    source = samples if isinstance(samples, Source) else Samples(samples)
    out = Path(out)
    if samples_per_shard < 1 or workers < 1:
        raise ValueError(f"samples_per_shard and workers must be 1 or more, got {samples_per_shard} and {workers}")
    about = {
        "format": FORMAT,
        "settings": {**(settings or {}), "samples_per_shard": samples_per_shard, "limit": limit},
        "fingerprint": source.fingerprint(),
    }
    _start(out, about)
    records = islice(iter(source.records()), limit)
    chunks = iter(lambda: list(islice(records, samples_per_shard)), [])
    shards = []
    for shard in _write_all(source, out, chunks, workers):
        shards.append(shard)
        progress(shard["samples"])
    if not shards:
        raise ValueError(f"{out}: the source gave no samples")
    totals = {name: sum(shard[name] for shard in shards) for name in ("samples", "branches", "bytes")}
    media = {kind: sum(shard["media"][kind] for shard in shards) for kind in shards[0]["media"]}
    versions = {"mm": mm.__version__, "python": platform.python_version(), "numpy": np.__version__}
    manifest = {**about, **totals, "media": media, "versions": versions, "shards": shards}
    write_file(out / MANIFEST, [_json(manifest)])
    (out / STARTED).unlink()
    return manifest


def read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest of a finished directory of shards. Raises ValueError naming it where it is absent or not one."""
    path = directory / MANIFEST
    if not path.is_file():
        unfinished = (directory / STARTED).is_file()
        hint = "mm shard was interrupted; run it again" if unfinished else "write one with mm shard"
        raise ValueError(f"{directory}: no {MANIFEST}, so no finished directory of shards ({hint})")
    try:
        manifest = json.loads(path.read_bytes())
    except ValueError:
        raise ValueError(f"{path}: not JSON; write the shards again") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise ValueError(f"{path}: not a manifest of format {FORMAT}")
    return manifest


def remove_shards(out: Path) -> None:
    """Removes what `write_shards` writes from `out`, the manifest first, and nothing else."""
    for pattern in (MANIFEST, STARTED, "shard-*.index.npy", "shard-*.tar", ".*.tmp"):
        for path in sorted(out.glob(pattern)):
            path.unlink()


class ShardDataset:
    """Random access to the samples of a directory of shards, in the order in which they were written.

    Tars and indexes are memory-mapped when first read; every read is checked against its CRC-32. Instances pickle
    small, for loader workers.

    Raises:
        ValueError: no manifest, or a shard that is missing or not as long as the manifest says; on reading, a damaged
            sample, naming shard, offset and key.
    """

    def __init__(self, directory: Path | str) -> None:
        self.directory = Path(directory)
        self.manifest = read_manifest(self.directory)
        self.ends = np.cumsum([shard["samples"] for shard in self.manifest["shards"]]).tolist()
        self._open: dict[int, tuple[mmap.mmap, np.ndarray]] = {}
        for shard in self.manifest["shards"]:
            path = self.directory / shard["file"]
            size = path.stat().st_size if path.is_file() else -1
            if size != shard["bytes"]:
                found = "is missing" if size < 0 else f"has {size:,} bytes"
                raise ValueError(f"{path} {found}, the manifest says {shard['bytes']:,}; write the shards again")

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} of {len(self)} samples in {self.directory}")
        shard = bisect_right(self.ends, index)
        tar, entries = self._shard(shard)
        entry = entries[index - (self.ends[shard - 1] if shard else 0)]
        offset, length, key = int(entry["offset"]), int(entry["length"]), entry["key"].decode()
        data = tar[offset : offset + length]
        where = f"{self.directory / self.manifest['shards'][shard]['file']}: offset {offset}: sample {key}"
        if zlib.crc32(data) != int(entry["crc"]):
            raise ValueError(f"{where}: damaged (CRC-32 differs); write the shards again")
        return decode_sample(key, data, where)

    def __iter__(self) -> Iterator[Sample]:
        return (self[index] for index in range(len(self)))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}  # a map of a file cannot be sent to another process

    def verify(self) -> None:
        """Compares the SHA-256 of every file with the manifest's. Raises ValueError naming the first that differs."""
        for shard in self.manifest["shards"]:
            for name, digest in ((shard["file"], shard["sha256"]), (shard["index"], shard["index_sha256"])):
                if sha256_file(self.directory / name) != digest:
                    raise ValueError(f"{self.directory / name}: damaged (SHA-256 differs from the manifest's)")

    def _shard(self, number: int) -> tuple[mmap.mmap, np.ndarray]:
        if number not in self._open:
            shard = self.manifest["shards"][number]
            with (self.directory / shard["file"]).open("rb") as file:
                tar = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            self._open[number] = (tar, read_index(self.directory / shard["index"]))
        return self._open[number]


def _start(out: Path, about: dict[str, Any]) -> None:
    """Marks `out` as being written with these settings; raises ValueError where it already is with others."""
    if (out / MANIFEST).exists():
        raise ValueError(f"{out}: holds finished shards already; choose another folder or remove them")
    started = out / STARTED
    if started.exists() and json.loads(started.read_bytes()) != json.loads(_json(about)):
        raise ValueError(f"{out}: holds unfinished shards of other settings ({started}); remove them")
    if not started.exists() and any(out.glob("shard-*")):
        raise ValueError(f"{out}: holds shards that no {STARTED} explains; remove them")
    out.mkdir(parents=True, exist_ok=True)
    for leftover in out.glob(".*.tmp"):  # of a killed run; two runs into one folder at a time are not supported
        leftover.unlink()
    write_file(started, [_json(about)])


def _write_all(source: Source[Any], out: Path, chunks: Iterator[list[Any]], workers: int) -> Iterator[dict[str, Any]]:
    """Descriptions of the shards in order; at most a few chunks of records are in memory."""
    if workers == 1:
        for number, chunk in enumerate(chunks):
            yield _write_shard(source, out, number, chunk)
        return
    # Forking a process that has threads (progress bars, BLAS) may hang; a fork server has none.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    pool = ProcessPoolExecutor(workers, mp_context=context)
    try:
        pending: deque[Any] = deque()
        for number, chunk in enumerate(chunks):
            pending.append(pool.submit(_write_shard, source, out, number, chunk))
            if len(pending) > 2 * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _write_shard(source: Source[Any], out: Path, number: int, records: list[Any]) -> dict[str, Any]:
    """Writes shard `number` unless a whole one is there, and describes it for the manifest."""
    tar, index = out / f"shard-{number:06d}.tar", out / f"shard-{number:06d}.index.npy"
    kept = _kept(tar, index)
    if kept is not None:
        return kept
    entries = np.zeros(len(records), INDEX_DTYPE)
    counts = Counter[str]()
    seen: set[str] = set()

    def members() -> Iterator[bytes]:
        offset = 0
        for row, record in enumerate(records):
            sample = source.sample(record)
            if sample.key in seen:
                raise ValueError(f"{tar}: two samples have the key {sample.key!r}; keys must be unique")
            seen.add(sample.key)
            data = encode_sample(sample)
            entries[row] = (sample.key.encode(), offset, len(data), zlib.crc32(data))
            _count(counts, sample)
            offset += len(data)
            yield data
        yield TAR_END

    digest = write_file(tar, members())
    packed = io.BytesIO()
    np.save(packed, entries)
    return _describe(tar, digest, index, write_file(index, [packed.getvalue()]), counts)


def _kept(tar: Path, index: Path) -> dict[str, Any] | None:
    """The description of a shard that an interrupted run has finished; None where there is none, or a damaged one."""
    if not (tar.is_file() and index.is_file()):
        return None
    counts = Counter[str]()
    try:
        entries = read_index(index)
        data = tar.read_bytes()
        for entry in entries:
            part = data[int(entry["offset"]) : int(entry["offset"]) + int(entry["length"])]
            if zlib.crc32(part) != int(entry["crc"]):
                return None
            _count(counts, decode_sample(entry["key"].decode(), part))
    except ValueError:
        return None  # it is written again, from the same records
    return _describe(tar, sha256_file(tar), index, sha256_file(index), counts)


def _describe(tar: Path, tar_sha256: str, index: Path, index_sha256: str, counts: Counter[str]) -> dict[str, Any]:
    return {
        "file": tar.name,
        "index": index.name,
        "samples": counts["samples"],
        "branches": counts["branches"],
        "media": {kind: counts[kind] for kind in KINDS},
        "bytes": tar.stat().st_size,
        "sha256": tar_sha256,
        "index_sha256": index_sha256,
    }


def _count(counts: Counter[str], sample: Sample) -> None:
    counts["samples"] += 1
    counts["branches"] += len(sample.branches)
    counts.update(item.kind for item in sample.media)


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode()
