"""manifest.json: what a finished directory of shards holds, with the SHA-256 of every file and of itself.

{"format", "self_sha256", "settings", "fingerprint", "features" (if any), "samples", "branches", "bytes", "media",
 "removed", "quarantined", "versions", "shards": [{"file", "index", "samples", "branches", "media", "bytes", "sha256",
 "index_sha256"}]}
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mm.datasets.shard_format import read_index, write_file
from mm.datasets.source import sha256_file

FORMAT = "mm-shards-2"
UNSEALED = "mm-shards-1"  # the same without the hash of the manifest itself: still read
MANIFEST = "manifest.json"
UNFINISHED = ".unfinished"  # the folder in which a directory of shards is being made
BLANK = "0" * 64
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,199}")  # a file beside the manifest, never a path
KEYS_AT_ONCE = 4_000_000
COUNTS = ("samples", "bytes")


def write_manifest(directory: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    """Writes `manifest.json`, sealed with its own hash, and returns what was written. Of another "format" than shards',
    it names its own."""
    sealed = {"format": FORMAT, "self_sha256": BLANK, **manifest}
    data = to_json(sealed)
    sealed["self_sha256"] = hashlib.sha256(data).hexdigest()
    write_file(directory / MANIFEST, [data.replace(BLANK.encode(), sealed["self_sha256"].encode(), 1)])
    return sealed


def read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest of a finished directory of shards. Raises ValueError naming it where it is absent or damaged."""
    path = directory / MANIFEST
    if not path.is_file():
        hint = "mm shard was interrupted; run it again" if (directory / UNFINISHED).is_dir() else "write one: mm shard"
        raise ValueError(f"{directory}: no {MANIFEST}, so no finished directory of shards ({hint})")
    return parse_manifest(path.read_bytes(), str(path))


def parse_manifest(data: bytes, where: str) -> dict[str, Any]:
    """The manifest in a file's bytes. Raises ValueError, beginning with `where`, for anything else."""
    manifest = unseal(data, where, (FORMAT, UNSEALED), "write the shards again")
    _check(manifest, where)
    return manifest


def unseal(data: bytes, where: str, formats: Sequence[str], mend: str) -> dict[str, Any]:
    """The manifest in a file's bytes, of one of the `formats`, with the hash that is in it.

    Raises ValueError, beginning with `where` and ending with how to mend it, for anything else.
    """
    try:
        manifest = json.loads(data)
    except ValueError:
        raise ValueError(f"{where}: not JSON; {mend}") from None
    if not isinstance(manifest, dict) or manifest.get("format") not in formats:
        raise ValueError(f"{where}: not a manifest of format {formats[0]}")
    if manifest["format"] != UNSEALED:
        seal = str(manifest.get("self_sha256"))
        blank = data.replace(seal.encode(), BLANK.encode(), 1)
        if len(seal) != len(BLANK) or hashlib.sha256(blank).hexdigest() != seal:
            raise ValueError(f"{where}: damaged (its SHA-256 differs from the one in it); {mend}")
    return manifest


def damaged_files(directory: Path, manifest: dict[str, Any]) -> list[str]:
    """One line for each file that is missing or whose SHA-256 is not the manifest's, in the manifest's order."""
    found = []
    for shard in manifest["shards"]:
        for name, digest in ((shard["file"], shard["sha256"]), (shard["index"], shard["index_sha256"])):
            path = directory / name
            if not path.is_file():
                found.append(f"{path}: missing")
            elif sha256_file(path) != digest:
                found.append(f"{path}: damaged (SHA-256 differs from the manifest's)")
    return found


def repeated_key(indexes: Sequence[Path]) -> str | None:
    """A key that two samples have, if any, over all of these indexes; in bounded memory, however many there are."""
    rounds = 1 + sum(len(read_index(path)) for path in indexes) // KEYS_AT_ONCE
    for number in range(rounds):
        found = []
        for path in indexes:
            hashes = _key_hashes(read_index(path)["key"])
            found.append(hashes[hashes % np.uint64(rounds) == number])
        values, counts = np.unique(np.concatenate(found), return_counts=True)
        for value in values[counts > 1]:
            seen: set[bytes] = set()
            for path in indexes:
                keys = read_index(path)["key"]
                for key in keys[_key_hashes(keys) == value].tolist():
                    if key in seen:
                        return key.decode(errors="replace")
                    seen.add(key)
    return None


def to_json(value: Any) -> bytes:
    return (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode()


def _key_hashes(keys: np.ndarray) -> np.ndarray:
    """(S,) uint64 of (S,) keys of 64 bytes."""
    result = np.zeros(len(keys), np.uint64)
    for column in np.ascontiguousarray(keys).view(np.uint64).reshape(len(keys), -1).T:
        result = (result ^ column) * np.uint64(0x9E3779B97F4A7C15)
        result ^= result >> np.uint64(32)
    return result


def _check(manifest: dict[str, Any], where: str) -> None:
    """A manifest may come from elsewhere: what is used as a file name or a number must be one."""
    shards = manifest.get("shards")
    if not isinstance(shards, list) or not shards:
        raise ValueError(f"{where}: key 'shards': expected a list of shards, got {shards!r:.80}")
    for number, shard in enumerate(shards):
        for key in ("file", "index", "sha256", "index_sha256"):
            value = shard.get(key) if isinstance(shard, dict) else None
            if not isinstance(value, str) or not NAME.fullmatch(value):
                raise ValueError(f"{where}: shard {number}: key {key!r}: not a plain name: {value!r:.80}")
        for key in COUNTS:
            if not isinstance(shard.get(key), int) or shard[key] < 0:
                raise ValueError(f"{where}: shard {number}: key {key!r}: not a count: {shard.get(key)!r:.80}")
