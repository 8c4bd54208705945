"""easy-VQA's own test split (PyPI package easy-vqa, MIT): 9,673 questions about 1,000 images of one coloured shape.

Two thirds are yes/no questions that text alone answers four times in five, so the 2,537 colour and shape questions are
reported apart, and the controls ask only those.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from mm.datasets.sources.easy_vqa import EasyVQA
from mm.evaluation.benchmarks.base import Benchmark, by_category, mean_of, questions_of
from mm.evaluation.records import Record
from mm.evaluation.statistics import Mean
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

    def statistics(self, records: Sequence[Record]) -> dict[str, Mean]:
        """accuracy, color_shape_accuracy, and color_, shape_ and yes_no_accuracy, where there are such questions."""
        pictured = [record for record in records if record.category != YES_NO]
        together = {"color_shape_accuracy": mean_of(pictured)} if pictured else {}
        return {"accuracy": mean_of(records), **together, **by_category(records)}

    def aggregate_controls(self, records: Sequence[Record]) -> dict[str, float]:
        """Of the colour and shape questions: their accuracy is not that of all."""
        return {name: score for name, score in self.aggregate(records).items() if name != "accuracy"}

    def controlled(self, sample: Sample) -> bool:
        return sample.meta["category"] != YES_NO
