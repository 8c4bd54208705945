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
from mm.tools.choose import Tools, open_index
from mm.tools.chunks import Document
from mm.tools.dense import Embed
from mm.tools.embeddings import TextEmbedder
from mm.tools.index import build
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
def tools(tmp_path: Path) -> Tools:
    return Tools.open(ScriptedModel(tiny_tokenizer(), reader), index=make_index(tmp_path / "index"))


def test_the_session_looks_up_and_keeps_the_question_as_it_was(tools: Tools) -> None:
    session = ChatSession(ScriptedModel(tiny_tokenizer(), reader))
    session.tools = tools
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
    assert "give --index DIR or --tools NAMES too" in capsys.readouterr().err


@pytest.fixture
def model() -> MultimodalModel:
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    return spread(MultimodalModel(tokenizer, tiny_decoder(vocab_size=tokenizer.vocab_size))).eval()


def test_an_index_with_vectors_is_searched_by_them_too(model: MultimodalModel, tmp_path: Path) -> None:
    folder = make_index(tmp_path / "index", TextEmbedder(model))
    assert open_index(folder, model).ways[0] == "hybrid"
    with pytest.raises(ValueError, match="this model makes none"):
        open_index(folder, ScriptedModel(tiny_tokenizer(), reader))


@pytest.mark.parametrize("bias", [9.0, -9.0])
def test_the_probe_says_whether_to_look_up(model: MultimodalModel, tmp_path: Path, bias: float) -> None:
    probe = ToolProbe(32, ["retrieval"])
    with torch.no_grad():
        probe.linear.weight.zero_()
        probe.linear.bias.fill_(bias)
    (probe.check,) = last_states(model, [CHECK])
    probe.save(tmp_path / "probe.safetensors")
    tools = Tools.open(model, index=make_index(tmp_path / "index"), probe=tmp_path / "probe.safetensors")
    asked = Sample("q", [{"role": "user", "content": "heron"}])
    plan = tools.plan(model, asked)
    assert [hit.chunk.title for hit in plan.hits] == (["Heron"] if bias > 0 else [])
    assert (plan.messages == asked.messages) == (bias < 0)


def test_tools_that_do_not_fit_are_refused(tools: Tools) -> None:
    model = ScriptedModel(tiny_tokenizer(), reader)
    with pytest.raises(ValueError, match="knows weather; there are retrieval, calculator"):
        Tools(tools.toolbox, ToolProbe(4, ["weather"]))
    with pytest.raises(ValueError, match="no tool 'weather'"):
        Tools.open(model, ["weather"])
    with pytest.raises(ValueError, match="retrieval needs an index"):
        Tools.open(model, ["retrieval"])
    with pytest.raises(ValueError, match="no tool 'code' here"):
        Tools(tools.toolbox, offered=["code"])


CALL = '<tool_call>{"name": "calculator", "arguments": {"expression": "12 * 34"}}</tool_call>'


def counter(sample: Sample) -> str:
    """Calls the calculator, then says what it was told."""
    last = sample.messages[-1]["content"]
    if last.startswith("<tool_response>"):
        return "It is " + last.split()[2] + "."
    return "Let me see. " + CALL


def test_a_chat_calls_and_keeps_what_it_was_told(tmp_path: Path) -> None:
    session = ChatSession(ScriptedModel(tiny_tokenizer(), counter))
    session.tools = Tools.open(session.model, ["calculator"])
    assert "".join(session.ask("What is 12 * 34?")) == "Let me see. It is 408."
    assert [(call.name, result.text) for call, result in session.steps] == [("calculator", "408")]
    roles = [message["role"] for message in session.messages]
    assert roles == ["user", "assistant", "user", "assistant"] and session.turns == 1
    assert session.messages[-1]["content"] == "It is 408."
    session.save(tmp_path / "chat.json")
    again = ChatSession(session.model)
    again.load(tmp_path / "chat.json")
    assert again.turns == 1 and again.messages == session.messages


def test_a_chat_stopped_before_its_call_keeps_what_was_said() -> None:
    session = ChatSession(ScriptedModel(tiny_tokenizer(), counter))
    session.tools = Tools.open(session.model, ["calculator"])
    answer = session.ask("What is 12 * 34?")
    next(answer)
    answer.close()
    assert [message["role"] for message in session.messages] == ["user", "assistant"]
    said = session.messages[1]["content"]
    assert said and "Let me see. ".startswith(said) and session.steps == []


def test_one_shot_calls_what_it_is_given(tmp_path: Path, monkeypatch, capsys) -> None:
    (tmp_path / "model").mkdir()
    monkeypatch.setattr(mm, "load", lambda path: ScriptedModel(tiny_tokenizer(), counter), raising=False)
    assert main(["chat", str(tmp_path / "model"), "--tools", "calculator", "What is 12 * 34?"]) == 0
    assert capsys.readouterr().out == "Let me see. It is 408.\n"
