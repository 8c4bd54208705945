"""MMStar (Chen et al. 2024): 1,500 four-option questions that cannot be answered without their image.

File (https://huggingface.co/datasets/Lin-Chen/MMStar): `mmstar.parquet` (or `val-*.parquet`). The options stand in the
question. Scored as lmms-eval does: the mean over each category's own categories, and over the six.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mm.datasets.source import field
from mm.evaluation.benchmarks.base import Benchmark, question
from mm.evaluation.files import embedded_image, letter_answer, parquet_rows
from mm.evaluation.records import Mark, Record, Response
from mm.evaluation.scorers.letters import extract_letter
from mm.evaluation.statistics import Mean
from mm.types import Sample

LETTERS = ["A", "B", "C", "D"]


class MMStarBenchmark(Benchmark):
    """All questions of the file.

    Args:
        path: the parquet file, or a folder with it.
        prompt: follows each question (by default lmms-eval's).
    """

    name = "mmstar"
    max_new_tokens = 16

    def __init__(
        self, path: Path, prompt: str = "\nAnswer with the option's letter from the given choices directly"
    ) -> None:
        self.path = path
        self.prompt = prompt

    def samples(self) -> list[Sample]:
        columns = ("index", "question", "image", "answer", "category", "l2_category")
        samples = []
        for where, row in parquet_rows(self.path, "*.parquet", columns):
            meta = {
                "category": field(row, "category", str, where),
                "l2_category": field(row, "l2_category", str, where),
                "answers": [letter_answer(row, "answer", LETTERS, where)],
                "choices": LETTERS,
            }
            image = embedded_image(row["image"], "image", where)
            text = field(row, "question", str, where).strip()
            samples.append(question(str(field(row, "index", int, where)), text, meta, [image], self.prompt))
        return samples

    def origin(self) -> str:
        return str(self.path)

    def score(self, sample: Sample, prediction: str) -> float:
        return float(extract_letter(prediction, LETTERS) == sample.meta["answers"][0])

    def mark_all(self, samples: Sequence[Sample], responses: Sequence[Response]) -> list[Mark]:
        return [
            Mark(self.score(sample, response.text), details={"l2_category": sample.meta["l2_category"]})
            for sample, response in zip(samples, responses, strict=True)
        ]

    def statistics(self, records: Sequence[Record]) -> dict[str, Mean]:
        """ "average" and the six categories, each question weighted so that finer categories count alike."""
        categories = sorted({record.category for record in records})
        parts = {name: _evenly([r for r in records if r.category == name]) for name in categories}
        values = [value for part in parts.values() for value in part.values]
        weights = [weight / len(parts) for part in parts.values() for weight in part.weights or ()]
        return {"average": Mean(values, weights), **parts}

    def chance_score(self, samples: Sequence[Sample]) -> list[float]:
        return [1 / len(LETTERS)] * len(samples)


def _evenly(records: Sequence[Record]) -> Mean:
    """The mean of the finer categories' means."""
    groups: dict[str, int] = {}
    for record in records:
        fine = record.details.get("l2_category", "")
        groups[fine] = groups.get(fine, 0) + 1
    weights = [1 / (groups[record.details.get("l2_category", "")] * len(groups)) for record in records]
    return Mean([record.score for record in records], weights)
