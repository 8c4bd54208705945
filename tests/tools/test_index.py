"""An index finds what it should by each way, and notices every damage when it is opened."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest

from mm.tools.chunks import Document
from mm.tools.index import Index, build, fuse
from mm.tools.lexical import asked, fold


def titles(hits) -> list[str]:
    return [hit.chunk.title for hit in hits]


@pytest.mark.parametrize(
    ("question", "title"),
    [
        ("Which bird eats fish?", "Heron"),
        ("What do potters fire?", "Kiln"),
        ("what is a TARIFF", "Tariff"),
        ("Tell me about The Who.", "The Who"),
        ("When did the first cafe in Vienna open?", "Café"),
    ],
)
def test_words_find_the_document(index: Index, question: str, title: str) -> None:
    hits = index.search(question, 2)
    assert hits[0].chunk.title == title
    assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)


def test_question_words_do_not_count_unless_there_are_no_others(index: Index) -> None:
    assert asked("Who is the heron?") == ["heron"]
    assert asked("Who?") == ["who"]
    assert fold("Café ÉTÉ straße x_1") == ["cafe", "ete", "strasse", "x_1"]
    assert titles(index.search("who?")) == ["The Who"]


def test_nothing_is_found_where_no_word_is_known(index: Index) -> None:
    assert index.search("xylophone") == []
    assert index.search("  ") == []


def test_vectors_find_the_same_text_and_the_kind_like_it(folder: Path, letters) -> None:
    index = Index.load(folder, letters)
    assert index.ways == ("hybrid", "bm25", "dense")
    text = index.search("heron", 1, "bm25")[0].chunk.indexed
    (hit,) = index.search(text, 1, "dense")
    assert (hit.chunk.title, round(hit.score, 4)) == ("Heron", 1.0)
    assert len(index.search("a", 99, "dense")) == len(index) == 5


def test_hybrid_is_the_fusion_of_both(folder: Path, letters) -> None:
    index = Index.load(folder, letters)
    query = "clay pottery"
    rankings = [[hit.number for hit in index.search(query, 100, way)] for way in ("bm25", "dense")]
    assert [(hit.number, hit.score) for hit in index.search(query, 5, "hybrid")] == fuse(rankings)[:5]
    assert index.search(query, 5) == index.search(query, 5, "hybrid")


def test_fusion_prefers_what_both_rank_high() -> None:
    fused = fuse([[1, 2, 3], [2, 3, 4]])
    assert [item for item, _ in fused] == [2, 3, 1, 4]
    assert [score for _, score in fused] == pytest.approx([1 / 62 + 1 / 61, 1 / 63 + 1 / 62, 1 / 61, 1 / 63])


def test_vectors_are_centred(folder: Path, tmp_path: Path) -> None:
    """A common direction, far longer than what differs, does not hide it."""

    class Shifted:
        kind = "shifted"

        def __call__(self, texts):
            own = {"north": [1, 0, 0], "south": [-1, 0, 0], "east": [0, 1, 0]}
            return np.array([[1000, 1000, 1000] + np.array(own.get(text, [0, 0, 1])) for text in texts], np.float32)

    build([Document("d", "", text) for text in ("north", "south", "east")], tmp_path / "i", embed=Shifted())
    index = Index.load(tmp_path / "i", Shifted())
    hits = index.search("north", 3, "dense")
    assert hits[0].chunk.text == "north"
    assert hits[0].score > 0.9 and hits[1].score < 0.5


def test_ways_and_numbers_that_cannot_be(index: Index) -> None:
    with pytest.raises(ValueError, match="way='dense': this index can be searched by bm25"):
        index.search("heron", 5, "dense")
    with pytest.raises(ValueError, match="k=0"):
        index.search("heron", 0)


def test_a_built_index_is_the_same_bytes_again(tmp_path: Path, documents, letters) -> None:
    for name in ("one", "two"):
        build(documents, tmp_path / name, embed=letters)
    assert (tmp_path / "one/manifest.json").read_bytes() == (tmp_path / "two/manifest.json").read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["one", "two"]


def test_every_damaged_or_missing_file_is_named(folder: Path) -> None:
    for file in sorted(folder.iterdir()):
        data = file.read_bytes()
        file.write_bytes(data[:-2] + bytes([data[-2] ^ 1]) + data[-1:])
        with pytest.raises(ValueError, match=f"{file.name}: (damaged|not JSON|not a manifest)"):
            Index.load(folder)
        file.unlink()
        with pytest.raises(
            ValueError, match="no manifest.json" if file.name == "manifest.json" else f"{file.name}: mis"
        ):
            Index.load(folder)
        file.write_bytes(data)
    Index.load(folder)


def test_another_embedding_is_refused(folder: Path, letters) -> None:
    class Other:
        kind = "letters"

        def __call__(self, texts):
            return letters([text[::2] for text in texts])[:, ::-1].copy()

    with pytest.raises(ValueError, match="are of another model"):
        Index.load(folder, Other())


def test_an_index_without_vectors_takes_no_embedding(tmp_path: Path, documents, letters) -> None:
    build(documents, tmp_path / "index")
    with pytest.raises(ValueError, match="has no vectors"):
        Index.load(tmp_path / "index", letters)


def test_nothing_is_left_of_a_build_that_fails(tmp_path: Path, documents) -> None:
    def broken():
        yield documents[0]
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        build(broken(), tmp_path / "index")
    with pytest.raises(ValueError, match="no document has any text"):
        build([Document("d", "", "  ")], tmp_path / "index")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_there_is_not_written_over(folder: Path, documents) -> None:
    with pytest.raises(ValueError, match="there is something already"):
        build(documents, folder)


def test_the_leavings_of_a_killed_build_are_swept(tmp_path: Path, documents) -> None:
    (tmp_path / ".index.unfinished").mkdir()
    (tmp_path / ".index.unfinished" / "half").write_text("x")
    build(documents, tmp_path / "index")
    assert os.listdir(tmp_path) == ["index"]


def test_a_manifest_names_no_file_elsewhere(folder: Path) -> None:
    from mm.datasets.manifest import write_manifest

    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["sha256"]["../index/chunks.jsonl"] = manifest["sha256"]["chunks.jsonl"]
    write_manifest(folder, {**manifest, "self_sha256": "0" * 64})
    with pytest.raises(ValueError, match="missing"):
        Index.load(folder)


@pytest.mark.parametrize(("package", "embeds"), [("bm25s", False), ("faiss", True)])
def test_a_missing_package_is_named(tmp_path: Path, documents, letters, monkeypatch, package: str, embeds) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=r"pip install 'mm\[retrieval\]'"):
        build(documents, tmp_path / "index", embed=letters if embeds else None)
