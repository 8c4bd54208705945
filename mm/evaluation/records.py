"""What a model gave for one sample, what it was worth, and the line about it in the predictions file."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from mm.types import Sample


@dataclass(frozen=True)
class Response:
    """What a model gave for one sample.

    text            generated, or the likeliest choice
    loglikelihoods  nats: of each choice, or of the document
    tokens          how many tokens each of those has
    confidence      probability that the model gives to its text, if it was measured
    vectors         of an embedding benchmark: the media's, then each text's, unit length
    """

    text: str = ""
    loglikelihoods: tuple[float, ...] = ()
    tokens: tuple[int, ...] = ()
    confidence: float | None = None
    vectors: tuple[tuple[float, ...], ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Only what is there."""
        return {name: value for name, value in asdict(self).items() if value not in ((), None)}

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> Response:
        plain = dict(value)
        for name in ("loglikelihoods", "tokens"):
            plain[name] = tuple(plain.get(name, ()))
        plain["vectors"] = tuple(tuple(vector) for vector in plain.get("vectors", ()))
        return Response(**plain)


@dataclass(frozen=True)
class Mark:
    """What one response was worth. `weight` is its part of a mean (words of a transcript, tokens of a document);
    `details` go into the predictions file, and to the benchmark's own statistics."""

    score: float
    weight: float = 1.0
    details: dict[str, Any] = field(default_factory=dict)


@dataclass
class Record:
    """One question, what the model said and what that was worth. `media` names a file kept for the gallery.

    `score` is NaN where the answers are hidden (a leaderboard's test set).
    """

    id: str
    question: str
    answers: list[Any]
    prediction: str
    score: float
    category: str
    media: str | None = None
    weight: float = 1.0
    confidence: float | None = None
    details: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """A line of the predictions file: weight 1, and what is absent, are left out."""
        line = asdict(self)
        if math.isnan(self.score):
            line["score"] = None
        if self.weight == 1.0:
            del line["weight"]
        for name in ("confidence", "details"):
            if not line[name]:
                del line[name]
        return line

    @staticmethod
    def from_json(line: Mapping[str, Any]) -> Record:
        """Raises TypeError for keys that a record does not have, or lacks."""
        score = line.get("score")
        return Record(**{**line, "score": math.nan if score is None else float(score)})


def make_records(samples: Sequence[Sample], responses: Sequence[Response], marks: Sequence[Mark]) -> list[Record]:
    return [
        Record(
            id=sample.key,
            question=sample.meta["question"],
            answers=list(sample.meta.get("answers") or []),
            prediction=response.text,
            score=float(mark.score),
            category=sample.meta["category"],
            weight=mark.weight,
            confidence=response.confidence,
            details=mark.details,
        )
        for sample, response, mark in zip(samples, responses, marks, strict=True)
    ]
