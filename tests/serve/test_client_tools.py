"""Tools through OpenAI's client: calls as the model writes them, forced ones, and the whole way to an answer."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Literal

import openai
import pytest
import torch
from openai import OpenAI
from pydantic import BaseModel

from mm.serve.run import Running, running
from mm.tools.calls import describe

from .attack import text_model
from .clients import always_say, client, said, user

NAME = "tiny"


class Place(BaseModel):
    city: Literal["Oslo", "Rome"]
    north: bool


class Weather(BaseModel):
    """What the sky does."""

    place: Place  # a definition of its own, which the schema refers to
    other: Place | None


class Clock(BaseModel):
    twelve: bool


TOOLS = [openai.pydantic_function_tool(each) for each in (Weather, Clock)]
NOW: Any = {"type": "function", "function": {"name": "now"}}  # takes nothing


@pytest.fixture(scope="module")
def here() -> Iterator[Running]:
    torch.manual_seed(0)
    with running(text_model(), name=NAME) as here:
        yield here


@pytest.fixture(scope="module")
def ai(here: Running) -> OpenAI:
    return client(here)


CALLS = [
    '<tool_call>{"name": "Clock", "arguments": {"twelve": true}}</tool_call>',
    '{"name": "Clock", "arguments": {"twelve": true}}',
    '```json\n{"name": "Clock", "arguments": {"twelve": true}}\n```',
]


@pytest.mark.parametrize("written", CALLS, ids=["tagged", "plain", "fenced"])
def test_from_the_call_to_the_answer(here: Running, ai: OpenAI, monkeypatch: pytest.MonkeyPatch, written: str) -> None:
    with monkeypatch.context() as patch:
        always_say(patch, f"let me see.\n{written}")
        asked: Any = {"model": NAME, "messages": user("when?"), "tools": TOOLS, "max_tokens": 150}
        choice = ai.chat.completions.create(**asked).choices[0]
        with ai.chat.completions.stream(**asked) as stream:
            events = [event.type for event in stream]
            streamed = stream.get_final_completion().choices[0]
    assert (choice.finish_reason, streamed.finish_reason) == ("tool_calls", "tool_calls")
    assert choice.message.tool_calls is not None and streamed.message.tool_calls is not None
    assert "tool_calls.function.arguments.done" in events
    [call], [same] = choice.message.tool_calls, streamed.message.tool_calls
    assert call.type == "function" and call.id == same.id
    assert call.function.name == same.function.name == "Clock"
    assert json.loads(call.function.arguments) == {"twelve": True}
    assert same.function.parsed_arguments == Clock(twelve=True)
    assert choice.message.content == streamed.message.content == "let me see."
    told = "let me see.\n" + CALLS[0]  # however it was written, the model reads it as it is asked to write it
    calls = choice.message.tool_calls
    by_hand = {"role": "assistant", "content": "let me see.", "tool_calls": [call.to_dict() for call in calls]}
    for message in (choice.message, streamed.message, by_hand):
        result: Any = {"role": "tool", "tool_call_id": call.id, "content": "12:30"}
        chat: Any = [*user("when?"), message, result]
        found = ai.chat.completions.create(model=NAME, messages=chat, tools=TOOLS, max_tokens=9, temperature=0)
        system = describe([{"type": "function", "function": _without_strict(tool)} for tool in TOOLS])
        plain = [
            {"role": "system", "content": system},
            *user("when?"),
            {"role": "assistant", "content": told},
            {"role": "user", "content": "<tool_response>\nClock: 12:30\n</tool_response>"},
        ]
        expected = said(here.server.model, plain, 9)
        assert found.usage is not None and found.usage.prompt_tokens == expected.prompt_length
        assert found.choices[0].message.content == expected.text


def _without_strict(tool: Any) -> dict[str, Any]:
    function = {"name": "", "description": "", "parameters": {}} | tool["function"]
    return {name: function[name] for name in ("name", "description", "parameters")}


@pytest.mark.parametrize("choice", ["required", "Weather", "Clock", "now"])
def test_a_call_that_must_be(ai: OpenAI, choice: str) -> None:
    named: Any = choice if choice == "required" else {"type": "function", "function": {"name": choice}}
    asked: Any = {"model": NAME, "messages": user("?"), "tools": [*TOOLS, NOW], "tool_choice": named}
    with ai.chat.completions.stream(**asked, seed=5, max_tokens=300) as stream:
        found = stream.get_final_completion().choices[0]
    whole = ai.chat.completions.create(**asked, seed=5, max_tokens=300).choices[0]
    assert found.finish_reason == whole.finish_reason == "tool_calls"
    assert found.message.tool_calls and whole.message.tool_calls
    [call], [same] = found.message.tool_calls, whole.message.tool_calls
    assert call.function.arguments == same.function.arguments  # type: ignore[union-attr]
    assert call.function.name == choice or choice == "required"
    assert not found.message.content and whole.message.content is None
    expected = {"Weather": Weather, "Clock": Clock}.get(call.function.name)
    if expected is None:
        assert json.loads(call.function.arguments) == {}
    else:
        assert isinstance(call.function.parsed_arguments, expected)


def test_no_call_where_none_is_wanted(here: Running, ai: OpenAI, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = ai.chat.completions.create(model=NAME, messages=user("when?"), max_tokens=9, temperature=0)
    without = ai.chat.completions.create(
        model=NAME, messages=user("when?"), max_tokens=9, temperature=0, tools=TOOLS, tool_choice="none"
    )
    assert without.choices == plain.choices and without.usage is not None and plain.usage is not None
    assert without.usage.prompt_tokens == plain.usage.prompt_tokens  # it is not told of them either
    always_say(monkeypatch, CALLS[0])
    for more in ({"tools": TOOLS, "tool_choice": "none"}, {}, {"tools": [NOW]}):
        body: Any = more
        choice = ai.chat.completions.create(model=NAME, messages=user("when?"), max_tokens=150, **body).choices[0]
        called = "tools" in more and "tool_choice" not in more  # in tags a name need not be one that was offered
        assert (choice.finish_reason == "tool_calls") == called
        assert (choice.message.content == CALLS[0]) != called


def test_text_that_is_no_call_stays(ai: OpenAI, monkeypatch: pytest.MonkeyPatch) -> None:
    text = 'see:\n- `<tool` is\n{"name": "red"}\n[1, 2]'
    always_say(monkeypatch, text)
    asked: Any = {"model": NAME, "messages": user("when?"), "tools": TOOLS, "max_tokens": 150}
    assert ai.chat.completions.create(**asked).choices[0].message.content == text
    with ai.chat.completions.stream(**asked) as stream:
        found = stream.get_final_completion().choices[0]
    assert found.message.content == text and not found.message.tool_calls and found.finish_reason == "stop"


def test_two_results_are_one_turn(here: Running, ai: OpenAI) -> None:
    ids = ("call_a", "call_b")
    calls = [{"id": each, "type": "function", "function": {"name": "now", "arguments": ""}} for each in ids]
    results = [{"role": "tool", "tool_call_id": each, "content": [{"type": "text", "text": each}]} for each in ids]
    chat: Any = [*user("when?"), {"role": "assistant", "tool_calls": calls}, *results]
    found = ai.chat.completions.create(model=NAME, messages=chat, max_tokens=3, temperature=0)
    call = '<tool_call>{"name": "now", "arguments": {}}</tool_call>'
    told = "\n".join(f"<tool_response>\nnow: {each}\n</tool_response>" for each in ids)
    plain = [*user("when?"), {"role": "assistant", "content": f"{call}\n{call}"}, {"role": "user", "content": told}]
    assert found.choices[0].message.content == said(here.server.model, plain, 3).text


NO_NAME: Any = {"type": "function", "function": {"name": "no"}}
NO_TYPE: Any = {"type": "function", "function": {"name": "a", "parameters": {"type": "no"}}}
NONSENSE: list[tuple[Any, str, str | None]] = [
    ({"tool_choice": "required"}, "invalid_value", "tool_choice"),
    ({"tools": [NOW], "tool_choice": NO_NAME}, "invalid_value", "tool_choice"),
    (
        {"tools": [NOW], "tool_choice": "required", "response_format": {"type": "json_object"}},
        "invalid_value",
        "response_format",
    ),
    ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "invalid_value", "tools[0]"),
    ({"tools": [NO_TYPE], "tool_choice": "required"}, "invalid_schema", None),
    ({"messages": [{"role": "tool", "tool_call_id": "x", "content": "y"}]}, "invalid_value", "messages[0]"),
]


@pytest.mark.parametrize(("body", "code", "param"), NONSENSE)
def test_what_makes_no_sense_is_refused(ai: OpenAI, body: Any, code: str, param: str | None) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        ai.chat.completions.create(**{"model": NAME, "messages": user("?"), **body})
    assert (caught.value.code, caught.value.param) == (code, param)
