"""An index of documents on disk: built once, checked when it is opened, searched by words, vectors, or both.

    chunks.jsonl (one chunk a line)   lines.npy (where each begins)   BM25's files   vectors.faiss, centre.npy
    manifest.json (SHA-256 of each file and of itself)

It is made in a folder beside the final one, which then takes the name: a folder with a manifest is whole.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

import mm
from mm.datasets.manifest import MANIFEST, unseal, write_manifest
from mm.datasets.shard_format import sync_folder, write_file
from mm.datasets.source import sha256_file
from mm.tools.chunks import Chunk, Document, Spans, check_sizes, cut, words
from mm.tools.dense import Dense, Embed, faiss_package
from mm.tools.lexical import Lexical, bm25s_package

FORMAT = "mm-index-1"
CHUNKS, LINES = "chunks.jsonl", "lines.npy"
Way = Literal["bm25", "dense", "hybrid"]
FUSION = 60  # reciprocal rank fusion's constant (Cormack, Clarke and Buettcher 2009)
DEPTH = 100  # how far each of two rankings is read before they are joined
AT_ONCE = 256  # chunks that are embedded together
MEND = "build the index again"


@dataclass(frozen=True)
class Hit:
    """A chunk that was found, its number in the index, and its score: BM25's, a cosine, or a sum of 1 / (60 + rank)."""

    number: int
    chunk: Chunk
    score: float


class Index:
    """`ways` are those that it can be searched by: "dense" and "hybrid" where it was opened with an `embed`."""

    def __init__(self, chunks: _Chunks, lexical: Lexical, dense: Dense | None, manifest: dict[str, Any]) -> None:
        self._chunks, self._lexical, self._dense = chunks, lexical, dense
        self.manifest = manifest
        self.ways: tuple[Way, ...] = ("bm25",) if dense is None else ("hybrid", "bm25", "dense")

    def __len__(self) -> int:
        return len(self._chunks)

    def search(self, query: str, k: int = 5, way: Way | None = None) -> list[Hit]:
        """The best `k` chunks, best first; `way` None is the first of `ways`. Raises ValueError for one it has not."""
        way = way or self.ways[0]
        if way not in self.ways:
            raise ValueError(f"way={way!r}: this index can be searched by {', '.join(self.ways)}")
        if k < 1:
            raise ValueError(f"k={k}: give a whole number from 1 up")
        if not query.strip():
            return []
        found = list(self._rankings(query, k, way))
        best = found[0] if len(found) == 1 else fuse([[item for item, _ in ranking] for ranking in found])
        return [Hit(item, self._chunks[item], score) for item, score in best[:k]]

    def _rankings(self, query: str, k: int, way: Way) -> Iterator[list[tuple[int, float]]]:
        depth = k if way != "hybrid" else max(k, DEPTH)
        if way != "dense":
            yield self._lexical.search(query, depth)
        if way != "bm25":
            assert self._dense is not None
            yield self._dense.search(query, depth)

    @staticmethod
    def load(folder: str | Path, embed: Embed | None = None) -> Index:
        """Opens an index. Without `embed` it is searched by words alone, whether or not it has vectors.

        Raises ValueError naming the folder or the file: no manifest, a file that is missing or damaged, an `embed` that
        is not what made the vectors, or an index without any.
        """
        folder = Path(folder)
        manifest = _verified(folder)
        count, vectors = manifest["chunks"], manifest["vectors"]
        dense = None
        if embed is not None:
            if vectors is None:
                raise ValueError(f"{folder}: this index has no vectors; build it with --model, or search by words")
            dense = Dense.load(folder, count, vectors["kind"], embed)
        return Index(_Chunks(folder, count), Lexical.load(folder, count), dense, manifest)


def fuse(rankings: Sequence[Sequence[int]]) -> list[tuple[int, float]]:
    """(item, sum over rankings of 1 / (60 + rank)), best first; of equals, the one that a ranking names first."""
    scores: dict[int, float] = {}
    for ranking in rankings:
        for rank, item in enumerate(ranking, start=1):
            scores[item] = scores.get(item, 0.0) + 1 / (FUSION + rank)
    return sorted(scores.items(), key=lambda entry: -entry[1])


