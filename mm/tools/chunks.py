"""Documents cut into chunks: pieces of at most so many tokens that overlap, each with the place that it is from."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mm.datasets.manifest import MANIFEST
from mm.datasets.shard_reader import ShardDataset
from mm.datasets.sources.text import Text
from mm.datasets.vocabulary import texts_of
from mm.types import Sample

Spans = Callable[[str], list[tuple[int, int]]]  # text -> first and last + 1 character of each token
LOOK_BACK = 4  # a cut moves back by at most this part of a chunk, to where a word begins


@dataclass(frozen=True)
class Document:
    """A text, where it is from (a file and line, a shard and key), and its title, if it has one."""

    source: str
    title: str
    text: str


@dataclass(frozen=True)
class Chunk:
    """A piece of a document: `text` stands at characters `start` to `start + len(text)` of it."""

    source: str
    title: str
    start: int
    text: str

    @property
    def indexed(self) -> str:
        """What is searched: a title says what a piece from the middle is about."""
        return f"{self.title}\n{self.text}" if self.title else self.text

    @property
    def place(self) -> str:
        """How a source is shown."""
        where = f"{self.source}, characters {self.start}-{self.start + len(self.text)}"
        return f"{self.title} ({where})" if self.title else where


def words(text: str) -> list[tuple[int, int]]:
    """The spans of words, for who has no tokenizer: runs without white space."""
    return [match.span() for match in re.finditer(r"\S+", text)]


def cut(document: Document, spans: Spans, size: int, overlap: int) -> Iterator[Chunk]:
    """Chunks of at most `size` tokens that together are the whole document; each repeats up to `overlap` tokens of the
    one before. Cuts stand before words where one begins nearby. Raises ValueError for sizes that cannot be."""
    check_sizes(size, overlap)
    text = document.text
    tokens = spans(text)
    first = 0
    while first < len(tokens):
        last = first + size
        if last < len(tokens):
            last = _word_start(text, tokens, last, max(last - size // LOOK_BACK, first + overlap + 1))
        start = tokens[first][0] if first else 0
        end = tokens[last][0] if last < len(tokens) else len(text)
        if text[start:end].strip():
            yield Chunk(document.source, document.title, start, text[start:end])
        if last >= len(tokens):
            return
        first = _word_start(text, tokens, last - overlap, max(last - overlap - overlap // LOOK_BACK, first + 1))


def check_sizes(size: int, overlap: int) -> None:
    if size < 2 or not 0 <= overlap < size:
        raise ValueError(
            f"chunks of {size} tokens with an overlap of {overlap}: want at least 2 tokens, and fewer shared"
        )


def _word_start(text: str, tokens: list[tuple[int, int]], at: int, lowest: int) -> int:
    """The last token in `lowest`..`at` that begins a word; `at` where none does."""
    for number in range(at, lowest - 1, -1):
        start = tokens[number][0]
        if start and (text[start].isspace() or text[start - 1].isspace()):
            return number
    return at


def read_documents(path: Path, key: str = "text", by: Literal["file", "line"] = "file") -> Iterator[Document]:
    """The documents of a folder of shards, or of .txt, .md and .jsonl files (as the source `text` reads them).

    The title is the key "title" of a JSONL record or of a sample's meta. Raises ValueError naming what cannot be read.
    """
    if (path / MANIFEST).is_file():
        shards = ShardDataset(path)
        for number in range(len(shards)):
            yield _document(f"{shards.locate(number)['shard']}: {shards.locate(number)['key']}", shards[number])
        return
    if not path.exists():
        raise ValueError(f"{path}: there is no such file or folder")
    texts = Text(path, by=by, key=key, keep=("title",))
    for record in texts.records():
        yield _document(record.where, texts.sample(record))


def _document(where: str, sample: Sample) -> Document:
    text = "\n".join(texts_of(sample))
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{where}: character {error.start} is half a surrogate pair, which is not text") from None
    return Document(where, str(sample.meta.get("title") or ""), text)
