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
    if len(tools) == 1:
        return _call_schema(tools[0], "#")
    return {"anyOf": [_call_schema(tool, f"#/anyOf/{place}") for place, tool in enumerate(tools)]}


def _call_schema(tool: Tool, where: str) -> dict[str, Any]:
    """The schema of a call, which stands at the JSON pointer `where`."""
    arguments = _moved({"type": "object", **tool.function.parameters}, f"{where}/properties/arguments")
    return {
        "type": "object",
        "properties": {"name": {"const": tool.function.name}, "arguments": arguments},
        "required": ["name", "arguments"],
        "additionalProperties": False,
    }


def _moved(schema: Any, where: str) -> Any:
    """A schema that is no longer the root: its references to its own parts ("#/$defs/Place") lead to `where`."""
    if isinstance(schema, list):
        return [_moved(each, where) for each in schema]
    if not isinstance(schema, dict):
        return schema
    moved = {key: _moved(value, where) for key, value in schema.items()}
    reference = schema.get("$ref")
    if isinstance(reference, str) and (reference == "#" or reference.startswith("#/")):
        moved["$ref"] = where + reference[1:]
    return moved
