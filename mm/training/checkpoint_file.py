"""The file of a checkpoint: one that is whole or not there, and that knows its own hash.

    torch's zip archive, whose comment (TAIL bytes, as the zip format allows) is the manifest:
        JSON: format, bytes, versions, step; padded with spaces      and, last, the SHA-256 of all bytes before it

So `torch.load` opens it as any other, and one rename replaces data and manifest together: no moment of a kill leaves
one without the other. A file is written beside its final name, in the same folder, synced, read back and compared
before it takes the name. Nothing is staged in TMPDIR, which may be another file system.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

import mm

FORMAT = "mm-checkpoint-1"
TAIL = 1024  # bytes of the zip comment
END = 22  # bytes of the zip's end record, whose last two say how long the comment is
CHUNK = 1 << 22
MARGIN = 1 << 22  # bytes of a checkpoint that are not tensors: more than it takes


def verify_checkpoint(path: str | Path) -> dict[str, Any]:
    """What the checkpoint's manifest says, once all of its bytes have the hash that it ends with.

    Raises ValueError naming a file that is missing, cut off, changed, or not written by `AtomicCheckpointIO`.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such checkpoint")
    with path.open("rb") as file:
        digest, last = _digest(file, path.stat().st_size - 64)
        tail = last[-(TAIL - 64) :]
        written = file.read(64)
    if digest.encode() != written:
        raise ValueError(
            f"{path}: damaged, or not a checkpoint of this project: its SHA-256 is not the one that it ends with"
        )
    return json.loads(tail)


def write_checkpoint(checkpoint: dict[str, Any], path: Path) -> None:
    """Writes a checkpoint file: `path` names the old one, or the whole new one, at every moment.

    Raises OSError, naming the folder, where there is no room for it or no right to write.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    need = sum(_storages(checkpoint)) + MARGIN
    check_space(path.parent, need)
    partial = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.tmp")
    try:
        with partial.open("wb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # how `sweep` tells a write under way from one that was killed
            digest = _write(file, checkpoint)
            _drop_cache(file)
            with partial.open("rb") as again:
                found, _ = _digest(again, os.fstat(file.fileno()).st_size - 64)
            if found != digest:
                raise OSError(f"{path.parent}: a checkpoint read back is not what was written; the disk is failing")
            partial.replace(path)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise OSError(
            f"{path.parent}: no space left for a checkpoint of {need:,} bytes; {path.name} is as it was"
        ) from error
    finally:
        partial.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def check_space(folder: Path, need: int) -> None:
    """Raises OSError where the file system of `folder` has fewer than `need` bytes free."""
    free = shutil.disk_usage(folder).free
    if free < need:
        raise OSError(f"{folder}: a checkpoint takes {need:,} bytes and {free:,} are free; make room or save elsewhere")


def sweep(folder: Path) -> list[Path]:
    """Removes the halves that killed writers left in `folder`; one that is being written is locked, and stays."""
    swept = []
    for path in sorted(folder.glob(".*.ckpt.*.tmp")):
        with path.open("rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            path.unlink(missing_ok=True)
            swept.append(path)
    return swept


class _HashingWriter:
    """What torch.save writes into. Keeps back the end record, whose comment length is not known to torch.

    A write that fails is kept in `error`, and what follows is dropped: torch would go on to finish its archive, fail at
    that, and report that alone.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.digest, self.kept = file, hashlib.sha256(), b""
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        if len(view) >= END:
            self.emit(self.kept)
            self.emit(view[:-END])
            self.kept = bytes(view[-END:])
        else:
            joined = self.kept + bytes(view)
            self.emit(joined[:-END])
            self.kept = joined[-END:]
        return len(view)

    def flush(self) -> None:
        """torch.save asks for one; the file is flushed when it is whole."""

    def emit(self, data: bytes | memoryview) -> None:
        if self.error is None:
            self.digest.update(data)
            try:
                self.file.write(data)
            except OSError as error:
                self.error = error


def _write(file: IO[bytes], checkpoint: dict[str, Any]) -> str:
    """Archive, manifest and hash; synced. Returns the hash."""
    writer = _HashingWriter(file)
    torch.save(checkpoint, writer)  # type: ignore[arg-type]
    assert writer.kept[:4] == b"PK\5\6" and writer.kept[-2:] == b"\0\0", "torch.save ended without a zip end record"
    writer.emit(writer.kept[:-2] + TAIL.to_bytes(2, "little"))
    about = {
        "format": FORMAT,
        "bytes": file.tell(),
        "step": checkpoint.get("global_step"),
        "epoch": checkpoint.get("epoch"),
        "versions": {"mm": mm.__version__, "torch": str(torch.__version__)},
    }
    writer.emit(json.dumps(about).encode().ljust(TAIL - 64))
    if writer.error is not None:
        raise writer.error
    digest = writer.digest.hexdigest()
    file.write(digest.encode())
    file.flush()
    os.fsync(file.fileno())
    return digest


def _digest(file: IO[bytes], length: int) -> tuple[str, bytes]:
    """The SHA-256 of the first `length` bytes, and the last of them (more than a manifest takes)."""
    digest, last = hashlib.sha256(), b""
    while length > 0:
        chunk = file.read(min(CHUNK, length))
        if not chunk:
            break
        digest.update(chunk)
        last, length = (last + chunk)[-TAIL:], length - len(chunk)
    return digest.hexdigest(), last


def _drop_cache(file: IO[bytes]) -> None:
    """Makes the next read come from the disk, where the system can: it is the disk's bytes that must be right."""
    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _storages(value: Any) -> Iterable[int]:
    """Bytes of each tensor."""
    if isinstance(value, Tensor):
        yield value.nbytes
    elif isinstance(value, dict):
        for item in value.values():
            yield from _storages(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _storages(item)
