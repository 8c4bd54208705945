"""Search by words: BM25 (Robertson and Zaragoza, 2009) over sparse matrices, by bm25s."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

WORD = re.compile(r"\w+")
# What questions are made of. They are left out of a query that has other words: in a text that only states things,
# "what" and "who" are rare, and would weigh more than what is asked about.
QUESTION = frozenset(
    "a an and are as at be been but by can could did do does for from give had has have how i if in into is it its me "
    "my no not of on or please s tell that the their them then there these they this to was we were what when where "
    "which who whom whose why will with would you your about describe explain".split()
)


def fold(text: str) -> list[str]:
    """The words of a text, in order: lower case, without accents."""
    plain = unicodedata.normalize("NFKD", text.casefold())
    return WORD.findall("".join(char for char in plain if not unicodedata.combining(char)))


def asked(query: str) -> list[str]:
    """The words of a query that say what it is about; all of them where that leaves none."""
    found = fold(query)
    return [word for word in found if word not in QUESTION] or found


class Lexical:
    """A BM25 index (k1 = 1.5, b = 0.75, Lucene's idf) whose items are numbered from 0 as they came."""

    def __init__(self, index: Any, count: int) -> None:
        self._index, self.count = index, count

    @staticmethod
    def of(texts: Iterable[str]) -> Lexical:
        corpus = [fold(text) or [""] for text in texts]  # bm25s takes no document without words
        index = bm25s_package().BM25(k1=1.5, b=0.75, method="lucene")
        index.index(corpus, show_progress=False)
        return Lexical(index, len(corpus))

    def search(self, query: str, k: int) -> list[tuple[int, float]]:
        """(item, score) of the best `k` that share a word with the query, best first; equals in their order."""
        known = [word for word in dict.fromkeys(asked(query)) if word in self._index.vocab_dict]
        if not known:
            return []
        scores = np.asarray(self._index.get_scores(known))
        best = np.argsort(-scores, kind="stable")[:k]
        return [(int(item), float(scores[item])) for item in best if scores[item] > 0]

    def save(self, folder: Path) -> list[str]:
        """Writes the index; returns the names of its files."""
        before = set(folder.iterdir())
        self._index.save(folder)
        return sorted(file.name for file in set(folder.iterdir()) - before)

    @staticmethod
    def load(folder: Path, count: int) -> Lexical:
        return Lexical(bm25s_package().BM25.load(folder, load_corpus=False), count)


def bm25s_package() -> Any:
    """The package, or a ValueError that says how to install it."""
    try:
        import bm25s
    except ImportError as error:
        raise ValueError("an index needs the package bm25s: pip install 'mm[retrieval]'") from error
    return bm25s
