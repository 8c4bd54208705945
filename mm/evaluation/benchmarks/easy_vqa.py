"""easy-VQA's own test split (PyPI package easy-vqa, MIT): 9,673 questions about 1,000 images of one coloured shape.

Two thirds are yes/no questions that text alone answers four times in five, so the 2,537 colour and shape questions are
reported apart, and the controls ask only those.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from mm.datasets.sources.easy_vqa import EasyVQA
from mm.evaluation.benchmarks.base import Benchmark, Record, category_accuracies, mean, questions_of
from mm.types import Sample

YES_NO = "yes/no"


class EasyVQABenchmark(Benchmark):
    name = "easy_vqa"
    max_new_tokens = 8  # every answer is one word: a few tokens in any vocabulary

    def __init__(self, split: Literal["train", "test"] = "test") -> None:
        self.split: Literal["train", "test"] = split

    def samples(self) -> list[Sample]:
        return questions_of(EasyVQA(split=self.split, branches=False))

    def origin(self) -> str:
        return f"package easy-vqa, {self.split} split"

    def aggregate(self, records: Sequence[Record]) -> dict[str, float]:
        """accuracy, color_shape_accuracy, and color_, shape_ and yes_no_accuracy, where there are such questions."""
        return {"accuracy": mean(records), **self.aggregate_controls(records)}

    def aggregate_controls(self, records: Sequence[Record]) -> dict[str, float]:
        pictured = [record for record in records if record.category != YES_NO]
        together = {"color_shape_accuracy": mean(pictured)} if pictured else {}
        return together | category_accuracies(records)

    def controlled(self, sample: Sample) -> bool:
        return sample.meta["category"] != YES_NO
