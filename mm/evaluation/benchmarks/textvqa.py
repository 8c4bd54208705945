"""TextVQA (Singh et al. 2019): questions whose answers must be read in the picture, scored by VQA's soft accuracy.

Files (https://textvqa.org/dataset): `TextVQA_0.5.1_val.json` and the folder `train_images` (which serves both).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mm.datasets.source import field, media_file, read_json
from mm.evaluation.benchmarks.base import Benchmark, question
from mm.evaluation.files import check_version
from mm.evaluation.records import Record
from mm.evaluation.scorers import vqa
from mm.types import Sample


class TextVQABenchmark(Benchmark):
    """The questions of one official file of version 0.5.1. OCR tokens are not given to the model.

    Args:
        questions: {"dataset_version", "data": [{"question_id", "question", "image_id", "answers"}]}.
        images: the folder of `IMAGEID.jpg`.
        prompt: follows each question (by default LLaVA-1.5's).
    """

    name = "textvqa"
    max_new_tokens = 16
    guessable = False  # almost every answer occurs once

    def __init__(
        self, questions: Path, images: Path, prompt: str = "\nAnswer the question using a single word or phrase."
    ) -> None:
        self.questions = questions
        self.images = images
        self.prompt = prompt

    def samples(self) -> list[Sample]:
        data = read_json(self.questions)
        check_version(data, "dataset_version", "0.5.1", self.questions)
        samples = []
        for index, item in enumerate(field(data, "data", list, str(self.questions))):
            where = f"{self.questions}: question {index}"
            image = media_file(self.images, f"{field(item, 'image_id', str, where)}.jpg", where, "image")
            meta: dict[str, Any] = {"category": "all"}
            if "answers" in item:  # hidden in the test file
                meta["answers"] = field(item, "answers", list, where)
            key = str(field(item, "question_id", int, where))
            samples.append(question(key, field(item, "question", str, where), meta, [image], self.prompt))
        return samples

    def origin(self) -> str:
        return str(self.questions)

    def score(self, sample: Sample, prediction: str) -> float:
        return vqa.vqa_score(prediction, sample.meta["answers"])

    def submission(self, records: Sequence[Record]) -> dict[str, Any]:
        """The server's results file (EvalAI)."""
        return {"results.json": [{"question_id": int(r.id), "answer": r.prediction} for r in records]}
