"""MMMU (Yue et al. 2024): college-level questions with images; official prompts, parsing and aggregation.

Files (https://huggingface.co/datasets/MMMU/MMMU): one folder a subject with `validation-00000-of-00001.parquet`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from mm.datasets.sources.mmmu import MMMU
from mm.evaluation.benchmarks.base import Benchmark, Record, end_with, questions_of
from mm.evaluation.scorers import mmmu
from mm.types import Sample

# mmmu/configs/llava1.5.yaml, as YAML reads it
CHOICE_PROMPT = "\n\nAnswer with the option's letter from the given choices directly."
OPEN_PROMPT = "\nAnswer the question using a single word or phrase."
MULTIPLE_CHOICE = "multiple-choice"


class MMMUBenchmark(Benchmark):
    """The questions of one split, each image where its `<image k>` stands.

    Args:
        path: the folder of parquet files (searched below it), or one file.
        split: "validation" or "dev": what the files' names begin with.
    """

    name = "mmmu"
    max_new_tokens = 64
    prompt = f"multiple choice: {CHOICE_PROMPT!r}; open: {OPEN_PROMPT!r}"

    def __init__(self, path: Path, split: str = "validation") -> None:
        self.path = path
        self.split = split

    def samples(self) -> list[Sample]:
        """Subjects in the official (alphabetical) order: the stream of random letters depends on it."""
        solved = sorted(MMMU(self.path, self.split, hint=False), key=lambda sample: sample.meta["category"])
        questions = questions_of(replace(sample, key=sample.meta["id"]) for sample in solved)
        return [end_with(question, CHOICE_PROMPT if _has_choices(question) else OPEN_PROMPT) for question in questions]

    def origin(self) -> str:
        return str(self.path)

    def score(self, sample: Sample, prediction: str) -> float:
        """1.0 or 0.0; a prediction without a letter draws from a fresh official stream (`score_all` shares one)."""
        return self.score_all([sample], [prediction])[0]

    def score_all(self, samples: Sequence[Sample], predictions: Sequence[str]) -> list[float]:
        rng = mmmu.official_rng()
        scores = []
        for sample, text in zip(samples, predictions, strict=True):
            answers = sample.meta["answers"]
            if _has_choices(sample):
                letter = mmmu.parse_multi_choice(text, sample.meta["all_choices"], sample.meta["index2ans"], rng)
                scores.append(float(mmmu.multi_choice_correct(answers, letter)))
            else:
                scores.append(float(mmmu.open_correct(answers, mmmu.parse_open(text))))
        return scores

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


def _has_choices(sample: Sample) -> bool:
    return sample.meta["question_type"] == MULTIPLE_CHOICE
