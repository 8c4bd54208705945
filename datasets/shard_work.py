"""What one process does of `mm shard`: a chunk of records becomes pieces of shards, or fingerprints for `dedupe`.

A chunk leaves in the folder of unfinished work, in this order, so that the receipt vouches for the rest:

    chunk-000003.00.tar, chunk-000003.00.index.npy   its samples; more than one pair where they exceed a shard's bytes
    chunk-000003.removed.jsonl, chunk-000003.quarantine.jsonl
    chunk-000003.json                                the receipt: counts, and size and hash of the pieces
"""

from __future__ import annotations

import hashlib
import io
import json
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from mm.datasets.dedupe import Dedupe, Fingerprints
from mm.datasets.features import FeatureMaker
from mm.datasets.shard_format import INDEX_DTYPE, TAR_END, encode_sample, write_file
from mm.datasets.source import Source, sha256_file
from mm.datasets.steps import Removed, Step
from mm.types import KINDS, Sample


@dataclass(frozen=True)
class Job:
    """What all chunks have in common."""

    source: Source[Any]
    steps: tuple[Step, ...]
    folder: Path
    dedupe: Dedupe | None
    shard_bytes: int
    features: FeatureMaker | None = None


@dataclass(frozen=True)
class Piece:
    """A tar with its index, and what the manifest will say of it."""

    name: str
    samples: int
    branches: int
    media: dict[str, int]
    bytes: int
    sha256: str
    index_sha256: str

    def describe(self, tar: Path, index: Path) -> dict[str, Any]:
        found = asdict(self)
        del found["name"]
        return {"file": tar.name, "index": index.name, **found}


@dataclass
class _Chunk:
    """The samples of a chunk that survive its steps, and notes on those that do not."""

    job: Job
    first: int
    records: list[Any]
    duplicates: dict[str, list[str]] = field(default_factory=dict)
    unreadable: dict[str, str] = field(default_factory=dict)  # what the scan could take no fingerprint of, and why
    removed: list[dict[str, Any]] = field(default_factory=list)
    bad: list[dict[str, Any]] = field(default_factory=list)

    def samples(self) -> Iterator[tuple[int, Sample]]:
        """(number of the record, sample)."""
        for number, record in enumerate(self.records, start=self.first):
            key = None
            try:
                sample = self.job.source.sample(record)
                key = sample.key
                if str(number) in self.unreadable:
                    raise ValueError(self.unreadable[str(number)])
                if str(number) in self.duplicates:
                    raise Removed(*self.duplicates[str(number)])
                for step in self.job.steps:
                    sample = step(sample)
            except Removed as removed:
                note = {"record": number, "key": key, "reason": removed.reason, "detail": removed.detail}
                self.removed.append(note)
            except (ValueError, OSError) as error:
                self.refuse(number, key, error)
            else:
                yield number, sample

    def featured(self) -> Iterator[tuple[int, Sample]]:
        """The samples as they go into the shard; an encoder takes many at a time."""
        make, samples = self.job.features, self.samples()
        if make is None:
            yield from samples
            return
        while group := list(islice(samples, make.samples_at_once)):
            for (number, before), made in zip(group, make([sample for _, sample in group]), strict=True):
                if isinstance(made, ValueError):
                    self.refuse(number, before.key, made)
                else:
                    yield number, made

    def encoded(self) -> Iterator[tuple[Sample, list[bytes]]]:
        for number, sample in self.featured():
            try:
                parts = encode_sample(sample)
            except (ValueError, OSError) as error:
                self.refuse(number, sample.key, error)
            else:
                yield sample, parts

    def refuse(self, number: int, key: str | None, error: Exception) -> None:
        cause = " ".join(str(error).split()) or type(error).__name__
        self.bad.append({"record": number, "key": key, "cause": cause})


def scan_chunk(job: Job, number: int, first: int, records: list[Any]) -> Path:
    """Leaves the fingerprints of a chunk's samples in a file, unless an interrupted run has."""
    assert job.dedupe is not None
    path = job.folder / f"scan-{number:06d}.npz"
    broken = job.folder / f"scan-{number:06d}.broken.json"
    if not path.exists() or broken.exists():  # what was broken may have been mended: the chunk is scanned again
        chunk, found = _Chunk(job, first, records), Fingerprints()
        for at, sample in chunk.samples():
            try:
                found.add(at, sample, job.dedupe.kinds)
            except (ValueError, OSError) as error:
                chunk.refuse(at, sample.key, error)
        broken.unlink(missing_ok=True)
        if chunk.bad:
            causes = {str(note["record"]): note["cause"] for note in chunk.bad}
            write_file(broken, [json.dumps(causes).encode()])
        found.save(path)
    return path


