"""What was found, in the chat: documents before the question, and sources after the answer."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from mm.tools.index import Hit
from mm.tools.lexical import QUESTION, fold

Message = dict[str, Any]
MARK = re.compile(r"\[(\d{1,3}(?:\s*,\s*\d{1,3})*)\]")  # [1], [1, 2]
SUPPORTED = 0.5  # share of an answer's words that a document must have to be called its source
INSTRUCTION = (
    "Answer from the documents below, and name the one you used by its number in square brackets, as in [1]. "
    "If they do not say it, say that."
)


def with_documents(messages: Sequence[Message], hits: Sequence[Hit]) -> list[Message]:
    """The chat with the hits, numbered from 1, before the content of its last message; without hits, as it is.

    They stand in the user's turn because every chat template has one, and right before the question because small
    models read best what is near. The messages given are not changed. Raises ValueError if the last is not the user's.
    """
    if not messages or messages[-1].get("role") != "user":
        raise ValueError("documents go before a question: the last message must be the user's")
    if not hits:
        return list(messages)
    documents = [
        f"[{number}] {hit.chunk.title or hit.chunk.source}\n{hit.chunk.text}" for number, hit in enumerate(hits, 1)
    ]
    text = "\n\n".join([INSTRUCTION, *documents, "Question: "])
    content = messages[-1]["content"]
    if isinstance(content, str):
        return [*messages[:-1], {**messages[-1], "content": text + content}]
    return [*messages[:-1], {**messages[-1], "content": [{"type": "text", "text": text}, *content]}]


@dataclass(frozen=True)
class Cited:
    """An answer and the hits that it rests on, by their numbers from 1.

    `by` is "marks" where the answer names them itself, "words" where the one is taken that has most of its words, and
    "none" where no document has half of them.
    """

    answer: str
    sources: list[tuple[int, Hit]]
    by: Literal["marks", "words", "none"]

    @property
    def footer(self) -> str:
        """The sources, a line each; "" for an answer to which no document was given."""
        if self.by == "none":
            return "Sources: none of the documents found"
        return "\n".join(["Sources:", *(f"[{number}] {hit.chunk.place}" for number, hit in self.sources)])

    def __str__(self) -> str:
        return f"{self.answer}\n\n{self.footer}"


def cite(answer: str, hits: Sequence[Hit]) -> Cited:
    """Which of the hits that stood before the question the answer rests on. Marks that name no hit do not count."""
    named = [int(number) for marks in MARK.findall(answer) for number in marks.split(",")]
    marked = [number for number in dict.fromkeys(named) if 1 <= number <= len(hits)]
    if marked:
        return Cited(answer, [(number, hits[number - 1]) for number in marked], "marks")
    best = _by_words(answer, hits)
    return Cited(answer, [] if best is None else [(best, hits[best - 1])], "none" if best is None else "words")


def _by_words(answer: str, hits: Sequence[Hit]) -> int | None:
    """The hit with the most of the answer's words, those that few hits have counting more."""
    said = {word for word in fold(MARK.sub(" ", answer)) if len(word) > 1} - QUESTION  # letters of formulas say little
    texts = [set(fold(hit.chunk.indexed)) for hit in hits]
    shared = [said & text for text in texts]
    weight = {word: 1 / sum(word in text for text in texts) for word in set().union(*shared)}
    scores = [sum(weight[word] for word in words) for words in shared]
    if not said or not scores:
        return None
    best = max(range(len(hits)), key=scores.__getitem__)
    return best + 1 if len(shared[best]) >= SUPPORTED * len(said) else None
