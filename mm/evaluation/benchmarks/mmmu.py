"""MMMU (Yue et al. 2024): college-level questions with images; official prompts, parsing and aggregation.

Files (https://huggingface.co/datasets/MMMU/MMMU): one folder a subject with `validation-00000-of-00001.parquet`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mm.datasets.sources.mmmu import CHOICE_HINT, MMMU, OPEN_HINT
from mm.evaluation.benchmarks.base import Benchmark, questions_of
from mm.evaluation.records import Mark, Record, Response
from mm.evaluation.scorers import mmmu
from mm.types import Sample

MULTIPLE_CHOICE = "multiple-choice"


class MMMUBenchmark(Benchmark):
    """The questions of one split, each image where its `<image k>` stands.

    Args:
        path: the folder of parquet files (searched below it), or one file.
        split: "validation" or "dev": what the files' names begin with.
    """

    name = "mmmu"
    max_new_tokens = 64
    prompt = f"multiple choice: {CHOICE_HINT!r}; open: {OPEN_HINT!r}"

    def __init__(self, path: Path, split: str = "validation") -> None:
        self.path = path
        self.split = split

    def samples(self) -> list[Sample]:
        """Subjects in the official (alphabetical) order: the stream of random letters depends on it."""
        solved = sorted(MMMU(self.path, self.split), key=lambda sample: sample.meta["category"])
        questions = questions_of(replace(sample, key=sample.meta["id"]) for sample in solved)
        if all(question.meta["answers"] == ["?"] for question in questions):  # the test split hides them
            for question in questions:
                del question.meta["answers"]
        return questions

    def origin(self) -> str:
        return str(self.path)

    def score(self, sample: Sample, prediction: str) -> float:
        """1.0 or 0.0; a prediction without a letter draws from a fresh official stream (`score_all` shares one)."""
        return self.score_all([sample], [prediction])[0]

    def score_all(self, samples: Sequence[Sample], predictions: Sequence[str]) -> list[float]:
        return [mark.score for mark in self.mark_all(samples, [Response(text) for text in predictions])]

    def mark_all(self, samples: Sequence[Sample], responses: Sequence[Response]) -> list[Mark]:
        """In order, for a response without a letter draws the next one of the official stream."""
        parsed = _parse(samples, [response.text for response in responses])
        marks = []
        for sample, letter in zip(samples, parsed, strict=True):
            answers = sample.meta["answers"]
            if _has_choices(sample):
                marks.append(Mark(float(mmmu.multi_choice_correct(answers, letter)), details={"parsed": letter}))
            else:
                marks.append(Mark(float(mmmu.open_correct(answers, mmmu.parse_open(letter)))))
        return marks

    def aggregate(self, records: Sequence[Record]) -> dict[str, float]:
        """Overall ("accuracy"), then domains and subjects that have questions; rounded to 3 as officially printed."""
        by_subject: dict[str, list[float]] = {}
        for record in records:
            by_subject.setdefault(record.category, []).append(record.score)
        table = mmmu.tabulate(by_subject)
        overall = table.pop("Overall")["acc"]
        return {"accuracy": overall} | {name: row["acc"] for name, row in table.items() if row["num"]}

    def chance_score(self, samples: Sequence[Sample]) -> list[float]:
        """1 / number of options; an open question cannot be guessed."""
        return [1 / len(s.meta["all_choices"]) if _has_choices(s) else 0.0 for s in samples]

    def submission(self, records: Sequence[Record]) -> dict[str, Any]:
        """Both official forms: `answers.json` {id: letter or text}, and one `SUBJECT/output.json` a subject."""
        by_id = {sample.key: sample for sample in self.samples()}
        samples = [by_id[record.id] for record in records]
        parsed = _parse(samples, [record.prediction for record in records])
        files: dict[str, Any] = {"answers.json": {r.id: text for r, text in zip(records, parsed, strict=True)}}
        for sample, record in zip(samples, records, strict=True):
            answers = sample.meta.get("answers", ["?"])
            entry = {
                "id": record.id,
                "question_type": sample.meta["question_type"],
                "answer": answers[0] if len(answers) == 1 else answers,
                "all_choices": sample.meta["all_choices"],
                "index2ans": sample.meta["index2ans"],
                "response": record.prediction,
            }
            files.setdefault(f"{record.category}/output.json", []).append(entry)
        return files


def _parse(samples: Sequence[Sample], predictions: Sequence[str]) -> list[str]:
    """The letter of a multiple-choice response (one official stream over all), the text of an open one."""
    rng = mmmu.official_rng()
    return [
        mmmu.parse_multi_choice(text, sample.meta["all_choices"], sample.meta["index2ans"], rng)
        if _has_choices(sample)
        else text
        for sample, text in zip(samples, predictions, strict=True)
    ]


def _has_choices(sample: Sample) -> bool:
    return sample.meta["question_type"] == MULTIPLE_CHOICE
