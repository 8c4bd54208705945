"""DocVQA (Mathew et al. 2021): questions about scanned pages, scored by ANLS.

Files (https://rrc.cvc.uab.es/?ch=17, task 1): `val_v1.0_withQT.json` (or `val_v1.0.json`, `test_v1.0.json`) and the
folder that their "image" paths are relative to (it holds `documents`).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mm.datasets.source import field, media_file, read_json
from mm.evaluation.benchmarks.base import Benchmark, mean_of, question
from mm.evaluation.files import check_version
from mm.evaluation.records import Record
from mm.evaluation.scorers.anls import anls
from mm.evaluation.statistics import Mean
from mm.types import Sample


class DocVQABenchmark(Benchmark):
    """The questions of one official file of version 1.0.

    Args:
        questions: {"dataset_version", "data": [{"questionId", "question", "image", "answers", "question_types"}]}.
        images: the folder that "image" is relative to; by default the one that holds the file.
        prompt: follows each question (by default LLaVA's).
    """

    name = "docvqa"
    max_new_tokens = 32
    guessable = False  # almost every answer occurs once

    def __init__(
        self,
        questions: Path,
        images: Path | None = None,
        prompt: str = "\nAnswer the question using a single word or phrase.",
    ) -> None:
        self.questions = questions
        self.images = images
        self.prompt = prompt

    def samples(self) -> list[Sample]:
        data = read_json(self.questions)
        check_version(data, "dataset_version", "1.0", self.questions)
        folder = self.images or self.questions.parent
        samples = []
        for index, item in enumerate(field(data, "data", list, str(self.questions))):
            where = f"{self.questions}: question {index}"
            image = media_file(folder, field(item, "image", str, where), where, "image")
            kinds = item.get("question_types") or ["all"]
            meta: dict[str, Any] = {"category": kinds[0], "kinds": kinds}
            if "answers" in item:  # hidden in the test file
                meta["answers"] = field(item, "answers", list, where)
            key = str(field(item, "questionId", int, where))
            samples.append(question(key, field(item, "question", str, where), meta, [image], self.prompt))
        return samples

    def origin(self) -> str:
        return str(self.questions)

    def score(self, sample: Sample, prediction: str) -> float:
        return anls(prediction, sample.meta["answers"])

    def statistics(self, records: Sequence[Record]) -> dict[str, Mean]:
        """ANLS overall, then of each first question type where the file tells them."""
        kinds = sorted({record.category for record in records} - {"all"})
        return {"anls": mean_of(records)} | {
            f"{kind.replace('/', '_')}_anls": mean_of([r for r in records if r.category == kind]) for kind in kinds
        }

    def submission(self, records: Sequence[Record]) -> dict[str, Any]:
        """The server's results file."""
        return {"results.json": [{"questionId": int(r.id), "answer": r.prediction} for r in records]}
