"""`mm shard --index DIR`: tars that others wrote with WebDataset get an index and a manifest, and are read as they are.

Nothing is taken on trust: each member is checked to be a regular file of a known kind under a plain key, within the
tar and within the size that a sample may have, before any of it is read. A tar that fails is refused by name.
"""

from __future__ import annotations

import mmap
import platform
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

import mm
from mm.datasets.engines import Engine, run_ordered
from mm.datasets.manifest import MANIFEST, read_manifest, repeated_key, write_manifest
from mm.datasets.shard_format import (
    FOREIGN_KEY,
    INDEX_DTYPE,
    MAX_SAMPLE_BYTES,
    Member,
    check_suffix,
    decode_sample,
    members,
    write_file,
)
from mm.datasets.shard_work import Piece, index_bytes
from mm.datasets.source import sha256_file
from mm.types import KINDS

NAME = re.compile(r"(?P<key>(?:.*/)?[^./]+)\.(?P<suffix>[^/]+)", re.DOTALL)  # as WebDataset splits a member's name


def index_shards(
    directory: Path, *, workers: int = 1, engine: Engine = "local", progress: Callable[[int], None] = lambda done: None
) -> dict[str, Any]:
    """Writes NAME.index.npy for each `*.tar` in a directory, then the manifest, and returns it.

    In a directory that has a manifest, only indexes that are missing or damaged are written again.

    Raises ValueError, naming the tar and its member, for what must not be read; for a directory without tars; for a key
    that two samples have; and where a manifest is there and a tar is not as it says.
    """
    if (directory / MANIFEST).exists():
        return _repair(directory, read_manifest(directory))
    tars = sorted(directory.glob("*.tar"))
    if not tars:
        raise ValueError(f"{directory}: no *.tar in it" if directory.is_dir() else f"{directory}: not a directory")
    shards = []
    for tar, piece in zip(tars, run_ordered(index_tar, [(tar,) for tar in tars], workers, engine), strict=True):
        shards.append(piece.describe(tar, _index_path(tar)))
        progress(piece.samples)
    twice = repeated_key([_index_path(tar) for tar in tars])
    if twice is not None:
        raise ValueError(f"{directory}: two samples have the key {twice!r}; keys must be unique, also across tars")
    totals = {name: sum(shard[name] for shard in shards) for name in ("samples", "branches", "bytes")}
    media = {kind: sum(shard["media"][kind] for shard in shards) for kind in KINDS}
    versions = {"mm": mm.__version__, "python": platform.python_version(), "numpy": np.__version__}
    about = {"settings": {"source": "index"}, "fingerprint": {}}
    return write_manifest(directory, {**about, **totals, "media": media, "versions": versions, "shards": shards})


def index_tar(tar: Path) -> Piece:
    """Indexes one tar, each of whose samples is read once."""
    entries, counts = [], Counter[str]()
    with tar.open("rb") as file:
        size = file.seek(0, 2)
        if not size:
            raise ValueError(f"{tar}: empty")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            for key, start, end in _runs(data, str(tar)):
                where = f"{tar}: offset {start}: sample {key}"
                if end - start > MAX_SAMPLE_BYTES:
                    raise ValueError(f"{where}: {end - start:,} bytes, more than {MAX_SAMPLE_BYTES:,}")
                content = data[start:end]
                sample = decode_sample(key, content, where)
                entries.append((key.encode(), start, end - start, zlib.crc32(content)))
                counts.update(samples=1, branches=len(sample.branches))
                counts.update(item.kind for item in sample.media)
    if not entries:
        raise ValueError(f"{tar}: holds no samples")
    digest = write_file(_index_path(tar), [index_bytes(np.array(entries, INDEX_DTYPE))])
    media = {kind: counts[kind] for kind in KINDS}
    return Piece(tar.name, counts["samples"], counts["branches"], media, size, sha256_file(tar), digest)


def _repair(directory: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    """The manifest as it is, once every index is as it says."""
    for shard in manifest["shards"]:
        tar, index = directory / shard["file"], directory / shard["index"]
        if index.is_file() and sha256_file(index) == shard["index_sha256"]:
            continue
        if not tar.is_file() or sha256_file(tar) != shard["sha256"]:
            raise ValueError(f"{tar}: missing or damaged, so its index cannot be made; write the shards again")
        if index_tar(tar).index_sha256 != shard["index_sha256"]:
            raise ValueError(f"{index}: differs from the manifest's although {tar.name} does not; remove {MANIFEST}")
    return manifest


def _runs(data: mmap.mmap, where: str) -> Iterator[tuple[str, int, int]]:
    """(key, start, end) of each run of members with one key."""
    key, start, end = "", 0, 0
    for member in members(data, where):
        found = _key(member, where)
        if found != key:
            if key:
                yield key, start, end
            key, start = found, member.header
        end = member.end
    if key:
        yield key, start, end


def _key(member: Member, where: str) -> str:
    label = f"{where}: offset {member.header}: member {member.name!r}"
    match = NAME.fullmatch(member.name)
    if match is None or not FOREIGN_KEY.fullmatch(match["key"]):
        raise ValueError(f"{label}: not KEY.SUFFIX with a key of 1 to 64 letters, digits, '_', '-' and folders")
    check_suffix(match["suffix"], label, ours=True)
    return match["key"]


def _index_path(tar: Path) -> Path:
    return tar.with_name(f"{tar.name.removesuffix('.tar')}.index.npy")
