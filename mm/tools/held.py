"""Tool calls of an answer while it is written: text goes out at once, what may be a call is held until the end."""

from __future__ import annotations

import re
from collections.abc import Collection

from mm.generation.stopping import begun
from mm.tools.calls import ToolCall, parse

_MAY_CALL = re.compile(r"<tool_call>|^[ \t]*(?:```|[\[{])", re.MULTILINE)
_LINE_BEGINS = re.compile(r"(?:\A|\n)[ \t]*`{0,2}\Z")


class CallFilter:
    """The text of an answer -> what of it is certainly no call. `end` gives the calls, and what else was held.

    Without `names` nothing is held: no tool was offered.
    """

    def __init__(self, names: Collection[str]) -> None:
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
