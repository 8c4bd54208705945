"""A few documents, an index of them, and an embedding that is a count of letters."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from mm.tools.chunks import Document
from mm.tools.index import Index, build

TEXTS = {
    "Heron": "The heron is a long-legged bird. It stands in shallow water and eats fish.",
    "Kiln": "A kiln is an oven in which clay becomes pottery. Potters fire it for days.",
    "Tariff": "A tariff is a tax on imported goods. Governments raise it at the border.",
    "The Who": "The Who are a rock band from London. Their drummer was Keith Moon.",
    "Café": "A café is a place to drink coffee. The first in Vienna opened in 1685.",
}


class LetterCounts:
    """(n, 26) how often each letter occurs."""

    kind = "letters"

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        counts = [[text.lower().count(chr(97 + i)) for i in range(26)] for text in texts]
        return np.array(counts, dtype=np.float32)


@pytest.fixture
def documents() -> list[Document]:
    return [Document("birds.jsonl: line 1", title, text) for title, text in TEXTS.items()]


@pytest.fixture
def folder(tmp_path: Path, documents: list[Document]) -> Path:
    build(documents, tmp_path / "index", embed=LetterCounts())
    return tmp_path / "index"


@pytest.fixture
def index(folder: Path) -> Index:
    return Index.load(folder)


@pytest.fixture
def letters() -> LetterCounts:
    return LetterCounts()
