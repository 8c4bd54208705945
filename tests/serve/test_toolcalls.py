"""What may be a call is held back while it is written, and nothing else is; a forced call has a schema of its own."""

from __future__ import annotations

import json

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mm.serve.forms import Function, NamedTool, Tool
from mm.serve.limits import Refused
from mm.serve.options import told
from mm.serve.toolcalls import forced_schema, offered
from mm.serve.wire import token_text
from mm.tools.held import CallFilter

CALL = '{"name": "add", "arguments": {"a": 1}}'
TEXTS = [
    "no call at all",
    f"<tool_call>{CALL}</tool_call>",
    f"so:\n<tool_call>{CALL}</tool_call>\n",
    f"<tool_call>{CALL}</tool_call> then <tool_call>{CALL}</tool_call> and more",
    f"sure.\n\n{CALL}",
    f"```json\n[{CALL}, {CALL}]\n```",
    "<tool_call>broken</tool_call>",
    "a < b, `x`, \n``` \n[1, 2] \n",
    '\n  {"name": "unknown", "arguments": {}}',
    "<tool_ca",
]


@given(st.sampled_from(TEXTS), st.lists(st.integers(1, 12), max_size=12))
def test_how_text_comes_in_pieces_changes_nothing(text: str, sizes: list[int]) -> None:
    def answer(pieces: list[str]) -> tuple[str, list[str]]:
        held = CallFilter(["add"])
        shown = "".join([held.push(piece) for piece in pieces])
        rest, calls = held.end()
        return shown + rest, [call.to_text() for call in calls]

    pieces, at = [], 0
    for size in sizes:
        pieces.append(text[at : at + size])
        at += size
    shown, calls = answer([*pieces, text[at:]])
    assert (shown.strip(), calls) == (answer([text])[0].strip(), answer([text])[1])
    assert len(calls) == (text.count('"add"'))
    if not calls:
        assert shown == text
    assert CALL not in shown


def test_text_before_a_call_is_told_at_once() -> None:
    held = CallFilter(["add"])
    assert held.push("let me <b>add</b> it") == "let me <b>add</b> it"
    assert held.push(" \n<tool") == "" and held.push("s> are") == " \n<tools> are"
    assert held.push("\n<tool_call>{") == ""
    free = CallFilter([])
    assert free.push(TEXTS[1]) == TEXTS[1] and free.end() == ("", [])


def tool(name: str, **parameters: object) -> Tool:
    return Tool(type="function", function=Function(name=name, parameters=parameters))


def test_a_forced_call_keeps_the_references_of_its_tools() -> None:
    city = {"type": "object", "properties": {"$ref": {"$ref": "#/$defs/Name"}}, "required": ["$ref"]}
    one = tool(
        "one", properties={"city": {"$ref": "#/$defs/City"}}, **{"$defs": {"City": city, "Name": {"minLength": 2}}}
    )
    tree = tool("tree", properties={"kids": {"type": "array", "items": {"$ref": "#"}}}, additionalProperties=False)
    for tools in ([one, tree], [one], [tree]):
        schema = forced_schema(tools, "required")
        assert schema is not None
        check = jsonschema.Draft202012Validator(schema).is_valid
        if one in tools:
            assert check({"name": "one", "arguments": {"city": {"$ref": "Oslo"}}})
            assert not check({"name": "one", "arguments": {"city": {"$ref": "O"}}})
            assert not check({"name": "one", "arguments": {"city": {}}})
            assert not check({"name": "one", "arguments": []})
        if tree in tools:
            assert check({"name": "tree", "arguments": {"kids": [{"kids": []}, {}]}})
            assert not check({"name": "tree", "arguments": {"kids": [{"name": "tree"}]}})
        assert not check({"name": "other", "arguments": {}})
    assert json.loads(json.dumps(one.function.parameters))["properties"] == {"city": {"$ref": "#/$defs/City"}}
    assert forced_schema([one], "auto") is None and forced_schema([one], None) is None


def test_what_is_offered() -> None:
    one, two = tool("one"), tool("two")
    named = NamedTool.model_validate({"type": "function", "function": {"name": "two"}})
    assert offered([one, two], None) == offered([one, two], "auto") == offered([one, two], "required") == [one, two]
    assert offered([one, two], named) == [two]
    assert offered([one, two], "none") == offered(None, None) == offered([], "auto") == []
    for tools, choice in (([one], named), (None, "required"), ([], named)):
        with pytest.raises(Refused, match="invalid_value"):
            offered(tools, choice)


def test_tokens_that_are_no_text_are_spelled() -> None:
    assert [token_text(data) for data in (b"red", "é".encode(), b"\xc3", b"\xa9a")] == [
        "red", "é", "bytes:\\xc3", "bytes:\\xa9\\x61",
    ]  # fmt: skip


def test_what_a_request_is_told_of_a_mistake() -> None:
    def fails(message: str, **options: object) -> None:
        raise ValueError(message)

    for message, code in (("json_schema: no", "invalid_schema"), ("temperature=9", "invalid_value")):
        with pytest.raises(Refused) as caught:
            told(fails, message)
        assert (caught.value.code, caught.value.detail) == (code, message)
