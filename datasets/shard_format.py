"""The bytes of shards: a sample as tar members, the index of a tar, and files that are written whole or not at all.

A tar may come from anybody. Members are regular files of known kinds within the tar, sizes are checked before anything
is copied, and nothing in a member is ever run or unpickled.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import re
import tarfile
from collections.abc import Iterable, Iterator
from contextlib import suppress
from functools import lru_cache
from pathlib import Path, PurePath
from typing import Any, NamedTuple

import numpy as np

from mm.datasets.foreign import sample_of_files
from mm.datasets.source import SUFFIXES
from mm.types import KINDS, Media, Sample

KEY = re.compile(r"[A-Za-z0-9_-]{1,64}")  # no dot: WebDataset takes what follows the first one as the extension
FOREIGN_KEY = re.compile(r"(?=.{1,64}\Z)[A-Za-z0-9_-]+(/[A-Za-z0-9_-]+)*")  # tars of others may have folders in them
TEXTS = (".json", ".txt", ".cls")
FEATURES = ".features.safetensors"  # behind the number of a medium: what an encoder made of it (mm.datasets.features)
INDEX_DTYPE = np.dtype([("key", "S64"), ("offset", "<u8"), ("length", "<u8"), ("crc", "<u4")])
BLOCK = 512  # bytes of a tar header, and the multiple that members are padded to
TAR_END = bytes(2 * BLOCK)
MAX_SAMPLE_BYTES = 512 * 2**20  # a sample is held in memory whole
NOT_FILES = {b"1": "a hard link", b"2": "a symbolic link", b"3": "a device", b"4": "a device", b"6": "a pipe"}


class Member(NamedTuple):
    name: str
    header: int  # offset of its first header block
    start: int  # offset of its content
    size: int

    @property
    def end(self) -> int:
        return self.start + self.size + -self.size % BLOCK


def encode_sample(sample: Sample) -> list[bytes]:
    """The tar members of one sample, in parts to be written one after another: its JSON, then its media, each with its
    features behind it, if it has any.

    Same sample, same bytes. Raises ValueError for a key that does not match KEY, media without a suffix of their kind
    and a sample of more than MAX_SAMPLE_BYTES; OSError passes through from media that are paths.
    """
    if not KEY.fullmatch(sample.key):
        raise ValueError(f"sample key {sample.key!r}: use 1 to 64 letters, digits, '_' and '-'")
    _check_size(sample)
    media, parts = [], []
    for index, item in enumerate(sample.media):
        suffix = PurePath(item.name).suffix.lower()
        if SUFFIXES.get(suffix) != item.kind:
            raise ValueError(f"sample {sample.key}: medium {item.name!r} has no suffix of kind {item.kind}")
        data = item.data if isinstance(item.data, bytes) else item.data.read_bytes()
        media.append({"kind": item.kind, "name": item.name, "file": f"{index}{suffix}"})
        parts += _member(f"{sample.key}.{index}{suffix}", data)
        if item.features is not None:
            parts += _member(f"{sample.key}.{index}{FEATURES}", item.features)
    described = {"messages": sample.messages, "branches": sample.branches, "meta": sample.meta, "media": media}
    text = json.dumps(described, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return [*_member(f"{sample.key}.json", text.encode("utf-8")), *parts]


def decode_sample(key: str, data: bytes, where: str = "sample") -> Sample:
    """The sample in the tar members `data`; one that others wrote is read as `mm.datasets.foreign` says.

    Raises ValueError, beginning with `where`, for anything else.
    """
    files: dict[str, bytes] = {}
    end = 0
    for member in members(data, where):
        files[member.name] = data[member.start : member.start + member.size]
        end = member.end
    if end != len(data):
        raise ValueError(f"{where}: no tar header at byte {end} of the sample")
    beginning = f"{key}."
    for name in files:
        if not name.startswith(beginning):
            raise ValueError(f"{where}: member {name!r} is not of sample {key!r}")
    described = _json(files, f"{key}.json", where)
    if not isinstance(described, dict) or not described.keys() >= {"messages", "media", "branches", "meta"}:
        inner = {name.removeprefix(beginning): content for name, content in files.items()}
        for name in inner:
            check_suffix(name, f"{where}: member '{key}.{name}'")
        return sample_of_files(key, inner, where)
    media = [_medium(item, index, key, files, where) for index, item in enumerate(described["media"])]
    return Sample(key, described["messages"], media, described["branches"], described["meta"])


def members(data: bytes | mmap.mmap, where: str) -> Iterator[Member]:
    """The regular members of a tar, up to its end or that of `data`; `tarfile` is four times as slow.

    Directories are passed over. Raises ValueError, beginning with `where`, for links, devices and pipes, by name, for a
    member that claims to be longer than the tar, and for what is no tar header.
    """
    offset = begin = 0
    extended: dict[str, str] = {}  # what a PAX or GNU header says of the next member
    while offset + BLOCK <= len(data):
        header = data[offset : offset + BLOCK]
        if header[0] == 0:
            if header == TAR_END[:BLOCK]:
                return
            raise ValueError(f"{where}: no tar header at byte {offset}")
        name, size, kind = _header(header, where, offset)
        name, size = extended.get("path", name), int(extended.get("size", size))
        start = offset + BLOCK
        offset = start + size + -size % BLOCK
        if offset > len(data):
            raise ValueError(
                f"{where}: member {name!r} claims {size:,} bytes, of which {len(data) - start:,} are there"
            )
        if kind in (b"0", b"\0"):
            yield Member(name, begin, start, size)
        elif kind in (b"x", b"g", b"L"):
            extended |= _extended(data[start : start + min(size, 1 << 16)], kind, where)
            continue
        elif kind != b"5":
            what = NOT_FILES.get(kind, f"of type {kind!r}")
            raise ValueError(f"{where}: member {name!r} is not a regular file but {what}")
        begin, extended = offset, {}


def check_suffix(name: str, where: str, ours: bool = False) -> None:
    """Raises ValueError, beginning with `where`, for a member of a kind that is not read. `ours`: by ourselves."""
    suffix = PurePath(f"x.{name}").suffix.lower()
    if ours and name.endswith(FEATURES):
        return
    if suffix not in SUFFIXES and suffix not in TEXTS:
        raise ValueError(f"{where}: {suffix!r} is not read: media, {', '.join(TEXTS)} are (a pickle could run code)")


def read_index(path: Path) -> np.ndarray:
    """(S,) of INDEX_DTYPE, memory-mapped. Raises ValueError naming a file that is no index."""
    try:
        entries = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, OSError, SyntaxError) as error:
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
    sync_folder(path.parent)
    return digest.hexdigest()


def sync_folder(folder: Path) -> None:
    """Makes the renames in a folder last."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _check_size(sample: Sample) -> None:
    size = sum(len(m.data) if isinstance(m.data, bytes) else m.data.stat().st_size for m in sample.media)
    size += sum(len(m.features or b"") for m in sample.media)
    if size > MAX_SAMPLE_BYTES:
        raise ValueError(f"sample {sample.key}: {size:,} bytes of media, more than {MAX_SAMPLE_BYTES:,}; cut them")