def write_chunk(job: Job, number: int, first: int, records: list[Any]) -> dict[str, Any]:
    """Writes a chunk's pieces and returns its receipt, or finds what an interrupted run has finished of it."""
    name = f"chunk-{number:06d}"
    decisions = job.folder / f"duplicates-{number:06d}.json"
    broken = job.folder / f"scan-{number:06d}.broken.json"
    duplicates = decisions.read_bytes() if job.dedupe is not None else b"{}"
    unreadable = broken.read_bytes() if broken.exists() else b"{}"
    decided = hashlib.sha256(duplicates).hexdigest()
    kept = _kept(job.folder, name, decided)
    if kept is not None:
        return kept
    chunk = _Chunk(job, first, records, json.loads(duplicates), json.loads(unreadable))
    pieces = list(_pieces(job, name, chunk))
    for report, notes in (("removed", chunk.removed), ("quarantine", chunk.bad)):
        path = job.folder / f"{name}.{report}.jsonl"
        path.unlink(missing_ok=True)
        if notes:
            write_file(path, [(json.dumps(note, ensure_ascii=False) + "\n").encode() for note in notes])
    receipt = {
        "name": name,
        "records": len(records),
        "removed": dict(Counter(note["reason"] for note in chunk.removed)),
        "quarantined": len(chunk.bad),
        "decided": decided,
        "pieces": [asdict(piece) for piece in pieces],
    }
    write_file(job.folder / f"{name}.json", [json.dumps(receipt).encode()])
    return receipt


def merged(pieces: list[Piece]) -> Piece:
    """The counts of several pieces in one tar; its hashes are not known from theirs."""
    media = {kind: sum(piece.media[kind] for piece in pieces) for kind in KINDS}
    size = sum(piece.bytes - len(TAR_END) for piece in pieces) + len(TAR_END)
    samples, branches = sum(piece.samples for piece in pieces), sum(piece.branches for piece in pieces)
    return Piece(pieces[0].name, samples, branches, media, size, "", "")


def index_bytes(entries: np.ndarray) -> bytes:
    packed = io.BytesIO()
    np.save(packed, entries)
    return packed.getvalue()


def _pieces(job: Job, name: str, chunk: _Chunk) -> Iterator[Piece]:
    """Writes the samples of a chunk into as many tars as their bytes ask for."""
    samples = chunk.encoded()
    waiting = next(samples, None)
    number = 0
    while waiting is not None:
        entries: list[tuple[bytes, int, int, int]] = []
        counts = Counter[str]()
        size = 0

        def members() -> Iterator[bytes]:
            nonlocal waiting, size
            while waiting is not None:
                sample, parts = waiting
                length = sum(map(len, parts))
                if size and size + length + len(TAR_END) > job.shard_bytes:
                    break
                crc = 0
                for part in parts:
                    crc = zlib.crc32(part, crc)
                    yield part
                entries.append((sample.key.encode(), size, length, crc))  # noqa: B023  (used before it changes)
                size += length
                counts.update(samples=1, branches=len(sample.branches))  # noqa: B023
                counts.update(item.kind for item in sample.media)  # noqa: B023
                waiting = next(samples, None)
            yield TAR_END

        base = f"{name}.{number:02d}"
        digest = write_file(job.folder / f"{base}.tar", members())
        index = write_file(job.folder / f"{base}.index.npy", [index_bytes(np.array(entries, INDEX_DTYPE))])
        media = {kind: counts[kind] for kind in KINDS}
        yield Piece(base, counts["samples"], counts["branches"], media, size + len(TAR_END), digest, index)
        number += 1


def _kept(folder: Path, name: str, decided: str) -> dict[str, Any] | None:
    """The receipt of a chunk that an interrupted run has finished; None where there is none, a piece is damaged, or a
    record was bad (it may have been mended)."""
    path = folder / f"{name}.json"
    if not path.exists():
        return None
    receipt = json.loads(path.read_bytes())
    if receipt["quarantined"] or receipt["decided"] != decided:
        return None
    for piece in receipt["pieces"]:
        for file, digest in ((f"{piece['name']}.tar", "sha256"), (f"{piece['name']}.index.npy", "index_sha256")):
            if not (folder / file).is_file() or sha256_file(folder / file) != piece[digest]:
                return None
    return receipt
