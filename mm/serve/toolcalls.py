"""Which of a request's tools an answer may call, and what an answer that must call looks like."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mm.serve.forms import NamedTool, Tool
from mm.serve.limits import Refused


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
