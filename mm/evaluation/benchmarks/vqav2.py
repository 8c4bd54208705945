"""VQAv2 (Goyal et al. 2017) from the official files, scored by the official rules.

Files (https://visualqa.org/download.html): `v2_OpenEnded_mscoco_val2014_questions.json`,
`v2_mscoco_val2014_annotations.json`, and a folder of COCO images `COCO_val2014_000000000042.jpg`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mm.datasets.source import read_json
from mm.datasets.sources.vqav2 import VQAv2
from mm.evaluation.benchmarks.base import Benchmark, end_with, questions_of
from mm.evaluation.files import check_version
from mm.evaluation.records import Record
from mm.evaluation.scorers import vqa
from mm.types import Sample


class VQAv2Benchmark(Benchmark):
    """The questions of one official file.

    Args:
        questions: the official questions file.
        annotations: its annotations; by default the file beside it with the official name.
        images: the folder of images; by default the one beside it named as the data's subtype ("val2014").
        image_name: an image's file name, from `{image_id}` and `{subtype}`.
        prompt: follows each question (by default LLaVA-1.5's).
        hidden: a test set without annotations: it is answered for the server, not scored.
    """

    name = "vqav2"
    max_new_tokens = 16

    def __init__(
        self,
        questions: Path,
        annotations: Path | None = None,
        images: Path | None = None,
        image_name: str = "COCO_{subtype}_{image_id:012d}.jpg",
        prompt: str = "\nAnswer the question using a single word or phrase.",
        hidden: bool = False,
    ) -> None:
        self.questions = questions
        self.annotations = annotations
        self.images = images
        self.image_name = image_name
        self.prompt = prompt
        self.hidden = hidden

    def samples(self) -> list[Sample]:
        """One sample a question, its id the official one; meta "answers" holds all ten, "category" the answer type."""
        source = VQAv2(self.questions, self.annotations, self.images, self.image_name, branches=False)
        if source.annotations is None and not self.hidden:
            raise ValueError(f"{self.questions}: no annotations file beside it; give annotations=FILE, or hidden=true")
        if source.annotations is not None and self.hidden:
            raise ValueError(f"{self.questions}: hidden=true, but there are annotations: {source.annotations}")
        for file in filter(None, (self.questions, source.annotations)):
            check_version(read_json(Path(file)).get("info"), "version", "2.0", Path(file))
        solved = [
            replace(s, key=str(s.meta["question_id"]), meta={"category": "all", **s.meta, **_majority(s)})
            for s in source
        ]
        return [end_with(question, self.prompt) for question in questions_of(solved)]

    def origin(self) -> str:
        return str(self.questions)

    def score(self, sample: Sample, prediction: str) -> float:
        return vqa.vqa_score(prediction, sample.meta["answers"])

    def aggregate(self, records: Sequence[Record]) -> dict[str, float]:
        """The official overall and per-answer-type accuracy (percent, two places), as fractions."""
        return {
            name: round(vqa.percent(list(statistic.values)) / 100, 4)
            for name, statistic in self.statistics(records).items()
        }

    def submission(self, records: Sequence[Record]) -> dict[str, Any]:
        """The evaluation server's results file."""
        rows = [{"question_id": int(record.id), "answer": record.prediction} for record in records]
        return {f"{self.questions.stem.removesuffix('_questions')}_results.json": rows}

    def chance_score(self, samples: Sequence[Sample]) -> list[float]:
        """Guessing uniformly among the majority answers of the question's answer type in this file."""
        guesses: dict[str, set[str]] = {}
        for sample in samples:
            guesses.setdefault(sample.meta["category"], set()).add(sample.meta["majority"])
        expected = []
        for sample in samples:
            candidates = guesses[sample.meta["category"]]
            given = set(sample.meta["answers"]) & candidates  # only an answer that somebody gave can score
            expected.append(sum(self.score(sample, answer) for answer in given) / len(candidates))
        return expected


def _majority(sample: Sample) -> dict[str, str]:
    """The most frequent answer, where the sample tells one."""
    last = sample.messages[-1]
    return {"majority": last["content"]} if last["role"] == "assistant" else {}
