"""Removal of samples that an earlier one of the same data set has said or shown already.

    scan    each chunk of records -> the fingerprints of its samples, in any process and order
    decide  the fingerprints in order -> which samples go, and because of which: the first of its kind stays

The samples seen so far are an SQLite file, not memory: fingerprints are cut into bands, alike ones share at least one
band, and only those that do are compared (locality-sensitive hashing).
"""

from __future__ import annotations

import hashlib
import io
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mm.datasets.shard_format import write_file
from mm.datasets.similarity import PERMUTATIONS, content_hash, distances, image_hash, media_hash, text_signature
from mm.datasets.steps import texts
from mm.types import Sample

KINDS = ("exact", "images", "text")
RECALL = 0.98  # of text pairs just as alike as the threshold, the share that become candidates


@dataclass(frozen=True)
class Dedupe:
    """What counts as a duplicate; any of these is enough.

    exact   the same messages, branches and bytes of media
    images  a sample with images, all of which were seen before, whatever is said about them: their perceptual hashes
            differ in at most `distance` of 64 bits; flat images only if their files are equal
    text    a sample without media whose text is like an earlier one's: the Jaccard index of their runs of five words,
            as MinHash estimates it, is at least `similarity`
    """

    kinds: tuple[str, ...] = ("exact",)
    distance: int = 3
    similarity: float = 0.8

    def __post_init__(self) -> None:
        for kind in self.kinds:
            if kind not in KINDS:
                raise ValueError(f"--dedupe {kind!r}: expected one or several of {', '.join(KINDS)}")
        if not 0 <= self.distance <= 15:
            raise ValueError(f"--image-distance {self.distance}: expected 0 to 15 bits")
        if not 0.3 <= self.similarity <= 1:
            raise ValueError(f"--text-similarity {self.similarity:g}: expected 0.3 to 1")

    def describe(self) -> dict[str, Any]:
        found: dict[str, Any] = {"kinds": list(self.kinds)}
        if "images" in self.kinds:
            found["distance"] = self.distance
        if "text" in self.kinds:
            found["similarity"] = self.similarity
        return found


@dataclass
class Fingerprints:
    """Those of the samples of one chunk.

    number  (S,) int64 place of the sample's record      key   (S,) str
    content (S, 16) uint8                                owner (I,) int64 row of each image's sample
    images  (I,) uint64 perceptual hash, or a hash of the file where `flat` (I,) bool
    text    (S, PERMUTATIONS) uint32, zeros where there is nothing to compare
    """

    number: list[int] = field(default_factory=list)
    key: list[str] = field(default_factory=list)
    content: list[np.ndarray] = field(default_factory=list)
    owner: list[int] = field(default_factory=list)
    images: list[int] = field(default_factory=list)
    flat: list[bool] = field(default_factory=list)
    text: list[np.ndarray] = field(default_factory=list)

    def add(self, number: int, sample: Sample, kinds: tuple[str, ...]) -> None:
        images = [item for item in sample.media if item.kind == "image"]
        hashes = [image_hash(item) for item in images] if "images" in kinds else []
        files = [int.from_bytes(media_hash(item)[:8], "big") for item in images] if "images" in kinds else []
        plain = "text" in kinds and not sample.media
        signature = text_signature("\n".join(texts(sample))) if plain else None
        content = content_hash(sample) if "exact" in kinds else bytes(16)
        self.owner += [len(self.number)] * len(hashes)
        self.images += [file if found is None else found for found, file in zip(hashes, files, strict=True)]
        self.flat += [found is None for found in hashes]
        self.number.append(number)
        self.key.append(sample.key)
        self.content.append(np.frombuffer(content, np.uint8))
        self.text.append(np.zeros(PERMUTATIONS, np.uint32) if signature is None else signature)

    def save(self, path: Path) -> None:
        data = io.BytesIO()
        np.savez(
            data,
            number=np.array(self.number, np.int64),
            key=np.array(self.key, np.str_),
            content=np.array(self.content, np.uint8).reshape(-1, 16),
            owner=np.array(self.owner, np.int64),
            images=np.array(self.images, np.uint64),
            flat=np.array(self.flat, np.bool_),
            text=np.array(self.text, np.uint32).reshape(-1, PERMUTATIONS),
        )
        write_file(path, [data.getvalue()])


def decide(scans: Iterator[Path], settings: Dedupe, folder: Path) -> Iterator[dict[str, list[str]]]:
    """For each scan, in order: number of a record -> [reason, detail] of the samples that go."""
    file = folder / "seen.sqlite"
    file.unlink(missing_ok=True)
    database = sqlite3.connect(file)
    try:
        seen = _Seen(database, settings)
        for path in scans:
            with np.load(path, allow_pickle=False) as scan:
                yield _decide(seen, {name: scan[name] for name in scan.files})
    finally:
        database.close()
        file.unlink(missing_ok=True)


