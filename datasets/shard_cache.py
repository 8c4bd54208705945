"""Shards that lie elsewhere (s3://, gs://, https://, ... what fsspec opens), kept in a local folder of bounded size.

A file is kept under its SHA-256, which the manifest knows: what is there is what was asked for, several data sets and
processes share it, and nothing ever goes stale. The least recently used are removed to make room.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import fsspec
from fsspec.utils import get_protocol

from mm.datasets.manifest import MANIFEST, parse_manifest

CHUNK = 1 << 20
PAUSES = (0.5, 2.0, 8.0)  # seconds before another try; then the error is final


class ShardError(ValueError):
    """Whole shards that cannot be read: a file that is missing or damaged, a store that does not answer.

    Unlike a bad sample, which is passed over, it ends a run.
    """


@dataclass
class ShardCache:
    """Where remote shards are kept, and how much of them.

    Give it room for what is read together, or shards are downloaded again and again: the order goes through 16 blocks
    of about 1000 samples at a time. Processes that have a shard open when it is removed read on; its space is free when
    they close it.
    """

    folder: str = "~/.cache/mm/shards"
    gigabytes: float = 50.0

    def __post_init__(self) -> None:
        if self.gigabytes <= 0:
            raise ValueError(f"cache.gigabytes={self.gigabytes:g}: must be above 0")

    @property
    def path(self) -> Path:
        return Path(self.folder).expanduser()

    def make_room(self, need: int) -> None:
        """Removes files until `need` bytes more stay within the bound; the caller holds the cache's lock."""
        limit = int(self.gigabytes * 1e9)
        if need > limit:
            raise ShardError(f"{self.path}: a shard of {need:,} bytes is more than the cache holds ({limit:,})")
        found = []
        for entry in os.scandir(self.path):
            if not entry.name.startswith(".lock"):
                status = entry.stat()
                found.append((status.st_mtime_ns, status.st_size, entry.path))
        total = sum(size for _, size, _ in found)
        for _, size, name in sorted(found):
            if total + need <= limit:
                return
            if not _being_written(name):
                Path(name).unlink(missing_ok=True)
                total -= size


class RemoteFolder:
    """A directory of shards behind a URL, read through a cache. Pickles small, and works in forked processes."""

    def __init__(self, url: str, cache: ShardCache) -> None:
        self.url, self.cache = url.rstrip("/"), cache
        self._filesystem: tuple[int, Any] | None = None  # with the process that it belongs to

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_filesystem": None}

    def manifest(self) -> dict[str, Any]:
        """Raises ShardError where the store does not answer, ValueError for what is no manifest."""
        where = f"{self.url}/{MANIFEST}"
        return parse_manifest(self._retry(MANIFEST, lambda: self._open(MANIFEST).read()), where)

    def fetch(self, name: str, sha256: str) -> Path:
        """The local copy of a file of the directory, downloaded if need be and then checked against its hash."""
        folder = self.cache.path
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / sha256
        for _ in range(2):
            try:
                os.utime(path)  # used now
                return path
            except FileNotFoundError:
                with _locked(folder / f".lock-{sha256[:2]}"):  # others that want it wait, and then find it
                    if not path.exists():
                        self._retry(name, lambda: self._download(name, sha256, path))
        return path

    def _download(self, name: str, sha256: str, path: Path) -> None:
        with self._open(name) as source:
            size = self._fs().size(self._path(name))
            partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
            with _locked(path.with_name(".lock")):
                self.cache.make_room(size)
                file = partial.open("wb")
                fcntl.flock(file, fcntl.LOCK_EX)  # not to be removed for room, unless its writer is dead
                file.truncate(size)  # its room is taken from now on
            try:
                with file:
                    found = _copy(source, file)
                if found != sha256:
                    raise OSError("what arrived has not the SHA-256 of the manifest")
                partial.replace(path)
            finally:
                partial.unlink(missing_ok=True)

    def _retry(self, name: str, action: Any) -> Any:
        for pause in (*PAUSES, None):
            try:
                return action()
            except ShardError:
                raise
            except Exception as error:  # each kind of store has errors of its own
                # A web server that does not answer is "not found" for fsspec as well, but with another cause.
                if isinstance(error, FileNotFoundError) and isinstance(
                    error.__cause__, (FileNotFoundError, type(None))
                ):
                    raise ShardError(f"{self.url}/{name}: no such file") from None
                if pause is None:
                    cause = " ".join(str(error).split()) or type(error).__name__
                    raise ShardError(f"{self.url}/{name}: not read in {len(PAUSES) + 1} tries: {cause}") from error
                time.sleep(pause)

    def _fs(self) -> Any:
        if self._filesystem is None or self._filesystem[0] != os.getpid():
            # Connections, and the thread that serves them, do not survive a fork.
            self._filesystem = (
                os.getpid(),
                fsspec.filesystem(get_protocol(self.url), skip_instance_cache=True),
            )
        return self._filesystem[1]

    def _path(self, name: str) -> str:
        return self._fs()._strip_protocol(f"{self.url}/{name}")

    def _open(self, name: str) -> IO[bytes]:
        return self._fs().open(self._path(name), "rb")


def _copy(source: IO[bytes], file: IO[bytes]) -> str:
    digest = hashlib.sha256()
    while chunk := source.read(CHUNK):
        digest.update(chunk)
        file.write(chunk)
    return digest.hexdigest()


def _being_written(name: str) -> bool:
    """Whether a process holds the lock of a partial file; whole files are not locked."""
    if not name.endswith(".tmp"):
        return False
    try:
        with open(name, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return True  # it has just been finished, or given up
    except BlockingIOError:
        return True
    return False


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One process at a time; a lock goes with its process, so a killed one leaves none behind."""
    with path.open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
