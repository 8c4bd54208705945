"""Calls of tools, as a model writes them and as the OpenAI API carries them.

text with <tool_call>{"name": ..., "arguments": {...}}</tool_call>, or JSON alone  ->  ToolCall
{"tool_calls": [{"id", "type": "function", "function": {"name", "arguments": "{...}"}}]}  <->  ToolCall
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

MOST = 16  # calls in one answer
LONGEST = 100_000  # characters of an answer that are searched for calls
_TAGGED = re.compile(r"<tool_call>(.*?)(?:</tool_call>|(?=<tool_call>)|\Z)", re.DOTALL)
_FENCED = re.compile(r"\A```(?:json|tool_call)?\s*\n(.*?)\n?```\Z", re.DOTALL)
_JSON_LINE = re.compile(r"^[ \t]*(```(?:json|tool_call)?[ \t]*\n\s*)?(?=[\[{])", re.MULTILINE)


@dataclass(frozen=True)
class ToolCall:
    """What is to be called, with which arguments; `id` is what its result refers to."""

    name: str
    arguments: dict[str, Any]
    id: str

    def to_openai(self) -> dict[str, Any]:
        arguments = json.dumps(self.arguments, ensure_ascii=False)
        return {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": arguments}}

    def to_text(self) -> str:
        """As `describe` asks a model to write it."""
        call = json.dumps({"name": self.name, "arguments": self.arguments}, ensure_ascii=False)
        return f"<tool_call>{call}</tool_call>"


@dataclass(frozen=True)
class Parsed:
    """An answer taken apart: the text around its calls, the calls, and what looked like a call and is none."""

    text: str
    calls: list[ToolCall]
    problems: list[str]


def parse(text: str, names: Collection[str] | None = None) -> Parsed:
    """Finds calls in what a model wrote. Never raises: a broken call is a problem, and its text stays.

    Read are JSON objects in <tool_call> tags (the last may be open: the answer was cut behind it) and, without tags,
    JSON that ends the answer, from a line's beginning on, also in a code fence: objects with a name and arguments, a
    list of them, or an object with "tool_calls". (Tags can be special tokens, which are no text.) With `names`, JSON
    without tags is a call only if it names one of them.
    """
    if len(text) > LONGEST:
        return Parsed(text, [], [f"an answer of {len(text):,} characters is not searched for calls"])
    return _tagged(text) if "<tool_call>" in text else _untagged(text, names)


def _tagged(text: str) -> Parsed:
    calls: list[ToolCall] = []
    problems: list[str] = []

    def take(match: re.Match[str]) -> str:
        if len(calls) >= MOST:
            problems.append(f"more than {MOST} calls; the rest are left out")
            return match.group()
        try:
            calls.extend(_call(item, len(calls) + number) for number, item in enumerate(_items(_json(match[1])[0])))
        except ValueError as error:
            problems.append(str(error))
            return match.group()
        return ""

    rest = _TAGGED.sub(take, text)
    return Parsed(rest.strip() if calls else text, calls[:MOST], problems)


def _untagged(text: str, names: Collection[str] | None) -> Parsed:
    """JSON that ends the answer, and is about calls; anything else that ends in JSON is an answer in JSON."""
    begin = _JSON_LINE.search(text)
    if begin is None:
        return Parsed(text, [], [])
    items: list[Any] = []
    rest = text[begin.end() :].strip().removesuffix("```").rstrip() if begin[1] else text[begin.end() :].strip()
    try:
        while rest:
            value, rest = _json(rest)
            items += _items(value)
        calls = [_call(item, number) for number, item in enumerate(items)]
    except ValueError as error:
        return Parsed(text, [], [str(error)] if '"arguments"' in rest or '"tool_calls"' in rest else [])
    functions = [item.get("function", item) for item in items]
    meant = all("arguments" in function or "parameters" in function for function in functions)
    if not meant or (names is not None and not all(call.name in names for call in calls)):
        return Parsed(text, [], [])
    return Parsed(text[: begin.start()].strip(), calls[:MOST], [])


def from_openai(tool_calls: Iterable[Mapping[str, Any]]) -> list[ToolCall]:
    """The calls of an assistant's message. Raises ValueError saying which is not one."""
    return [_call(call, number) for number, call in enumerate(tool_calls)]


def declaration(name: str, description: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """A tool as a request's `tools` declare it; `parameters` is a JSON schema."""
    function = {"name": name, "description": description, "parameters": dict(parameters)}
    return {"type": "function", "function": function}


def describe(tools: Sequence[Mapping[str, Any]]) -> str:
    """Declared tools as text for a system prompt, and how to call them."""
    lines = [json.dumps(tool["function"], ensure_ascii=False) for tool in tools]
    return "\n".join(
        [
            "You may call these tools, each described by a JSON object:",
            *lines,
            "To call one, write only",
            '<tool_call>{"name": "the tool", "arguments": {"the argument": "its value"}}</tool_call>',
            "and you will be told the result. Answer directly where no tool is needed.",
        ]
    )


def result_message(call: ToolCall, result: str) -> dict[str, str]:
    """What a tool said, as a turn of the chat. Templates have no turn for tools that all models share: it is the
    user's."""
    return {"role": "user", "content": f"<tool_response>\n{call.name}: {result}\n</tool_response>"}


def _json(text: str) -> tuple[Any, str]:
    """The first JSON value of the text, which may be fenced, and what follows it."""
    body = text.strip()
    if fenced := _FENCED.match(body):
        body = fenced[1].strip()
    try:
        value, end = json.JSONDecoder(parse_constant=_no_constant).raw_decode(body)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"a call that is not JSON: {body[:80]!r} ({error})") from None
    return value, body[end:].strip()


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _items(value: Any) -> list[Any]:
    if isinstance(value, dict) and isinstance(value.get("tool_calls"), list):
        value = value["tool_calls"]
    return value if isinstance(value, list) else [value]


def _call(value: Any, number: int) -> ToolCall:
    """From {"name", "arguments"} (or "parameters", as Llama writes), or OpenAI's object with a "function"."""
    function = value.get("function", value) if isinstance(value, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str) or not function["name"]:
        raise ValueError(f"call {number}: no object with a name: {str(value)[:80]}")
    arguments = function.get("arguments", function.get("parameters", {}))
    if isinstance(arguments, str):
        arguments, rest = _json(arguments) if arguments.strip() else ({}, "")
        if rest:
            raise ValueError(f"call {number} of {function['name']!r}: text after its arguments: {rest[:80]!r}")
    if not isinstance(arguments, dict):
        raise ValueError(f"call {number} of {function['name']!r}: its arguments are no object: {str(arguments)[:80]}")
    given = value.get("id") if isinstance(value, Mapping) else None
    return ToolCall(function["name"], arguments, given if isinstance(given, str) and given else _id(function, number))


def _id(function: Mapping[str, Any], number: int) -> str:
    """A name that the same call at the same place always has."""
    content = json.dumps([number, function], sort_keys=True, default=str).encode()
    return f"call_{hashlib.blake2b(content, digest_size=12).hexdigest()}"
