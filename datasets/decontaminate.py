"""Removal of training samples that hold what an evaluation set asks: runs of its words, or its media.

Text: any run of `words` words (13, as for GPT-3: Brown et al., 2020, appendix C) that a text of the evaluation set has;
a text of 8 to 12 words counts whole, a shorter one not at all. What stands in more than COMMON evaluation samples is a
template ("Answer with the option's letter ...") and does not count. Media: equal files, and images whose perceptual
hashes differ in at most `distance` bits.
"""

from __future__ import annotations

import io
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from mm.datasets.catalog import open_source
from mm.datasets.manifest import MANIFEST, read_manifest
from mm.datasets.shard_format import write_file
from mm.datasets.shard_reader import ShardDataset
from mm.datasets.similarity import distances, image_hash, media_hash, ngram_hashes, words
from mm.datasets.steps import Removed, Step, texts
from mm.types import Media, Sample

SHORTEST = 8  # words
COMMON = 10  # evaluation samples


@dataclass(frozen=True)
class Decontaminate(Step):
    """Removes samples that share text or media with evaluation sets.

    sets  each a finished directory of shards, or a source as `mm shard` takes it ("NAME:PATH")

    Raises ValueError, as `open_source` and `read_manifest` do, for a set that is not there.
    """

    sets: tuple[str, ...]
    words: int = 13
    distance: int = 3
    file: Path | None = None  # of the sets' fingerprints; set by `prepare`

    def __post_init__(self) -> None:
        if self.words < SHORTEST:
            raise ValueError(
                f"decontamination by {self.words} words: expected {SHORTEST} or more; fewer are no evidence"
            )

    def describe(self) -> dict[str, Any]:
        held = {name: _fingerprint(name) for name in self.sets}
        return {"decontaminate": {"sets": held, "words": self.words, "distance": self.distance}}

    def prepare(self, folder: Path) -> Decontaminate:
        file = folder / "evaluation.npz"
        if not file.exists():
            data = io.BytesIO()
            np.savez(data, **_collect(self.sets, self.words))  # type: ignore[arg-type]
            write_file(file, [data.getvalue()])
        return replace(self, file=file)

    def __call__(self, sample: Sample) -> Sample:
        assert self.file is not None
        held = _load(self.file, self.file.stat().st_mtime_ns)
        for text in texts(sample):
            self._check_text(words(text), held)
        for item in sample.media:
            self._check_medium(item, held)
        return sample

    def _check_text(self, tokens: list[str], held: dict[str, np.ndarray]) -> None:
        for length in range(SHORTEST, self.words + 1):
            grams = held[f"grams_{length}"]
            if not len(grams):
                continue
            hashes = ngram_hashes(tokens, length)
            places = np.minimum(np.searchsorted(grams, hashes), len(grams) - 1)
            hits = np.flatnonzero(grams[places] == hashes)
            if len(hits):
                at = int(hits[0])
                owner = held["names"][held[f"owners_{length}"][places[at]]]
                raise Removed("evaluation text", f"{owner}: {' '.join(tokens[at : at + length])}")

    def _check_medium(self, item: Media, held: dict[str, np.ndarray]) -> None:
        same = np.flatnonzero(held["files"] == _short(media_hash(item)))
        if len(same):
            raise Removed("evaluation media", f"{held['names'][held['file_owners'][same[0]]]}: the same {item.kind}")
        if item.kind == "image" and len(held["images"]):
            value = image_hash(item)
            near = [] if value is None else np.flatnonzero(distances(value, held["images"]) <= self.distance)
            if len(near):
                owner = held["names"][held["image_owners"][near[0]]]
                raise Removed("evaluation media", f"{owner}: an image like {item.name!r}")


def _samples(name: str) -> Iterator[Sample]:
    if (Path(name) / MANIFEST).is_file():
        return iter(ShardDataset(name))
    return iter(open_source(name))


def _fingerprint(name: str) -> Any:
    if (Path(name) / MANIFEST).is_file():
        return [shard["sha256"] for shard in read_manifest(Path(name))["shards"]]
    return open_source(name).fingerprint()


def _collect(sets: tuple[str, ...], longest: int) -> dict[str, np.ndarray]:
    """Fingerprints of every text and medium of the sets, with the number of the sample that has it."""
    names: list[str] = []
    grams: dict[int, dict[int, list[int]]] = {length: defaultdict(list) for length in range(SHORTEST, longest + 1)}
    files: list[tuple[int, int]] = []
    images: list[tuple[int, int]] = []
    for name in sets:
        for sample in _samples(name):
            owner = len(names)
            names.append(f"{Path(name).name} {sample.key}")
            for text in texts(sample):
                tokens = words(text)
                length = min(len(tokens), longest)
                for value in set(ngram_hashes(tokens, length).tolist()) if length >= SHORTEST else ():
                    owners = grams[length][value]
                    if len(owners) <= COMMON and (not owners or owners[-1] != owner):
                        owners.append(owner)
            for item in sample.media:
                files.append((int(_short(media_hash(item))), owner))
                value = image_hash(item) if item.kind == "image" else None
                if value is not None:
                    images.append((value, owner))
    found: dict[str, np.ndarray] = {"names": np.array(names, np.str_)}
    for length, held in grams.items():
        rare = sorted((value, owners[0]) for value, owners in held.items() if len(owners) <= COMMON)
        found[f"grams_{length}"] = np.array([value for value, _ in rare], np.uint64)
        found[f"owners_{length}"] = np.array([owner for _, owner in rare], np.int64)
    for name, listed in (("file", files), ("image", images)):
        found[f"{name}s"] = np.array([value for value, _ in listed], np.uint64)
        found[f"{name}_owners"] = np.array([owner for _, owner in listed], np.int64)
    return found


@lru_cache(maxsize=1)
def _load(file: Path, written: int) -> dict[str, np.ndarray]:
    """Read once a process; `written` tells two runs into one folder apart."""
    with np.load(file, allow_pickle=False) as held:
        return {name: held[name] for name in held.files}


def _short(digest: bytes) -> np.uint64:
    return np.uint64(int.from_bytes(digest[:8], "big"))
