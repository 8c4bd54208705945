"""An answer with tools: the model's calls are run and their results go back to it until it answers without one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from mm.generation.engine import generate
from mm.generation.requests import GenerativeModel
from mm.tools.calls import ToolCall, describe, result_message
from mm.tools.documents import Cited, cite, with_documents
from mm.tools.index import Hit
from mm.tools.router import NONE, Decision, Router
from mm.tools.toolbox import Result, Toolbox
from mm.types import Sample

Message = dict[str, Any]


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
    toolbox: Toolbox,
    router: Router | None = None,
    rounds: int = 4,
    max_new_tokens: int = 256,
    **options: Any,
) -> ToolAnswer:
    """Answers the sample's last question. With a probe in `router`, it decides which tool is offered, or none; without,
    all of the toolbox are. `options` are those of `generate`. Raises ValueError as `generate` does.
    """
    router = router or Router(toolbox.names)
    messages, hits = list(sample.messages), list[Hit]()
    decision = None if router.probe is None else router.by_prompt(model, sample)
    offered = toolbox.names if decision is None else () if decision.tool == NONE else (decision.tool,)
    if decision is not None and decision.tool == "retrieval":
        hits = toolbox.search(question(messages))
        messages = with_documents(messages, hits)
    elif offered:
        messages = _with_system(messages, describe(toolbox.declarations(*offered)))
    steps: list[tuple[ToolCall, Result]] = []
    text, finished = "", False
    for _ in range(rounds):
        (written,) = generate(model, [replace(sample, messages=messages)], max_new_tokens, **options)
        said = router.by_text(written.text) if offered else Decision(NONE, text=written.text)
        text = said.text
        if finished := not said.calls:
            break
        results = []
        for call in said.calls:
            result = toolbox.run(call, first=len(hits) + 1)
            hits += result.hits
            steps.append((call, result))
            results.append(result_message(call, result.text)["content"])
        replies = {"role": "user", "content": "\n".join(results)}
        messages = [*messages, {"role": "assistant", "content": written.text}, replies]
    return ToolAnswer(text, cite(text, hits) if hits else None, steps, decision, finished)


def question(messages: Sequence[Message]) -> str:
    """The text of the last message."""
    content = messages[-1]["content"]
    if isinstance(content, str):
        return content
    return "\n".join(part["text"] for part in content if part["type"] == "text")


def _with_system(messages: list[Message], text: str) -> list[Message]:
    """The chat with a text at the end of its system prompt."""
    if not messages or messages[0]["role"] != "system":
        return [{"role": "system", "content": text}, *messages]
    content = messages[0]["content"]
    joined = f"{content}\n\n{text}" if isinstance(content, str) else [*content, {"type": "text", "text": f"\n\n{text}"}]
    return [{**messages[0], "content": joined}, *messages[1:]]
