"""Calls as models write them, and as the API carries them."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mm.tools.calls import MOST, ToolCall, declaration, describe, from_openai, parse, result_message

CALL = '{"name": "calculator", "arguments": {"expression": "1 + 1"}}'


@pytest.mark.parametrize(
    ("text", "rest"),
    [
        (f"<tool_call>{CALL}</tool_call>", ""),
        (f"Let me see.\n<tool_call>\n{CALL}\n</tool_call>", "Let me see."),
        (f"<tool_call>{CALL}", ""),  # cut behind the call
        (f"<tool_call>\n```json\n{CALL}\n```\n</tool_call>", ""),
        (f"<tool_call>{CALL} and so on</tool_call>", ""),
        (CALL, ""),
        (f"Let me see.\n{CALL}\n", "Let me see."),
        (f"```json\n{CALL}\n```", ""),
        (f"Sure:\n```\n{CALL}\n```", "Sure:"),
        (f"[{CALL}]", ""),
        ('{"name": "calculator", "parameters": {"expression": "1 + 1"}}', ""),
        ('{"name": "calculator", "arguments": "{\\"expression\\": \\"1 + 1\\"}"}', ""),
        (json.dumps({"tool_calls": [{"type": "function", "function": json.loads(CALL)}]}), ""),
    ],
)
def test_a_call_is_found(text: str, rest: str) -> None:
    parsed = parse(text)
    (call,) = parsed.calls
    assert (call.name, call.arguments) == ("calculator", {"expression": "1 + 1"})
    assert (parsed.text, parsed.problems) == (rest, [])
    assert call.id.startswith("call_")


def test_several_calls_have_ids_of_their_own() -> None:
    for text in (f"<tool_call>{CALL}</tool_call>" * 2, f"{CALL}\n{CALL}", f"<tool_call>{CALL}<tool_call>{CALL}"):
        one, two = parse(text).calls
        assert one.arguments == two.arguments and one.id != two.id
        assert [call.id for call in parse(text).calls] == [one.id, two.id]


@pytest.mark.parametrize(
    "text",
    [
        "It is 2.",
        "",
        '{"name": "Bob", "age": 3}',
        '[{"name": "Bob"}]',
        "[1, 2, 3]",
        '{"answer": {"name": "x", "arguments": {}}}',
        f"The call {CALL} is how one would write it.",
        f"{CALL}\nis how one would write it.",
        "[link](x)\nand more",
    ],
)
def test_an_answer_without_a_call_stays_as_it_is(text: str) -> None:
    parsed = parse(text)
    assert (parsed.text, parsed.calls) == (text, [])


def test_json_without_tags_must_name_a_tool_that_there_is() -> None:
    assert parse(CALL, ["calculator"]).calls and not parse(CALL, ["code"]).calls
    assert parse(f"<tool_call>{CALL}</tool_call>", ["code"]).calls  # tags leave no doubt that it is meant as a call


@pytest.mark.parametrize(
    "body",
    [
        "{bad",
        '{"name": 3}',
        '{"arguments": {}}',
        "[]x[",
        '{"name": "a", "arguments": [1]}',
        '{"name": "a", "arguments": {"x": NaN}}',
        '{"name": "a", "arguments": "{1"}',
        "[" * 50_000,
        "3",
        '{"name": "a", "arguments": {"x": ' + "9" * 5000 + "}}",
    ],
)
def test_a_broken_call_is_a_problem_and_stays_text(body: str) -> None:
    text = f"Hm.<tool_call>{body}</tool_call>"
    parsed = parse(text)
    if body == "[]x[":  # no call at all
        assert parsed.calls == []
    else:
        assert (parsed.text, parsed.calls, len(parsed.problems)) == (text, [], 1)


def test_there_is_an_end_to_calls() -> None:
    parsed = parse(f"<tool_call>{CALL}</tool_call>" * (MOST + 3))
    assert len(parsed.calls) == MOST and parsed.problems
    assert parse("<tool_call>" + "x" * 200_000).problems


@given(st.text(alphabet='{}[]<>"tool_call/name:arguments,\\ \n`', max_size=200))
def test_no_text_breaks_it(text: str) -> None:
    parsed = parse(text)
    assert parsed.calls or parsed.text == text


def test_openai_and_back() -> None:
    call = ToolCall("retrieval", {"query": "Café 😀"}, "call_1")
    form = call.to_openai()
    assert json.loads(form["function"]["arguments"]) == {"query": "Café 😀"}
    assert form["type"] == "function"
    assert from_openai([form]) == [call]
    with pytest.raises(ValueError, match="call 0: no object with a name"):
        from_openai([{"id": "x"}])


def test_tools_are_described_and_results_are_turns() -> None:
    tool = declaration("calculator", "computes", {"type": "object"})
    assert tool["type"] == "function"
    text = describe([tool])
    assert '"name": "calculator"' in text and "<tool_call>" in text
    message = result_message(ToolCall("calculator", {}, "call_1"), "2")
    assert message["role"] == "user" and "calculator: 2" in message["content"]
