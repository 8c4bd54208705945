"""Thinking budgets: a reasoning span gets so many tokens, then it is closed for the model, and the answer follows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from mm.datasets.chat_template import tag_ids
from mm.tokenizers.text import TextTokenizer


@dataclass
class Span:
    """Where a row stands: its last ids, whether it thinks and since how many tokens, and the ids that must come."""

    tail: list[int] = field(default_factory=list)
    inside: bool = False
    spent: int = 0
    forced: list[int] = field(default_factory=list)


class ThinkingBudget:
    """Holds each row's reasoning between the two tags to `budget` tokens: what comes next is then the closing tag,
    token by token. A budget of 0 closes every span as it opens. What opened the answers' turns (`openings`, ids (n,) of
    each row) may have opened one already.

    Tags are special tokens where the tokenizer has them, text otherwise.
    """

    def __init__(
        self, tokenizer: TextTokenizer, openings: Sequence[Tensor], budget: int, tags: tuple[str, str]
    ) -> None:
        self._budget = budget
        self._opening, self._closing = (tag_ids(tokenizer, tag) for tag in tags)
        self._reach = max(len(self._opening), len(self._closing))
        self._rows: list[Span] = []
        for opening in openings:
            inside = is_open(tokenizer, opening, tags)
            forced = list(self._closing) if inside and not budget else []
            self._rows.append(Span(opening.tolist()[-self._reach :], inside, forced=forced))

    def mask(self, logits: Tensor) -> Tensor:
        """(B, V) -> (B, V): rows that must go on with a certain id have all others at -inf."""
        bound = [(row, span.forced[0]) for row, span in enumerate(self._rows) if span.forced]
        if not bound:
            return logits
        rows, ids = (torch.tensor(each, device=logits.device) for each in zip(*bound, strict=True))
        logits = logits.clone()
        logits[rows] = float("-inf")
        logits[rows, ids] = 0.0
        return logits

    def push(self, ids: Sequence[int]) -> None:
        """One more token of each row."""
        for span, token in zip(self._rows, ids, strict=True):
            span.forced = span.forced[1:]
            self._note(span, token)
            if span.inside and not span.forced and span.spent >= self._budget:
                span.forced = list(self._closing)

    def keep(self, rows: Sequence[int]) -> None:
        """Drops every row but `rows`, in that order; one may be named twice."""
        self._rows = [replace(self._rows[row], tail=list(self._rows[row].tail)) for row in rows]

    def _note(self, span: Span, token: int) -> None:
        span.tail = [*span.tail, token][-self._reach :]
        if span.inside:
            span.spent += 1
            span.inside = span.tail[-len(self._closing) :] != self._closing
        elif span.tail[-len(self._opening) :] == self._opening:
            span.inside, span.spent = True, 0


def is_open(tokenizer: TextTokenizer, ids: Tensor, tags: tuple[str, str]) -> bool:
    """Whether ids (n,) end within a span: by the tags' specials where the tokenizer has both, by the text otherwise."""
    specials = [tokenizer.specials.get(tag) for tag in tags]
    if None not in specials:
        known = [specials.index(token) for token in ids.tolist() if token in specials]
        return known[-1:] == [0]
    text = tokenizer.decode(ids[ids >= 0].tolist())
    return text.rfind(tags[0]) > text.rfind(tags[1])
