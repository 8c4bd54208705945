"""`mm chat --index`: the answer rests on documents, and says which."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import mm
from mm.chat.session import ChatSession
from mm.cli import main
from mm.generation.testing import ScriptedModel
from mm.model import MultimodalModel
from mm.testing import spread, tiny_decoder, tiny_tokenizer
from mm.tools.chunks import Document
from mm.tools.dense import Embed
from mm.tools.embeddings import TextEmbedder
from mm.tools.index import build
from mm.tools.lookup import Lookup
from mm.tools.probe import CHECK, ToolProbe, last_states
from mm.types import Sample


def make_index(folder: Path, embed: Embed | None = None) -> Path:
    texts = {"Heron": "The heron eats fish.", "Kiln": "A kiln is an oven for clay."}
    build([Document("notes.txt", title, text) for title, text in texts.items()], folder, embed=embed)
    return folder


def reader(sample: Sample) -> str:
    """Answers with the first document's number if it was shown one, else with what it was asked."""
    content = sample.messages[-1]["content"]
    return "Fish [1]." if "[1] Heron" in content else f"asked: {content}"


@pytest.fixture
def lookup(tmp_path: Path) -> Lookup:
    return Lookup.open(make_index(tmp_path / "index"), ScriptedModel(tiny_tokenizer(), reader))


def test_the_session_looks_up_and_keeps_the_question_as_it_was(lookup: Lookup) -> None:
    session = ChatSession(ScriptedModel(tiny_tokenizer(), reader))
    session.lookup = lookup
    assert "".join(session.ask("What does a heron eat?")) == "Fish [1]."
    assert session.messages[0] == {"role": "user", "content": "What does a heron eat?"}
    assert session.sources == "Sources:\n[1] Heron (notes.txt, characters 0-20)"
    assert "".join(session.ask("xylophone")) == "asked: xylophone"
    assert session.sources == ""
    list(session.ask("What does a heron eat?"))
    session.reset()
    assert session.sources == ""


def test_one_shot_prints_the_answer_and_its_source(tmp_path: Path, monkeypatch, capsys) -> None:
    (tmp_path / "model").mkdir()
    monkeypatch.setattr(mm, "load", lambda path: ScriptedModel(tiny_tokenizer(), reader), raising=False)
    folder = str(make_index(tmp_path / "index"))
    assert main(["chat", str(tmp_path / "model"), "--index", folder, "What does a heron eat?"]) == 0
    assert capsys.readouterr().out == "Fish [1].\n\nSources:\n[1] Heron (notes.txt, characters 0-20)\n"
    assert main(["chat", str(tmp_path / "model"), "--index", str(tmp_path / "none"), "What?"]) == 2
    assert "no finished index" in capsys.readouterr().err
    assert main(["chat", str(tmp_path / "model"), "--probe", "p.safetensors", "What?"]) == 2
    assert "give --index DIR too" in capsys.readouterr().err


@pytest.fixture
def model() -> MultimodalModel:
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    return spread(MultimodalModel(tokenizer, tiny_decoder(vocab_size=tokenizer.vocab_size))).eval()


def test_an_index_with_vectors_is_searched_by_them_too(model: MultimodalModel, tmp_path: Path) -> None:
    folder = make_index(tmp_path / "index", TextEmbedder(model))
    assert Lookup.open(folder, model).index.ways[0] == "hybrid"
    with pytest.raises(ValueError, match="this model makes none"):
        Lookup.open(folder, ScriptedModel(tiny_tokenizer(), reader))


@pytest.mark.parametrize("bias", [9.0, -9.0])
def test_the_probe_says_whether_to_look_up(model: MultimodalModel, tmp_path: Path, bias: float) -> None:
    probe = ToolProbe(32, ["retrieval"])
    with torch.no_grad():
        probe.linear.weight.zero_()
        probe.linear.bias.fill_(bias)
    (probe.check,) = last_states(model, [CHECK])
    probe.save(tmp_path / "probe.safetensors")
    lookup = Lookup.open(make_index(tmp_path / "index"), model, probe=tmp_path / "probe.safetensors")
    asked = Sample("q", [{"role": "user", "content": "heron"}])
    sample, hits = lookup(model, asked)
    assert [hit.chunk.title for hit in hits] == (["Heron"] if bias > 0 else [])
    assert (sample == asked) == (bias < 0)


def test_a_probe_that_knows_no_retrieval_is_refused(lookup: Lookup) -> None:
    with pytest.raises(ValueError, match="not retrieval"):
        Lookup(lookup.index, probe=ToolProbe(4, ["calculator"]))