def _member(name: str, data: bytes) -> list[bytes]:
    """One tar member with a header that depends on nothing but name and size."""
    header = tarfile.TarInfo(name)
    header.size = len(data)
    return [header.tobuf(tarfile.USTAR_FORMAT), data, bytes(-len(data) % BLOCK)]


def _header(header: bytes, where: str, offset: int) -> tuple[str, int, bytes]:
    """(name, size, type) of a header block."""
    try:
        name = header[:100].rstrip(b"\0").decode()
        if header[345] and header[257:262] == b"ustar" and header[262:263] != b" ":
            name = f"{header[345:500].rstrip(bytes(1)).decode()}/{name}"
        if header[124] & 0x80:  # base 256, for what eight octal digits cannot say
            size = int.from_bytes(header[125:136], "big")
        else:
            size = int(header[124:136].rstrip(b"\0 ") or b"0", 8)
    except ValueError:
        raise ValueError(f"{where}: no tar header at byte {offset} of the sample") from None
    if size < 0:
        raise ValueError(f"{where}: member {name!r} claims {size:,} bytes")
    return name, size, header[156:157]


def _extended(data: bytes, kind: bytes, where: str) -> dict[str, str]:
    """`path` and `size` in a PAX header ("LENGTH KEY=VALUE\\n", ...), or the path that a GNU header is."""
    try:
        if kind == b"L":
            return {"path": data.rstrip(b"\0").decode()}
        found = {}
        while data.rstrip(b"\0"):
            length = int(data[: data.index(b" ")])
            key, value = data[data.index(b" ") + 1 : length - 1].split(b"=", 1)
            if length < 5 or data[length - 1 : length] != b"\n":
                raise ValueError("no record")
            if kind == b"x" and key in (b"path", b"size"):
                found[key.decode()] = str(int(value)) if key == b"size" else value.decode()
            data = data[length:]
        return found
    except ValueError:
        raise ValueError(f"{where}: a tar header of type {kind.decode()!r} that cannot be read") from None


def _json(files: dict[str, bytes], name: str, where: str) -> Any:
    if name not in files:
        return None
    try:
        return json.loads(files[name])
    except (ValueError, RecursionError):
        raise ValueError(f"{where}: member {name!r} is not JSON") from None


@lru_cache(1024)  # few names are many samples' (0.jpg), and parsing a path is a tenth of reading a sample
def _kind_of(file: str) -> str | None:
    return SUFFIXES.get(PurePath(f"x.{file}").suffix.lower())


def _medium(item: Any, index: int, key: str, files: dict[str, bytes], where: str) -> Media:
    try:
        kind, name, file = item["kind"], item["name"], item["file"]
        known = kind in KINDS and isinstance(name, str) and _kind_of(str(file)) == kind
    except (TypeError, KeyError):
        known, kind, name, file = False, item, item, item
    if not known:
        raise ValueError(f"{where}: member '{key}.json': not a medium of a known kind: {item!r:.80}")
    if f"{key}.{file}" not in files:
        raise ValueError(f"{where}: no member {key}.{file}")
    return Media(kind, files[f"{key}.{file}"], name, features=files.get(f"{key}.{index}{FEATURES}"))
