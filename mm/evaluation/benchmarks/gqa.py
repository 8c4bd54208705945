"""GQA (Hudson and Manning 2019): compositional questions about scenes, exact match.

Files (https://cs.stanford.edu/people/dorarad/gqa/download.html): `testdev_balanced_questions.json` (or `val_...`) and
the folder `images` of `IMAGEID.jpg`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mm.datasets.source import field, media_file, read_json
from mm.evaluation.benchmarks.base import Benchmark, mean_of, question
from mm.evaluation.records import Record
from mm.evaluation.scorers.gqa import groups_of
from mm.evaluation.statistics import Mean
from mm.types import Media, Sample


class GQABenchmark(Benchmark):
    """The balanced questions of one official file, by which GQA is ranked.

    A prediction is lower-cased and loses outer spaces and a final period before the official exact match: answers are
    lower case, and the prompt asks for nothing but the answer (LLaVA-1.5 does the same).

    Args:
        questions: the official file, {id: {"question", "imageId", "answer", "isBalanced", "types"}}.
        images: the folder of images.
        prompt: follows each question (by default LLaVA-1.5's).
    """

    name = "gqa"
    max_new_tokens = 16

    def __init__(
        self, questions: Path, images: Path, prompt: str = "\nAnswer the question using a single word or phrase."
    ) -> None:
        self.questions = questions
        self.images = images
        self.prompt = prompt

    def samples(self) -> list[Sample]:
        data = read_json(self.questions)
        if not isinstance(data, dict):
            raise ValueError(f"{self.questions}: expected an object of questions by id: another version of the file?")
        shown: dict[str, Media] = {}
        samples = []
        for key, item in data.items():
            where = f"{self.questions}: question {key!r}"
            if not field(item, "isBalanced", bool, where):
                continue
            image = field(item, "imageId", str, where)
            if image not in shown:
                shown[image] = media_file(self.images, f"{image}.jpg", where, "image")
            groups = groups_of(item)
            meta = {"category": groups[0] if groups else "all", "groups": groups}
            if "answer" in item:
                meta["answers"] = [field(item, "answer", str, where)]
            samples.append(question(key, field(item, "question", str, where), meta, [shown[image]], self.prompt))
        return samples

    def origin(self) -> str:
        return str(self.questions)

    def score(self, sample: Sample, prediction: str) -> float:
        return float(clean(prediction) == sample.meta["answers"][0])

    def statistics(self, records: Sequence[Record]) -> dict[str, Mean]:
        kinds = {kind: [r for r in records if r.category == kind] for kind in ("binary", "open")}
        return {
            "accuracy": mean_of(records),
            **{f"{k}_accuracy": mean_of(found) for k, found in kinds.items() if found},
        }

    def submission(self, records: Sequence[Record]) -> dict[str, Any]:
        """What the official `eval.py` and the server read."""
        return {"predictions.json": [{"questionId": r.id, "prediction": clean(r.prediction)} for r in records]}


def clean(prediction: str) -> str:
    return prediction.strip().rstrip(".").lower()
