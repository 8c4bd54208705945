"""Chunks together are the document, whatever it is made of."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mm.datasets.shards import write_shards
from mm.datasets.source import Samples
from mm.testing import tiny_tokenizer
from mm.tools.chunks import Chunk, Document, cut, read_documents, words
from mm.types import Sample

TOKENIZER = tiny_tokenizer()


@given(st.text(max_size=300), st.integers(2, 12), st.integers(0, 11), st.booleans())
def test_chunks_cover_the_document_and_overlap(text: str, size: int, overlap: int, by_words: bool) -> None:
    spans = words if by_words else TOKENIZER.spans
    overlap = min(overlap, size - 1)
    document = Document("here", "Title", text)
    chunks = list(cut(document, spans, size, overlap))
    covered = [False] * len(text)
    for chunk in chunks:
        assert text[chunk.start : chunk.start + len(chunk.text)] == chunk.text
        covered[chunk.start : chunk.start + len(chunk.text)] = [True] * len(chunk.text)
    assert all(seen or char.isspace() for seen, char in zip(covered, text, strict=True))
    starts = [chunk.start for chunk in chunks]
    assert starts == sorted(starts)


def test_a_chunk_has_at_most_so_many_tokens_and_the_next_repeats_some() -> None:
    text = " ".join(f"w{i}" for i in range(100))
    chunks = list(cut(Document("here", "", text), words, 20, 5))
    assert all(len(chunk.text.split()) <= 20 for chunk in chunks)
    for one, two in zip(chunks, chunks[1:], strict=False):
        assert 5 <= one.start + len(one.text) - two.start <= 5 * 5  # five words of up to four letters, as characters
        assert two.text.split()[:5] == one.text.split()[-5:]


def test_cuts_stand_before_words_where_tokens_are_smaller() -> None:
    text = "what colour is the shape? " * 20
    chunks = list(cut(Document("here", "", text), TOKENIZER.spans, 16, 4))
    assert len(chunks) > 5
    assert all(chunk.start == 0 or text[chunk.start].isspace() or text[chunk.start - 1].isspace() for chunk in chunks)


def test_spans_are_those_of_the_ids() -> None:
    text = "red é 😀 <|end|> blue"
    spans = TOKENIZER.spans(text)
    assert len(spans) == len(TOKENIZER.encode(text))
    assert (spans[0][0], spans[-1][1]) == (0, len(text))


@pytest.mark.parametrize(("size", "overlap"), [(1, 0), (4, 4), (4, -1)])
def test_sizes_that_cannot_be(size: int, overlap: int) -> None:
    with pytest.raises(ValueError, match="tokens with an overlap"):
        list(cut(Document("here", "", "a b"), words, size, overlap))


def test_what_is_shown_and_searched() -> None:
    chunk = Chunk("a.txt", "Heron", 10, "It eats fish.")
    assert chunk.indexed == "Heron\nIt eats fish."
    assert chunk.place == "Heron (a.txt, characters 10-23)"
    assert Chunk("a.txt", "", 0, "x").place == "a.txt, characters 0-1"


def test_documents_of_text_files_and_jsonl(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    (tmp_path / "b.jsonl").write_text(json.dumps({"title": "Heron", "text": "a bird"}) + "\n")
    assert [(d.title, d.text) for d in read_documents(tmp_path)] == [("", "one\ntwo"), ("Heron", "a bird")]
    assert [d.text for d in read_documents(tmp_path / "a.txt", by="line")] == ["one", "two"]
    assert "b.jsonl: line 1" in list(read_documents(tmp_path / "b.jsonl"))[0].source


def test_documents_of_shards(tmp_path: Path) -> None:
    samples = [
        Sample(
            "s1",
            [{"role": "user", "content": "what?"}, {"role": "assistant", "content": "a kiln"}],
            meta={"title": "K"},
        )
    ]
    write_shards(Samples(samples), tmp_path / "shards")
    (document,) = read_documents(tmp_path / "shards")
    assert (document.title, document.text) == ("K", "what?\na kiln")
    assert document.source.endswith(": s1")


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such file"):
        list(read_documents(tmp_path / "none"))
    (tmp_path / "a.jsonl").write_text('{"text": "half \\ud800"}\n')
    with pytest.raises(ValueError, match="a.jsonl: line 1: character 5 is half a surrogate pair"):
        list(read_documents(tmp_path / "a.jsonl"))
