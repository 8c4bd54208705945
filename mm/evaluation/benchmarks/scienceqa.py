"""ScienceQA (Lu et al. 2022): school questions with two to five options, half of them with a picture.

Files (https://github.com/lupantech/ScienceQA, `data/scienceqa`): `problems.json`, `pid_splits.json`, and images in
`SPLIT/ID/image.png` beside them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mm.datasets.source import field, media_file, read_json
from mm.evaluation.benchmarks.base import Benchmark, mean_of, question
from mm.evaluation.files import lettered
from mm.evaluation.records import Record
from mm.evaluation.scorers import scienceqa
from mm.evaluation.statistics import Mean
from mm.types import Sample

SUBJECTS = {"natural science": "NAT", "social science": "SOC", "language science": "LAN"}


class ScienceQABenchmark(Benchmark):
    """The questions of one split: context (if any), question, options "A. ...", and the instruction.

    Args:
        path: the folder with `problems.json` and `pid_splits.json`.
        split: "test", "val", "minitest" or another of `pid_splits.json`.
        images: the folder of images; by default `path`.
        prompt: follows each question (by default LLaVA-1.5's).
    """

    name = "scienceqa"
    max_new_tokens = 16

    def __init__(
        self,
        path: Path,
        split: str = "test",
        images: Path | None = None,
        prompt: str = "\nAnswer with the option's letter from the given choices directly.",
    ) -> None:
        self.path = path
        self.split = split
        self.images = images
        self.prompt = prompt

    def samples(self) -> list[Sample]:
        problems, splits = read_json(self.path / "problems.json"), read_json(self.path / "pid_splits.json")
        samples = []
        for key in field(splits, self.split, list, str(self.path / "pid_splits.json")):
            where = f"{self.path / 'problems.json'}: problem {key!r}"
            item = field(problems, key, dict, str(self.path / "problems.json"))
            options = field(item, "choices", list, where)
            letters, listed = lettered(options)
            answer = field(item, "answer", int, where)
            if not 0 <= answer < len(options):
                raise ValueError(f"{where}: key 'answer': {answer} is none of its {len(options)} choices")
            media = []
            if item.get("image"):
                name = f"{field(item, 'split', str, where)}/{key}/{item['image']}"
                media = [media_file(self.images or self.path, name, where, "image")]
            lines = [item["hint"]] if item.get("hint") else []
            lines += [field(item, "question", str, where), listed]
            meta = {
                "question": item["question"],
                "category": item.get("subject", "all"),
                "answers": [letters[answer]],
                "answer": answer,
                "options": options,
                "choices": letters,
                "picture": bool(media),
            }
            samples.append(question(str(key), "\n".join(lines), meta, media, self.prompt))
        return samples

    def origin(self) -> str:
        return f"{self.path}, {self.split} split"

    def score(self, sample: Sample, prediction: str) -> float:
        return scienceqa.score(prediction, sample.meta["answer"])

    def statistics(self, records: Sequence[Record]) -> dict[str, Mean]:
        """Overall, and by subject as the official table names them (NAT, SOC, LAN)."""
        groups = {
            short: [record for record in records if record.category == subject] for subject, short in SUBJECTS.items()
        }
        return {"accuracy": mean_of(records)} | {
            f"{short}_accuracy": mean_of(found) for short, found in groups.items() if found
        }

    def submission(self, records: Sequence[Record]) -> dict[str, Any]:
        """The official results file: {"results": {id: option's number}}; -1 where the answer is no letter."""
        samples = {sample.key: sample for sample in self.samples()}
        chosen = {r.id: _chosen(r.prediction, len(samples[r.id].meta["options"])) for r in records}
        return {"results.json": {"results": chosen}}


def _chosen(prediction: str, count: int) -> int:
    return next((number for number in range(count) if scienceqa.score(prediction, number)), -1)
