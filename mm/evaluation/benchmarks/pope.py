"""POPE (Li et al. 2023): is there a ... in the image? Objects that are not there are drawn at random, by popularity, or
by company with those that are.

Files (https://github.com/AoiDragon/POPE, `output/coco`): `coco_pope_random.json`, `coco_pope_popular.json`,
`coco_pope_adversarial.json` (a JSON object a line), and COCO's folder `val2014`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mm.datasets.source import field, media_file
from mm.evaluation.benchmarks.base import Benchmark, by_category, mean_of, question
from mm.evaluation.files import json_lines
from mm.evaluation.records import Record
from mm.evaluation.scorers import pope
from mm.evaluation.statistics import Mean
from mm.types import Media, Sample


class POPEBenchmark(Benchmark):
    """The questions of the three files, answered with yes or no.

    Args:
        path: the folder of the files.
        images: COCO's folder of images.
        kinds: which of the files.
        prompt: follows each question (by default LLaVA-1.5's).
    """

    name = "pope"
    max_new_tokens = 8

    def __init__(
        self,
        path: Path,
        images: Path,
        kinds: Sequence[str] = ("random", "popular", "adversarial"),
        prompt: str = "\nAnswer the question using a single word or phrase.",
    ) -> None:
        self.path = path
        self.images = images
        self.kinds = list(kinds)
        self.prompt = prompt

    def samples(self) -> list[Sample]:
        shown: dict[str, Media] = {}
        samples = []
        for kind in self.kinds:
            for where, item in json_lines(self.path / f"coco_pope_{kind}.json"):
                name = field(item, "image", str, where)
                if name not in shown:
                    shown[name] = media_file(self.images, name, where, "image")
                label = field(item, "label", str, where).strip().lower()
                if label not in ("yes", "no"):
                    raise ValueError(f"{where}: key 'label': expected yes or no, got {label!r}")
                meta = {"category": kind, "answers": [label], "choices": ["yes", "no"]}
                key = f"{kind}_{field(item, 'question_id', int, where)}"
                samples.append(question(key, field(item, "text", str, where), meta, [shown[name]], self.prompt))
        return samples

    def origin(self) -> str:
        return str(self.path)

    def statistics(self, records: Sequence[Record]) -> dict[str, Mean]:
        return {"accuracy": mean_of(records), **by_category(records)}

    def aggregate(self, records: Sequence[Record]) -> dict[str, float]:
        """Accuracies, and precision, recall and F1 of "yes", over all files together."""
        if any(record.score not in (0.0, 1.0) for record in records):  # expected scores: chance has no answers to count
            return super().aggregate(records)
        numbers = pope.evaluate([(record.prediction, record.answers[0]) for record in records])
        return super().aggregate(records) | {name: numbers[name] for name in ("precision", "recall", "f1", "yes_ratio")}

    def submission(self, records: Sequence[Record]) -> dict[str, Any]:
        """One file of JSON lines a kind, as the official `evaluate.py` reads them."""
        files: dict[str, str] = {}
        for record in records:
            name = f"coco_pope_{record.category}_answers.json"
            line = json.dumps({"question": record.question, "answer": record.prediction})
            files[name] = files.get(name, "") + line + "\n"
        return files
