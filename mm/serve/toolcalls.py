"""Tool calls of an answer while it is written: text goes out at once, what may be a call is held until the end."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from mm.generation.stopping import begun
from mm.serve.forms import NamedTool, Tool
from mm.serve.limits import Refused
from mm.tools.calls import ToolCall, parse

_MAY_CALL = re.compile(r"<tool_call>|^[ \t]*(?:```|[\[{])", re.MULTILINE)
_LINE_BEGINS = re.compile(r"(?:\A|\n)[ \t]*`{0,2}\Z")


class CallFilter:
    """The text of an answer -> what of it is certainly no call. `end` gives the calls, and what else was held.

    Without `names` nothing is held: no tool was offered.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._names = names
        self._text, self._told = "", 0

    def push(self, text: str) -> str:
        if not self._names:
            return text
        self._text += text
        found = _MAY_CALL.search(self._text)
        if found is not None:
            end = found.start()
        else:
            unsure = _LINE_BEGINS.search(self._text)
            end = min(
                len(self._text) - begun(self._text, ["<tool_call>"]), unsure.start() if unsure else len(self._text)
            )
        end = max(end, self._told)
        new, self._told = self._text[self._told : end], end
        return new

    def end(self) -> tuple[str, list[ToolCall]]:
        if not self._names:
            return "", []
        parsed = parse(self._text, self._names)
        if not parsed.calls:
            return self._text[self._told :], []
        told = self._text[: self._told].strip()
        return (parsed.text[len(told) :] if parsed.text.startswith(told) else ""), parsed.calls


def offered(tools: Sequence[Tool] | None, choice: Any) -> list[Tool]:
    """The tools that an answer may call: with `tool_choice`, none of them or the named one. Raises Refused."""
    if choice == "none" or not tools:
        if choice not in (None, "none", "auto"):
            raise Refused("invalid_value", "a tool_choice without tools", "tool_choice")
        return []
    if isinstance(choice, NamedTool):
        named = [tool for tool in tools if tool.function.name == choice.function.name]
        if not named:
            raise Refused("invalid_value", "tool_choice names no tool", "tool_choice")
        return named
    return list(tools)


def forced_schema(tools: Sequence[Tool], choice: Any) -> dict[str, Any] | None:
    """The JSON schema of an answer that must be a call, or None: the model may also answer in text."""
    if not isinstance(choice, NamedTool) and choice != "required":
        return None
    calls = [
        {
            "type": "object",
            "properties": {"name": {"const": tool.function.name}, "arguments": tool.function.parameters},
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for tool in tools
    ]
    return calls[0] if len(calls) == 1 else {"anyOf": calls}
