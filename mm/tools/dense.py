"""Search by vectors: the nearest by cosine, exactly, by FAISS.

Vectors of a language model all point much the same way, and what they share says nothing: their mean is taken off
before they are compared (Mu and Viswanath 2018, arXiv 1702.01417). Shape legend: `n` items, `D` dimensions.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

VECTORS, CENTRE = "vectors.faiss", "centre.npy"
CHECK = "How far is it from the Earth to the Moon?"  # embedded when an index is made and when it is opened
OTHER = "open it with the one that made it, or make an index by words: mm index without --model"
SAME = 0.99  # cosine of the two: less precision and other devices stay above it, another model does not


class Embed(Protocol):
    """Texts -> (n, D) float32; `kind` says how."""

    @property
    def kind(self) -> str: ...
    def __call__(self, texts: Sequence[str]) -> np.ndarray: ...


class Dense:
    """Items numbered from 0 as they came. `centre` (2, D): the mean of all vectors, and the vector of CHECK."""

    def __init__(self, index: Any, centre: np.ndarray, embed: Embed) -> None:
        self._index, self._centre, self._embed = index, centre, embed

    @staticmethod
    def of(vectors: np.ndarray, embed: Embed) -> Dense:
        """From (n, D) float32 vectors. Raises ValueError for vectors that are not finite."""
        if not np.isfinite(vectors).all():
            item = int(np.flatnonzero(~np.isfinite(vectors).all(1))[0])
            raise ValueError(f"the embedding of chunk {item} is not finite; the model's weights are damaged")
        centre = np.stack([vectors.mean(0), embed([CHECK])[0]]).astype(np.float32)
        index: Any = faiss_package().IndexFlatIP(vectors.shape[1])
        index.add(_unit(vectors - centre[0]))
        return Dense(index, centre, embed)

    def search(self, query: str, k: int) -> list[tuple[int, float]]:
        """(item, cosine) of the nearest `k`, nearest first."""
        vector = _unit(self._embed([query]) - self._centre[0])
        scores, items = self._index.search(vector, min(k, self._index.ntotal))
        return [(int(item), float(score)) for item, score in zip(items[0], scores[0], strict=True)]

    def save(self, folder: Path) -> list[str]:
        """Writes the index; returns the names of its files."""
        faiss_package().write_index(self._index, str(folder / VECTORS))
        np.save(folder / CENTRE, self._centre, allow_pickle=False)
        return [VECTORS, CENTRE]

    @staticmethod
    def load(folder: Path, count: int, kind: str, embed: Embed) -> Dense:
        """Raises ValueError where `embed` is not what made the vectors."""
        index: Any = faiss_package().read_index(str(folder / VECTORS))
        centre = np.load(folder / CENTRE, allow_pickle=False)
        if index.ntotal != count or centre.shape != (2, index.d):
            raise ValueError(f"{folder}: {index.ntotal} vectors of {index.d} for {count} chunks; build the index again")
        check = embed([CHECK])[0]
        same = embed.kind == kind and check.shape == centre[1].shape
        if not same or float(_unit(check[None])[0] @ _unit(centre[1:])[0]) < SAME:
            raise ValueError(f"{folder}: its vectors ({kind}) are of another model; {OTHER}")
        return Dense(index, centre, embed)


def _unit(vectors: np.ndarray) -> np.ndarray:
    """(n, D) float32 of length 1 (of length 0 where they were)."""
    length = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.ascontiguousarray(vectors / np.maximum(length, 1e-12), dtype=np.float32)


def faiss_package() -> Any:
    """The package, or a ValueError that says how to install it."""
    try:
        import faiss
    except ImportError as error:
        raise ValueError("an index with vectors needs the package faiss-cpu: pip install 'mm[retrieval]'") from error
    return faiss
