"""One question's way to its answer."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

from mm.generation.engine import FinishReason, Stream
from mm.generation.tickets import Ticket
from mm.types import Sample

if TYPE_CHECKING:  # most chats have no tools
    from mm.chat.session import ChatSession
    from mm.tools.answer import Called


@dataclass(frozen=True)
class Statistics:
    """One answer: positions of its prompt, tokens generated, seconds to the first piece and in all. `finish_reason` is
    None for an answer that was stopped; `kept` of the prompt's positions were known from turns before; `reasoning` is
    what came before the answer, None where there was none."""

    prompt_length: int
    tokens: int
    first_seconds: float
    seconds: float
    finish_reason: FinishReason | None
    kept: int = 0
    reasoning: str | None = None


class Turn:
    """One question's way to its answer: a generation, or with tools one a round. `answer` is the latest."""

    def __init__(self, session: ChatSession, sample: Sample) -> None:
        self.session, self.sample = session, sample
        self.answer: Ticket | Stream | None = None
        self.reason: FinishReason | None = None
        self.pieces: list[str] = []
        self._start, self._first, self._kept = time.perf_counter(), 0.0, 0

    def parts(self) -> Iterator[str | Called]:
        session, tools = self.session, self.session.tools
        session.hits, session.steps = [], []
        if tools is None:
            yield from self._write(self.sample.messages)
            return
        from mm.tools.answer import Called, converse

        # Documents are for this answer alone: the chat keeps the question as it was asked.
        plan = tools.plan(session.model, self.sample)
        session.hits = list(plan.hits)
        for part in converse(plan, tools.toolbox, self._write):
            if isinstance(part, Called):
                session.steps += part.steps
                session.hits += [hit for _, result in part.steps for hit in result.hits]
            yield part

    def _write(self, messages: list[dict[str, Any]]) -> Iterator[str]:
        self.answer = self.session.begin(replace(self.sample, messages=messages))
        for piece in self.answer:
            self._first = self._first or time.perf_counter() - self._start
            yield piece
        self.end()

    def end(self) -> None:
        """Frees what the latest generation holds, however it has ended."""
        if self.answer is not None:
            self.reason = cast(FinishReason | None, self.answer.finish_reason)
            self._kept = self.session.free(self.answer)

    def statistics(self, answer: Ticket | Stream) -> Statistics:
        seconds = time.perf_counter() - self._start
        tokens = len(answer.ids)
        return Statistics(answer.prompt_length, tokens, self._first, seconds, self.reason, self._kept, answer.reasoning)
