"""An answer with tools: the model's calls are run and their results go back to it until it answers without one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from mm.generation.engine import generate
from mm.generation.requests import GenerativeModel
from mm.tools.calls import ToolCall, result_message
from mm.tools.choose import Message, Plan, Tools
from mm.tools.documents import Cited, cite
from mm.tools.held import CallFilter
from mm.tools.index import Hit
from mm.tools.router import Decision
from mm.tools.toolbox import Result, Toolbox
from mm.types import Sample

ROUNDS = 4


@dataclass(frozen=True)
class Called:
    """The calls that an answer made, with their results, and what of it joins the chat: what the model wrote, and what
    it was told."""

    steps: list[tuple[ToolCall, Result]]
    messages: list[Message]


def converse(
    plan: Plan, toolbox: Toolbox, write: Callable[[list[Message]], Iterable[str]], rounds: int = ROUNDS
) -> Iterator[str | Called]:
    """The answer's text piece by piece, and between its rounds what was called. `write` answers a chat."""
    if not plan.offered:
        yield from write(plan.messages)
        return
    messages, found = plan.messages, len(plan.hits)
    for _ in range(rounds):
        held, written = CallFilter(toolbox.names), list[str]()
        for piece in write(messages):
            written.append(piece)
            if text := held.push(piece):
                yield text
        rest, calls = held.end()
        if rest:
            yield rest
        if not calls:
            return
        steps: list[tuple[ToolCall, Result]] = []
        for call in calls:
            result = toolbox.run(call, first=found + 1)
            found += len(result.hits)
            steps.append((call, result))
        told = "\n".join(result_message(call, result.text)["content"] for call, result in steps)
        said = [{"role": "assistant", "content": "".join(written)}, {"role": "user", "content": told}]
        messages = [*messages, *said]
        yield Called(steps, said)


@dataclass(frozen=True)
class ToolAnswer:
    """The answer's text, the sources that it rests on (None if nothing was looked up), every call with its result, and
    what the probe decided (None without one). `finished` is False where the rounds ran out on a call."""

    text: str
    cited: Cited | None
    steps: list[tuple[ToolCall, Result]]
    decision: Decision | None
    finished: bool


def answer(
    model: GenerativeModel,
    sample: Sample,
    tools: Tools,
    rounds: int = ROUNDS,
    max_new_tokens: int = 256,
    **options: Any,
) -> ToolAnswer:
    """Answers the sample's last question. `options` are those of `generate`. Raises ValueError as `generate` does."""

    def write(messages: list[Message]) -> Iterator[str]:
        (written,) = generate(model, [replace(sample, messages=messages)], max_new_tokens, **options)
        yield written.text

    plan = tools.plan(model, sample)
    hits, steps, text, calls = list[Hit](plan.hits), list[tuple[ToolCall, Result]](), "", 0
    for part in converse(plan, tools.toolbox, write, rounds):
        if isinstance(part, Called):
            steps += part.steps
            hits += [hit for _, result in part.steps for hit in result.hits]
            text, calls = "", calls + 1  # what was said before a call is not the answer
        else:
            text += part
    return ToolAnswer(text.strip(), cite(text, hits) if hits else None, steps, plan.decision, calls < rounds)
