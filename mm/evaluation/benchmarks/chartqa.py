"""ChartQA (Masry et al. 2022): questions about charts, scored by relaxed accuracy.

Files (https://github.com/vis-nlp/ChartQA): the folder `ChartQA Dataset/test` with `test_human.json`,
`test_augmented.json` and `png/`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mm.datasets.source import field, media_file, read_json
from mm.evaluation.benchmarks.base import Benchmark, by_category, mean_of, question
from mm.evaluation.records import Record
from mm.evaluation.scorers.relaxed import relaxed_accuracy
from mm.evaluation.statistics import Mean
from mm.types import Sample

PARTS = ("human", "augmented")


class ChartQABenchmark(Benchmark):
    """Both halves of a split; the score is their mean over questions (the halves are equal), and each half's own.

    Args:
        path: the folder of the split.
        split: what the files' names begin with.
        prompt: follows each question (by default LLaVA's).
    """

    name = "chartqa"
    max_new_tokens = 16
    guessable = False  # answers are numbers read off the chart

    def __init__(
        self, path: Path, split: str = "test", prompt: str = "\nAnswer the question using a single word or phrase."
    ) -> None:
        self.path = path
        self.split = split
        self.prompt = prompt

    def samples(self) -> list[Sample]:
        samples = []
        for part in PARTS:
            file = self.path / f"{self.split}_{part}.json"
            data = read_json(file)
            if not isinstance(data, list):
                raise ValueError(f"{file}: expected a list of questions, got {type(data).__name__}")
            for index, item in enumerate(data):
                where = f"{file}: question {index}"
                image = media_file(self.path / "png", field(item, "imgname", str, where), where, "image")
                meta = {"category": part, "answers": [field(item, "label", str, where)]}
                text = field(item, "query", str, where)
                samples.append(question(f"{part}_{index}", text, meta, [image], self.prompt))
        return samples

    def origin(self) -> str:
        return str(self.path)

    def score(self, sample: Sample, prediction: str) -> float:
        return relaxed_accuracy(prediction, sample.meta["answers"])

    def statistics(self, records: Sequence[Record]) -> dict[str, Mean]:
        return {"relaxed_accuracy": mean_of(records), **by_category(records, "relaxed_accuracy")}
