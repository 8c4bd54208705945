"""What a benchmark is: questions without their answers, what a response is worth, and the official aggregate.

    samples() -> model -> Response -> mark_all() -> Record -> aggregate() -> {"accuracy": 0.98, ...}

Scores are fractions unless a benchmark says otherwise. Chance is computed from the same samples by the same aggregate.
"""

from __future__ import annotations

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from mm.evaluation.records import Mark, Record, Response, make_records
from mm.evaluation.statistics import Mean
from mm.types import Media, Sample

Ask = Literal["text", "choices", "document", "embedding"]


class Benchmark(ABC):
    """A set of questions with official scoring.

    A new one defines `name`, `samples` and, unless exact match is its rule, `score`, `mark_all` or `statistics`.
    Constructors keep each argument under its own name: `config` writes them into every result.

    name            names the result files
    ask             what the model is asked for: "text" that it generates; the likelihoods of `meta["choices"]`, or of a
                    whole "document" (`meta["text"]`); or "embedding"s of the media and of `meta["captions"]`
    plain           the user's text is given as it is, without the chat template: how base language models are measured
    max_new_tokens  bounds a generated answer;   temperature  0 is greedy
    stop            texts that end a generated answer: it is cut before the first of them
    guessable       whether guessing means something: chance is computed
    running_score   whether responses can be scored a few at a time, for the progress bar
    prompt          the instruction that questions carry, kept with the results
    """

    name: str
    ask: Ask = "text"
    plain: bool = False
    max_new_tokens: int = 16
    temperature: float = 0.0
    stop: tuple[str, ...] = ()
    guessable: bool = True
    running_score: bool = True
    prompt: str = ""

    @abstractmethod
    def samples(self) -> list[Sample]:
        """The questions in official order, without answers; meta holds "question", "answers" and "category".

        Where the answers are hidden (a leaderboard's test set), no sample has "answers": it is answered, not scored.
        """

    def origin(self) -> str:
        """Where the questions come from, as error messages call it: a file, a directory or a package."""
        return self.name

    def score(self, sample: Sample, prediction: str) -> float:
        """Exact match with any reference, ignoring case and outer spaces, unless a benchmark says otherwise."""
        return exact_match(prediction, sample.meta["answers"])

    def score_all(self, samples: Sequence[Sample], predictions: Sequence[str]) -> list[float]:
        """The scores of many predictions; overridden where the official score of one depends on those before it."""
        return [self.score(sample, text) for sample, text in zip(samples, predictions, strict=True)]

    def mark_all(self, samples: Sequence[Sample], responses: Sequence[Response]) -> list[Mark]:
        """What the responses are worth; overridden where a score needs more than the text, or leaves details."""
        return [Mark(score) for score in self.score_all(samples, [response.text for response in responses])]

    def statistics(self, records: Sequence[Record]) -> dict[str, Mean]:
        """The scores as means over records, from which their intervals come: overall, then each category."""
        return {"accuracy": mean_of(records), **by_category(records)}

    def aggregate(self, records: Sequence[Record]) -> dict[str, float]:
        """The official numbers, and first the one by which the benchmark is known."""
        return {name: statistic.value for name, statistic in self.statistics(records).items()}

    def controlled(self, sample: Sample) -> bool:
        """Whether the controls (question only, shuffled media) ask this question: by default, all that have media."""
        return bool(sample.media)

    def aggregate_controls(self, records: Sequence[Record]) -> dict[str, float]:
        """As `aggregate`, for the records of a control: only numbers that the controlled subset can stand for."""
        return self.aggregate(records)

    def chance_score(self, samples: Sequence[Sample]) -> list[float]:
        """The expected score of each question under uniform guessing: among its choices, or else among the answers that
        its category has here."""
        answers: dict[str, set[str]] = {}
        for sample in samples:
            answers.setdefault(sample.meta["category"], set()).update(map(str, sample.meta["answers"]))
        return [
            1 / len(sample.meta["choices"])
            if sample.meta.get("choices")
            else sum(self.score(sample, guess) for guess in set(map(str, sample.meta["answers"])))
            / len(answers[sample.meta["category"]])
            for sample in samples
        ]

    def chance_marks(self, samples: Sequence[Sample]) -> list[Mark]:
        """`chance_score` as marks; overridden where the statistics need more than a score."""
        return [Mark(score) for score in self.chance_score(samples)]

    def chance(self, samples: Sequence[Sample] | None = None, limit: int | None = None) -> dict[str, float]:
        """What a random choice would score, by the same aggregate and from the same data as the scores.

        `samples` is the whole benchmark, whose answers a guesser knows; `limit` as the first questions are scored.
        """
        if not self.guessable:
            return {}
        samples = self.samples() if samples is None else samples
        marks = self.chance_marks(samples)[:limit]
        return self.aggregate(make_records(samples[:limit], [Response()] * len(marks), marks))

    def submission(self, records: Sequence[Record]) -> dict[str, Any]:
        """Files as the benchmark's own server or script takes them: {file name: JSON value, or text as it is}."""
        return {}

    def config(self) -> dict[str, Any]:
        """{"class_path", "init_args"}: what builds this benchmark again."""
        names = [name for name in inspect.signature(type(self).__init__).parameters if name != "self"]
        arguments = {name: vars(self)[name] for name in names if name in vars(self)}
        return {"class_path": f"{type(self).__module__}.{type(self).__qualname__}", "init_args": _plain(arguments)}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def records_of(samples: Sequence[Sample], predictions: Sequence[str], scores: Sequence[float]) -> list[Record]:
    return make_records(samples, [Response(text) for text in predictions], [Mark(score) for score in scores])