def build(
    documents: Iterable[Document],
    folder: str | Path,
    spans: Spans = words,
    size: int = 256,
    overlap: int = 32,
    embed: Embed | None = None,
    settings: dict[str, Any] | None = None,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Writes an index of the documents' chunks to a new `folder` and returns its manifest.

    `spans` says what a token is (`size` and `overlap` count them); with `embed`, there are vectors too. `settings` go
    into the manifest; `progress` is told how many chunks are done. Raises ValueError where the folder exists, or no
    document has a word.
    """
    check_sizes(size, overlap)
    packages = {"bm25s": bm25s_package()} | ({} if embed is None else {"faiss": faiss_package()})
    folder = Path(folder)
    if folder.exists():
        raise ValueError(f"{folder}: there is something already; give another directory, or remove it")
    unfinished = folder.with_name(f".{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)  # of a build that was cut off
    unfinished.mkdir(parents=True)
    try:
        about: dict[str, Any] = {"format": FORMAT, "size": size, "overlap": overlap, **(settings or {})}
        about |= _write(unfinished, (cut(document, spans, size, overlap) for document in documents), embed, progress)
        about["versions"] = {"mm": mm.__version__, **{name: str(p.__version__) for name, p in packages.items()}}
        manifest = write_manifest(unfinished, about)
        unfinished.rename(folder)
        sync_folder(folder.parent)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    return manifest


def _write(
    folder: Path, documents: Iterable[Iterator[Chunk]], embed: Embed | None, progress: Callable[[int], None] | None
) -> dict[str, Any]:
    """All files but the manifest; returns their hashes and counts. Texts and vectors are in memory, all of them."""
    indexed: list[str] = []
    vectors: list[np.ndarray] = []
    lengths: list[int] = []

    def lines() -> Iterator[bytes]:
        chunks = itertools.chain.from_iterable(documents)
        while batch := list(itertools.islice(chunks, AT_ONCE)):
            texts = [chunk.indexed for chunk in batch]
            indexed.extend(texts)
            if embed is not None:
                vectors.append(embed(texts))
            for chunk in batch:
                line = json.dumps(asdict(chunk), ensure_ascii=False).encode() + b"\n"
                lengths.append(len(line))
                yield line
            if progress is not None:
                progress(len(indexed))

    write_file(folder / CHUNKS, lines())
    if not indexed:
        raise ValueError("no document has any text; there is nothing to index")
    np.save(folder / LINES, np.cumsum([0, *lengths], dtype=np.int64), allow_pickle=False)
    names = [CHUNKS, LINES, *Lexical.of(indexed).save(folder)]
    if embed is not None:
        names += Dense.of(np.concatenate(vectors), embed).save(folder)
    for name in names:
        _sync(folder / name)
    return {
        "chunks": len(indexed),
        "vectors": None if embed is None else {"kind": embed.kind, "dim": int(vectors[0].shape[1])},
        "sha256": {name: sha256_file(folder / name) for name in names},
    }


def embedding_of(folder: Path) -> str | None:
    """How the vectors of an index were made; None where it has none. Raises ValueError for what is no index."""
    vectors = _manifest(folder)["vectors"]
    return None if vectors is None else vectors["kind"]


def _manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    if not path.is_file():
        raise ValueError(f"{folder}: no {MANIFEST}, so no finished index; make one: mm index SOURCE --out {folder}")
    return unseal(path.read_bytes(), str(path), (FORMAT,), MEND)


def _verified(folder: Path) -> dict[str, Any]:
    manifest = _manifest(folder)
    for name, digest in manifest["sha256"].items():
        if Path(name).name != name or not (folder / name).is_file():
            raise ValueError(f"{folder / name}: missing; {MEND}")
        if sha256_file(folder / name) != digest:
            raise ValueError(f"{folder / name}: damaged (SHA-256 differs from the manifest's); {MEND}")
    return manifest


def _sync(file: Path) -> None:
    with file.open("rb") as handle:
        os.fsync(handle.fileno())


class _Chunks:
    """Chunks by number, read from the file when asked for. Safe to share between threads."""

    def __init__(self, folder: Path, count: int) -> None:
        self._ends = np.load(folder / LINES, allow_pickle=False)
        if len(self._ends) != count + 1:
            raise ValueError(f"{folder / LINES}: {len(self._ends) - 1} chunks, the manifest says {count}; {MEND}")
        self._file = (folder / CHUNKS).open("rb")

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, number: int) -> Chunk:
        start, end = self._ends[number : number + 2].tolist()
        return Chunk(**json.loads(os.pread(self._file.fileno(), end - start, start)))
