"""Answers with tools: calls are run, their results are read, and what the index gave is cited."""

from __future__ import annotations

import json

import pytest

from mm.generation.testing import ScriptedModel
from mm.testing import tiny_tokenizer
from mm.tools.answer import answer
from mm.tools.calls import ToolCall
from mm.tools.choose import Tools
from mm.tools.code import CodeTool
from mm.tools.index import Index
from mm.tools.probe import ToolProbe
from mm.tools.router import Decision, Router
from mm.tools.toolbox import Toolbox
from mm.types import Sample


def call(name: str, **arguments: str) -> str:
    return f"<tool_call>{json.dumps({'name': name, 'arguments': arguments})}</tool_call>"


def scripted(*turns: str) -> tuple[ScriptedModel, list[list[dict]]]:
    """A model that says one after the other, and the chats that it was shown."""
    left, seen = list(turns), list[list[dict]]()

    def script(sample: Sample) -> str:
        seen.append(sample.messages)
        return left.pop(0)

    return ScriptedModel(tiny_tokenizer(), script), seen


ASKED = Sample("q", [{"role": "user", "content": "what does a heron eat?"}])


def test_a_sum_is_computed_and_told() -> None:
    model, seen = scripted("Let me see. " + call("calculator", expression="12 * 34"), "It is 408.")
    result = answer(model, ASKED, Tools(Toolbox()))
    assert (result.text, result.finished, result.cited) == ("It is 408.", True, None)
    ((made, said),) = result.steps
    assert (made.arguments, said.text, said.failed) == ({"expression": "12 * 34"}, "408", False)
    assert '"name": "calculator"' in seen[0][0]["content"] and "retrieval" not in seen[0][0]["content"]
    assert [message["role"] for message in seen[1]] == ["system", "user", "assistant", "user"]
    assert "calculator: 408" in seen[1][-1]["content"]


def test_passages_are_numbered_through_and_cited(index: Index) -> None:
    turns = [call("retrieval", query="heron"), call("retrieval", query="kiln clay"), "A kiln [2]."]
    model, seen = scripted(*turns)
    result = answer(model, ASKED, Tools(Toolbox(index, k=1)))
    assert "[1] Heron" in seen[1][-1]["content"] and "[2] Kiln" in seen[2][-1]["content"]
    assert result.cited is not None
    assert [(number, hit.chunk.title) for number, hit in result.cited.sources] == [(2, "Kiln")]


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (call("code", program="print(1)"), "'code' is switched off; there are calculator"),
        (call("weather", city="Vienna"), "'weather' does not exist"),
        (call("calculator"), "needs the argument 'expression'"),
        (call("calculator", expression="1/0"), "division by zero"),
    ],
)
def test_a_call_that_fails_is_told_to_the_model(made: str, said: str) -> None:
    model, seen = scripted(made, "I cannot say.")
    result = answer(model, ASKED, Tools(Toolbox()))
    assert result.steps[0][1].failed
    assert said in seen[1][-1]["content"]
    assert result.text == "I cannot say."


def test_a_program_runs_where_code_is_on() -> None:
    result = Toolbox(code=CodeTool()).run(ToolCall("code", {"program": "print(6 * 7)"}, "call_1"))
    assert (result.text, result.failed) == ("42", False)
    assert Toolbox().names == ("calculator",)
    assert [tool["function"]["name"] for tool in Toolbox(code=CodeTool()).declarations()] == ["calculator", "code"]


def test_numbers_are_taken_for_expressions() -> None:
    assert Toolbox().run(ToolCall("calculator", {"expression": 42}, "call_1")).text == "42"


def test_a_model_that_only_calls_is_stopped() -> None:
    model, _ = scripted(*[call("calculator", expression="1")] * 3)
    result = answer(model, ASKED, Tools(Toolbox()), rounds=3)
    assert (result.finished, len(result.steps), result.text) == (False, 3, "")


class FixedRouter(Router):
    """Decides without reading anything."""

    def __init__(self, tools, tool: str) -> None:
        super().__init__(tools, ToolProbe(4, ["calculator", "retrieval"]))
        self.tool = tool

    def by_prompt(self, model, sample) -> Decision:
        return Decision(self.tool)


def decided(toolbox: Toolbox, tool: str) -> Tools:
    tools = Tools(toolbox)
    tools.router = FixedRouter(toolbox.names, tool)
    return tools


def test_the_probe_decides_what_is_offered(index: Index) -> None:
    toolbox = Toolbox(index)
    model, seen = scripted("It eats fish [1].")
    result = answer(model, ASKED, decided(toolbox, "retrieval"))
    assert [message["role"] for message in seen[0]] == ["user"]  # documents stand in the question, no tool is described
    assert "[1] Heron" in seen[0][-1]["content"]
    assert result.cited is not None and result.cited.sources[0][1].chunk.title == "Heron"

    model, seen = scripted("Hello.")
    result = answer(model, ASKED, decided(toolbox, "none"))
    assert seen[0] == ASKED.messages and result.cited is None

    model, seen = scripted("408")
    answer(model, ASKED, decided(toolbox, "calculator"))
    assert '"calculator"' in seen[0][0]["content"] and '"retrieval"' not in seen[0][0]["content"]


def test_a_system_prompt_keeps_its_text() -> None:
    for content in ("Be brief.", [{"type": "text", "text": "Be brief."}]):
        model, seen = scripted("Yes.")
        messages = [{"role": "system", "content": content}, *ASKED.messages]
        answer(model, Sample("q", messages), Tools(Toolbox()))
        first = seen[0][0]["content"]
        text = first if isinstance(first, str) else "".join(part["text"] for part in first)
        assert text.startswith("Be brief.\n\nYou may call")
        assert len(seen[0]) == 2