def exact_match(prediction: str, answers: Iterable[str]) -> float:
    return float(prediction.strip().lower() in {answer.strip().lower() for answer in answers})


def mean_of(records: Sequence[Record], key: str | None = None) -> Mean:
    """The mean score of records, or of a number in their details (a record without it counts with its score)."""
    values = [record.score if key is None else record.details.get(key, record.score) for record in records]
    return Mean(values, [record.weight for record in records])


def by_category(records: Iterable[Record], label: str = "accuracy") -> dict[str, Mean]:
    """{"yes_no_accuracy": mean score of category "yes/no", ...} in alphabetical order."""
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(record.category, []).append(record)
    return {score_name(category, label): mean_of(group) for category, group in sorted(groups.items())}


def score_name(category: str, label: str = "accuracy") -> str:
    """`yes/no` -> `yes_no_accuracy`."""
    return f"{category.replace('/', '_').replace(' ', '_')}_{label}"


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


def question(key: str, text: str, meta: Mapping[str, Any], media: Sequence[Media] = (), prompt: str = "") -> Sample:
    """One user turn: the media, then `text` with `prompt` after it. `meta` may give the shorter "question" to show."""
    parts: list[dict[str, Any]] = [{"type": item.kind, "media": index} for index, item in enumerate(media)]
    content: Any = [*parts, {"type": "text", "text": text + prompt}] if parts else text + prompt
    return Sample(key, [{"role": "user", "content": content}], list(media), meta={"question": text, **meta})


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
    """Raises ValueError, naming the id and `origin`, for duplicate ids, questions without answers where others have
    some, and no questions."""
    if not samples:
        raise ValueError(f"{origin}: no questions")
    hidden = answers_hidden(samples)
    seen: set[str] = set()
    for sample in samples:
        if sample.key in seen:
            raise ValueError(f"{origin}: the id {sample.key!r} appears twice")
        seen.add(sample.key)
        answers = sample.meta.get("answers")
        if not hidden and (not answers or not all(_text_of(answer).strip() for answer in answers)):
            raise ValueError(f"{origin}: question {sample.key!r} has an empty answer: {answers!r}")


def answers_hidden(samples: Sequence[Sample]) -> bool:
    """Whether this is a leaderboard's test set: no sample brings answers."""
    return all("answers" not in sample.meta for sample in samples)


def hidden_records(samples: Sequence[Sample], responses: Sequence[Response]) -> list[Record]:
    """Records of a test set whose answers are hidden: without scores."""
    return make_records(samples, responses, [Mark(math.nan)] * len(samples))


def _text_of(answer: Any) -> str:
    return str(answer["answer"] if isinstance(answer, Mapping) else answer)
