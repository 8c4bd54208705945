"""What a benchmark is: questions without their answers, a score for one prediction, and the official aggregate.

    samples() -> model -> prediction -> score() -> Record -> aggregate() -> {"accuracy": 0.98, ...}

Scores are fractions. Chance is computed from the same samples by the same aggregate.
"""

from __future__ import annotations

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mm.types import Media, Sample


@dataclass
class Record:
    """One question, what the model said and what that was worth. `media` names a file kept for the gallery."""

    id: str
    question: str
    answers: list[Any]
    prediction: str
    score: float
    category: str
    media: str | None = None


class Benchmark(ABC):
    """A set of questions with official scoring.

    A new one defines `name`, `samples` and, unless exact match is its rule, `score` and `aggregate`. Constructors keep
    each argument under its own name: `config` writes them into every result.

    `name` names the result files; `max_new_tokens` bounds an answer; `prompt` is the instruction that questions carry,
    kept with the results.
    """

    name: str
    max_new_tokens: int = 16
    prompt: str = ""

    @abstractmethod
    def samples(self) -> list[Sample]:
        """The questions in official order, without answers; meta holds "question", "answers" and "category"."""

    def origin(self) -> str:
        """Where the questions come from, as error messages call it: a file, a directory or a package."""
        return self.name

    def score(self, sample: Sample, prediction: str) -> float:
        """Exact match with any reference, ignoring case and outer spaces, unless a benchmark says otherwise."""
        return exact_match(prediction, sample.meta["answers"])

    def score_all(self, samples: Sequence[Sample], predictions: Sequence[str]) -> list[float]:
        """The scores of many predictions; overridden where the official score of one depends on those before it."""
        return [self.score(sample, text) for sample, text in zip(samples, predictions, strict=True)]

    def aggregate(self, records: Sequence[Record]) -> dict[str, float]:
        """{"accuracy": mean score} and the mean of each category, as fractions."""
        return {"accuracy": mean(records), **category_accuracies(records)}

    def controlled(self, sample: Sample) -> bool:
        """Whether the controls (question only, shuffled media) ask this question: by default, all that have media."""
        return bool(sample.media)

    def aggregate_controls(self, records: Sequence[Record]) -> dict[str, float]:
        """As `aggregate`, for the records of a control: only numbers that the controlled subset can stand for."""
        return self.aggregate(records)

    def chance_score(self, samples: Sequence[Sample]) -> list[float]:
        """The expected score of each question under uniform guessing: among the answers that its category has here."""
        answers: dict[str, set[str]] = {}
        for sample in samples:
            answers.setdefault(sample.meta["category"], set()).update(map(str, sample.meta["answers"]))
        return [
            sum(self.score(sample, guess) for guess in set(map(str, sample.meta["answers"])))
            / len(answers[sample.meta["category"]])
            for sample in samples
        ]

    def chance(self, samples: Sequence[Sample] | None = None, limit: int | None = None) -> dict[str, float]:
        """What guessing would score, by the same aggregate and from the same data as the scores.

        `samples` is the whole benchmark, whose answers a guesser knows; `limit` as the first questions are scored.
        """
        samples = self.samples() if samples is None else samples
        scores = self.chance_score(samples)[:limit]
        return self.aggregate(records_of(samples[:limit], [""] * len(scores), scores))

    def config(self) -> dict[str, Any]:
        """{"class_path", "init_args"}: what builds this benchmark again."""
        names = [name for name in inspect.signature(type(self).__init__).parameters if name != "self"]
        arguments = {name: vars(self)[name] for name in names if name in vars(self)}
        plain = {name: str(value) if isinstance(value, Path) else value for name, value in arguments.items()}
        return {"class_path": f"{type(self).__module__}.{type(self).__qualname__}", "init_args": plain}


def records_of(samples: Sequence[Sample], predictions: Sequence[str], scores: Sequence[float]) -> list[Record]:
    return [
        Record(sample.key, sample.meta["question"], sample.meta["answers"], text, float(score), sample.meta["category"])
        for sample, text, score in zip(samples, predictions, scores, strict=True)
    ]


def exact_match(prediction: str, answers: Iterable[str]) -> float:
    return float(prediction.strip().lower() in {answer.strip().lower() for answer in answers})


def mean(records: Sequence[Record]) -> float:
    if not records:
        raise ValueError("no records to average: the benchmark, or the part of it that was asked for, is empty")
    return math.fsum(record.score for record in records) / len(records)


def category_accuracies(records: Iterable[Record]) -> dict[str, float]:
    """{"yes_no_accuracy": mean score of category "yes/no", ...} in alphabetical order."""
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(record.category, []).append(record)
    return {score_name(category): mean(group) for category, group in sorted(groups.items())}


def score_name(category: str) -> str:
    """`yes/no` -> `yes_no_accuracy`."""
    return f"{category.replace('/', '_').replace(' ', '_')}_accuracy"


def questions_of(samples: Iterable[Sample]) -> list[Sample]:
    """Solved examples as questions: the closing assistant turn goes, and samples that show the same media share one
    `Media` object (so that it need be read once)."""
    shared: dict[Any, Media] = {}
    questions = []
    for sample in samples:
        messages = sample.messages
        while messages and messages[-1]["role"] == "assistant":
            messages = messages[:-1]
        media = [shared.setdefault((item.kind, item.data, item.name), item) for item in sample.media]
        questions.append(replace(sample, messages=messages, media=media))
    return questions


def split_branches(sample: Sample) -> list[Sample]:
    """One solved single-question sample per branch of `sample`, all showing the same media."""
    *before, shown = sample.messages
    singles = []
    for number, (ask, *answer) in enumerate(sample.branches):
        text = answer[0]["content"]
        content = [*shown["content"], {"type": "text", "text": ask["content"]}]
        shared = {name: value for name, value in sample.meta.items() if name != "question_types"}
        category = sample.meta["question_types"][number]
        meta = {**shared, "question": ask["content"], "answers": [text], "category": category}
        messages = [*before, {**shown, "content": content}, *answer]
        singles.append(Sample(f"{sample.key}_{number}", messages, sample.media, [], meta))
    return singles


def end_with(sample: Sample, text: str) -> Sample:
    """The sample with `text` at the end of its last turn: one piece with the text before it, as it is tokenised."""
    *before, last = sample.messages
    content = last["content"]
    if isinstance(content, str):
        content = content + text
    elif content[-1]["type"] == "text":
        content = [*content[:-1], {"type": "text", "text": content[-1]["text"] + text}]
    else:
        content = [*content, {"type": "text", "text": text}]
    return replace(sample, messages=[*before, {**last, "content": content}])


def check_samples(samples: Sequence[Sample], origin: str) -> None:
    """Raises ValueError, naming the id and `origin`, for duplicate ids, questions without answers, and no questions."""
    if not samples:
        raise ValueError(f"{origin}: no questions")
    seen: set[str] = set()
    for sample in samples:
        if sample.key in seen:
            raise ValueError(f"{origin}: the id {sample.key!r} appears twice")
        seen.add(sample.key)
        answers = sample.meta.get("answers")
        if not answers or not all(_text_of(answer).strip() for answer in answers):
            raise ValueError(f"{origin}: question {sample.key!r} has an empty answer: {answers!r}")


def _text_of(answer: Any) -> str:
    return str(answer["answer"] if isinstance(answer, Mapping) else answer)
