"""The bytes of shards: a sample as tar members, the index of a tar, and files that are written whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import re
import tarfile
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path, PurePath

import numpy as np

from mm.datasets.source import SUFFIXES
from mm.types import Media, Sample

KEY = re.compile(r"[A-Za-z0-9_-]{1,64}")  # no dot: WebDataset takes what follows the first one as the extension
INDEX_DTYPE = np.dtype([("key", "S64"), ("offset", "<u8"), ("length", "<u8"), ("crc", "<u4")])
BLOCK = 512  # bytes of a tar header, and the multiple that members are padded to
TAR_END = bytes(2 * BLOCK)


def encode_sample(sample: Sample) -> bytes:
    """The tar members of one sample: its JSON, then its media. Same sample, same bytes.

    Raises ValueError for a key that does not match KEY and for media without a suffix of their kind; OSError passes
    through from media that are paths.
    """
    if not KEY.fullmatch(sample.key):
        raise ValueError(f"sample key {sample.key!r}: use 1 to 64 letters, digits, '_' and '-'")
    media, members = [], []
    for index, item in enumerate(sample.media):
        suffix = PurePath(item.name).suffix.lower()
        if SUFFIXES.get(suffix) != item.kind:
            raise ValueError(f"sample {sample.key}: medium {item.name!r} has no suffix of kind {item.kind}")
        data = item.data if isinstance(item.data, bytes) else item.data.read_bytes()
        media.append({"kind": item.kind, "name": item.name, "file": f"{index}{suffix}"})
        members.append((f"{sample.key}.{index}{suffix}", data))
    described = {"messages": sample.messages, "branches": sample.branches, "meta": sample.meta, "media": media}
    text = json.dumps(described, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode()
    return b"".join(_member(name, data) for name, data in [(f"{sample.key}.json", text), *members])


def decode_sample(key: str, data: bytes, where: str = "sample") -> Sample:
    """The sample in the tar members `data`. Raises ValueError, beginning with `where`, for anything else."""
    files = dict(_members(data, where))
    if f"{key}.json" not in files:
        raise ValueError(f"{where}: no member {key}.json")
    described = json.loads(files[f"{key}.json"])
    media = []
    for item in described["media"]:
        name = f"{key}.{item['file']}"
        if name not in files:
            raise ValueError(f"{where}: no member {name}")
        media.append(Media(item["kind"], files[name], item["name"]))
    return Sample(key, described["messages"], media, described["branches"], described["meta"])


def read_index(path: Path) -> np.ndarray:
    """(S,) of INDEX_DTYPE, memory-mapped. Raises ValueError naming a file that is no index."""
    try:
        entries = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise ValueError(f"{path}: not an index of shards ({error}); write the shards again") from None
    if entries.dtype != INDEX_DTYPE or entries.ndim != 1:
        raise ValueError(f"{path}: not an index of shards; write the shards again")
    return entries


def write_file(path: Path, parts: Iterable[bytes]) -> str:
    """Writes a file so that `path` never names half of it: beside the name, fsynced, renamed, folder fsynced.

    Returns the SHA-256 of what was written. The parts are written as they come, never held together.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    digest = hashlib.sha256()
    try:
        with partial.open("wb") as file:
            for part in parts:
                digest.update(part)
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        with suppress(FileNotFoundError):
            partial.unlink()
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
    return digest.hexdigest()


def _member(name: str, data: bytes) -> bytes:
    """One tar member with a header that depends on nothing but name and size."""
    header = tarfile.TarInfo(name)
    header.size = len(data)
    return header.tobuf(tarfile.USTAR_FORMAT) + data + bytes(-len(data) % BLOCK)


def _members(data: bytes, where: str) -> Iterator[tuple[str, bytes]]:
    """(name, content) of the tar members in `data`, which must be regular files. `tarfile` is four times as slow."""
    offset = 0
    while offset < len(data):
        header = data[offset : offset + BLOCK]
        name, kind = header[:100].rstrip(b"\0"), header[156:157]
        try:
            size = int(header[124:136].rstrip(b"\0 "), 8)
            text = name.decode()
        except ValueError:
            raise ValueError(f"{where}: no tar header at byte {offset} of the sample") from None
        offset += BLOCK
        if kind not in (b"0", b"\0") or offset + size > len(data):
            raise ValueError(f"{where}: member {text!r} is not a regular file within the sample")
        yield text, data[offset : offset + size]
        offset += size + -size % BLOCK