def _decide(seen: _Seen, scan: dict[str, np.ndarray]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for row, number in enumerate(scan["number"].tolist()):
        own = scan["owner"] == row
        images = list(zip(scan["images"][own].tolist(), scan["flat"][own].tolist(), strict=True))
        content, text = scan["content"][row].tobytes(), scan["text"][row]
        reason = seen.find(content, images, text)
        if reason is None:
            seen.add(str(scan["key"][row]), content, images, text)
        else:
            found[str(number)] = reason
    return found


class _Seen:
    """The samples that stay, by their fingerprints."""

    def __init__(self, database: sqlite3.Connection, settings: Dedupe) -> None:
        self.database, self.settings = database, settings
        self.rows = _rows(settings.similarity)
        for line in (  # a scratch file: nothing in it outlives a crash, or needs to
            "PRAGMA journal_mode = OFF",
            "PRAGMA synchronous = OFF",
            "PRAGMA cache_size = -65536",
            "CREATE TABLE sample (id INTEGER PRIMARY KEY, key TEXT, text BLOB)",
            "CREATE TABLE content (hash BLOB PRIMARY KEY, id INTEGER) WITHOUT ROWID",
            "CREATE TABLE image (band INTEGER, value INTEGER, hash BLOB, id INTEGER)",
            "CREATE INDEX image_band ON image (band, value)",
            "CREATE TABLE text (band INTEGER, value INTEGER, id INTEGER)",
            "CREATE INDEX text_band ON text (band, value)",
        ):
            database.execute(line)
        self.count = 0

    def find(self, content: bytes, images: list[tuple[int, bool]], text: np.ndarray) -> list[str] | None:
        """[reason, detail] if a sample like this one stays already."""
        kinds = self.settings.kinds
        if "exact" in kinds:
            same = self.database.execute("SELECT id FROM content WHERE hash = ?", (content,)).fetchone()
            if same:
                return ["duplicate", f"same as {self._key(same[0])}"]
        if "images" in kinds and images:
            alike = [self._image(value, flat) for value, flat in images]
            if all(one is not None for one in alike):
                return ["images seen before", f"in {', '.join(dict.fromkeys(self._key(one) for one in alike))}"]
        if "text" in kinds and text.any():
            return self._text(text)
        return None

    def add(self, key: str, content: bytes, images: list[tuple[int, bool]], text: np.ndarray) -> None:
        kinds, run = self.settings.kinds, self.database.execute
        self.count += 1
        stored = text.tobytes() if "text" in kinds and text.any() else None
        run("INSERT INTO sample VALUES (?, ?, ?)", (self.count, key, stored))
        if "exact" in kinds:
            run("INSERT OR IGNORE INTO content VALUES (?, ?)", (content, self.count))
        for value, flat in images:
            for band, part in self._image_bands(value, flat):
                run("INSERT INTO image VALUES (?, ?, ?, ?)", (band, part, value.to_bytes(8, "big"), self.count))
        if stored is not None:
            for band, part in self._text_bands(text):
                run("INSERT INTO text VALUES (?, ?, ?)", (band, part, self.count))

    def _image(self, value: int, flat: bool) -> int | None:
        """A sample with an image like this one."""
        for band, part in self._image_bands(value, flat):
            query = "SELECT hash, id FROM image WHERE band = ? AND value = ? ORDER BY id"
            rows = self.database.execute(query, (band, part)).fetchall()
            if rows:
                others = np.frombuffer(b"".join(row[0] for row in rows), ">u8").astype(np.uint64)
                near = np.flatnonzero(distances(value, others) <= (0 if flat else self.settings.distance))
                if len(near):
                    return rows[int(near[0])][1]
        return None

    def _text(self, signature: np.ndarray) -> list[str] | None:
        candidates: set[int] = set()
        for band, part in self._text_bands(signature):
            rows = self.database.execute("SELECT id FROM text WHERE band = ? AND value = ?", (band, part))
            candidates.update(row[0] for row in rows)
        for number in sorted(candidates):
            [stored] = self.database.execute("SELECT text FROM sample WHERE id = ?", (number,)).fetchone()
            share = float((np.frombuffer(stored, np.uint32) == signature).mean())
            if share >= self.settings.similarity:
                return ["near-duplicate text", f"{share:.2f} like {self._key(number)}"]
        return None

    def _key(self, number: int | None) -> str:
        return self.database.execute("SELECT key FROM sample WHERE id = ?", (number,)).fetchone()[0]

    def _image_bands(self, value: int, flat: bool) -> Iterator[tuple[int, int]]:
        """d + 1 parts of the hash: of two hashes that differ in d bits, one part at least is the same in both."""
        if flat:
            yield -1, value >> 1  # SQLite's integers have a sign
            return
        parts = self.settings.distance + 1
        for band in range(parts):
            low, high = 64 * band // parts, 64 * (band + 1) // parts
            yield band, (value >> low & ((1 << high - low) - 1)) >> (1 if high - low == 64 else 0)

    def _text_bands(self, signature: np.ndarray) -> Iterator[tuple[int, int]]:
        for band in range(PERMUTATIONS // self.rows):
            part = signature[band * self.rows : (band + 1) * self.rows].tobytes()
            yield band, int.from_bytes(hashlib.blake2b(part, digest_size=7).digest(), "big")


def _rows(similarity: float) -> int:
    """The longest bands with which texts as alike as `similarity` still become candidates with probability RECALL."""
    fitting = [r for r in range(1, 33) if 1 - (1 - similarity**r) ** (PERMUTATIONS // r) >= RECALL]
    return max(fitting)
