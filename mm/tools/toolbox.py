"""The tools that there are, by the names that calls use: retrieval, calculator, code."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from mm.tools.calculator import calculate
from mm.tools.calls import ToolCall, declaration
from mm.tools.code import CodeTool
from mm.tools.index import Hit, Index

NAMES = ("retrieval", "calculator", "code")
# name -> (its one argument, what it is, what the tool does)
_ABOUT: dict[str, tuple[str, str, str]] = {
    "retrieval": ("query", "what to look for, in words", "finds passages of the indexed documents"),
    "calculator": ("expression", "arithmetic, such as (3 + 4) * 12 / sqrt(2)", "computes a number exactly"),
    "code": ("program", "a Python program that prints its result", "runs a program; standard library, no network"),
}


@dataclass(frozen=True)
class Result:
    """What a call gave: text for the model, and the hits in it. `failed`: the text says what was wrong."""

    text: str
    hits: list[Hit] = field(default_factory=list)
    failed: bool = False


class Toolbox:
    """`retrieval` is there with an `index` (the best `k` chunks), `code` with a `CodeTool`; the calculator always."""

    def __init__(self, index: Index | None = None, code: CodeTool | None = None, k: int = 3) -> None:
        self.index, self.code, self.k = index, code, k
        self._run: dict[str, Callable[[str, int], Result]] = {"calculator": lambda text, first: Result(calculate(text))}
        if index is not None:
            self._run["retrieval"] = self._retrieve
        if code is not None:
            self._run["code"] = lambda text, first: Result(code(text))
        self.names = tuple(name for name in NAMES if name in self._run)

    def declarations(self, *names: str) -> list[dict[str, Any]]:
        """As a request's `tools` would declare them; all that there are unless named."""
        return [_declared(name) for name in self.names if not names or name in names]

    def search(self, query: str) -> list[Hit]:
        return [] if self.index is None else self.index.search(query, self.k)

    def run(self, call: ToolCall, first: int = 1) -> Result:
        """The result of a call. What the model got wrong is a result too, that says so; `first` numbers the passages.

        Raises RuntimeError where this machine cannot contain a program.
        """
        if call.name not in self._run:
            off = "is switched off" if call.name in NAMES else "does not exist"
            return Result(f"the tool {call.name!r} {off}; there are {', '.join(self.names)}", failed=True)
        argument = _ABOUT[call.name][0]
        value = call.arguments.get(argument)
        if isinstance(value, int | float) and not isinstance(value, bool):
            value = str(value)  # {"expression": 42}
        if not isinstance(value, str) or not value.strip():
            return Result(f"{call.name} needs the argument {argument!r}, as text", failed=True)
        try:
            return self._run[call.name](value, first)
        except ValueError as error:
            return Result(str(error), failed=True)

    def _retrieve(self, query: str, first: int) -> Result:
        hits = self.search(query)
        lines = [f"[{n}] {hit.chunk.title or hit.chunk.source}\n{hit.chunk.text}" for n, hit in enumerate(hits, first)]
        return Result("\n\n".join(lines) or "nothing was found", hits)


def _declared(name: str) -> dict[str, Any]:
    argument, meaning, effect = _ABOUT[name]
    properties = {argument: {"type": "string", "description": meaning}}
    schema = {"type": "object", "properties": properties, "required": [argument], "additionalProperties": False}
    return declaration(name, effect, schema)
