"""`mm index` as a command, and the embeddings that it makes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import mm
from mm.cli import main
from mm.model import MultimodalModel
from mm.testing import tiny_model
from mm.tools.embeddings import EmbeddingKind, TextEmbedder
from mm.tools.index import Index

LONG = "what color is the shape? " * 40


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> MultimodalModel:
    torch.manual_seed(0)
    model = tiny_model(embedding_dim=8).eval()
    monkeypatch.setattr(mm, "load", lambda path: model, raising=False)
    return model


@pytest.fixture
def source(tmp_path: Path) -> Path:
    file = tmp_path / "notes.jsonl"
    notes = [{"title": "Red", "text": "red is a color"}, {"title": "Beeps", "text": LONG + "how many beeps? two."}]
    file.write_text("".join(json.dumps(note) + "\n" for note in notes))
    return file


def test_words_alone_need_no_model(source: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "index"
    assert main(["index", str(source), "--out", str(out), "--chunk", "50", "--overlap", "5"]) == 0
    assert "chunks of at most 50 words, searched by words" in capsys.readouterr().out
    index = Index.load(out)
    assert index.search("how many beeps")[0].chunk.title == "Beeps"
    assert max(len(index.search("color", 9)[n].chunk.text.split()) for n in range(2)) <= 50


def test_with_a_model_tokens_are_counted_and_there_are_vectors(model, source: Path, tmp_path: Path) -> None:
    kinds: tuple[tuple[EmbeddingKind, int], ...] = (("tower", 8), ("mean", 32))
    for embed, dim in kinds:
        out = tmp_path / embed
        arguments = ["index", str(source), "--out", str(out), "--model", "M", "--embed", embed, "--device", "cpu"]
        assert main([*arguments, "--chunk", "64", "--overlap", "8"]) == 0
        index = Index.load(out, TextEmbedder(model, embed))
        assert index.manifest["vectors"] == {"kind": embed, "dim": dim}
        hits = index.search("red", 99, "dense")
        assert all(len(model.tokenizer.encode(hit.chunk.text)) <= 64 for hit in hits)
    with pytest.raises(ValueError, match="of another model"):
        Index.load(tmp_path / "tower", TextEmbedder(model, "mean"))


def test_the_tower_is_the_default_where_there_is_one(model: MultimodalModel) -> None:
    assert TextEmbedder(model).kind == "tower"
    torch.manual_seed(0)
    bare = tiny_model().eval()
    assert TextEmbedder(bare).kind == "mean"
    with pytest.raises(ValueError, match="no alignment tower"):
        TextEmbedder(bare, "tower")


@pytest.mark.parametrize("kind", ["tower", "mean"])
def test_a_text_is_embedded_as_it_is_alone(model: MultimodalModel, kind) -> None:
    texts = ["red", "how many beeps? two. " * 5, "green or blue.", "red"]
    together = TextEmbedder(model, kind, batch_tokens=120)(texts)
    alone = np.concatenate([TextEmbedder(model, kind)([text]) for text in texts])
    np.testing.assert_allclose(together, alone, atol=1e-4)  # other batch shapes add up in another order
    assert together.shape == (4, 8 if kind == "tower" else 32)
    assert np.abs(together[0] - together[1]).max() > 0.01


def test_only_the_beginning_of_a_long_text_is_read(model: MultimodalModel) -> None:
    embed = TextEmbedder(model, "mean", max_tokens=8)
    np.testing.assert_allclose(embed([LONG]), embed([LONG * 2]), atol=1e-6)
    with pytest.raises(ValueError, match="text 1 is empty"):
        embed(["red", ""])


def test_mistakes(source: Path, tmp_path: Path, capsys) -> None:
    out = str(tmp_path / "index")
    for arguments, message in (
        (["index", str(source)], "see mm index --help"),
        (["index", str(source), "--out", out, "--embed", "mean"], "--embed mean needs --model"),
        (["index", str(tmp_path / "none"), "--out", out], "no such file or folder"),
        (["index", str(source), "--out", str(tmp_path)], "there is something already"),
        (["index", str(source), "--out", out, "--chunk", "1"], "chunks of 1 tokens"),
        (["index", str(source), "--out", out, "--key", "body"], "key 'body'"),
    ):
        assert main(arguments) == 2
        assert message in capsys.readouterr().err
    assert sorted(file.name for file in tmp_path.iterdir()) == ["notes.jsonl"]


def test_without_a_tower_there_are_no_vectors_unless_asked_for(source: Path, tmp_path: Path, monkeypatch) -> None:
    torch.manual_seed(0)
    bare = tiny_model().eval()
    monkeypatch.setattr(mm, "load", lambda path: bare, raising=False)
    out = tmp_path / "index"
    assert main(["index", str(source), "--out", str(out), "--model", "M"]) == 0
    manifest = Index.load(out).manifest
    assert (manifest["vectors"], manifest["counted"]) == (None, "tokens")
