"""COCO captions (Chen et al. 2015): CIDEr and BLEU by the official code (extra `captions`, and Java).

Files: the official `captions_val2014.json` (https://cocodataset.org) or Karpathy's `dataset_coco.json`, and the folder
of images.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mm.evaluation.benchmarks.base import Benchmark, question
from mm.evaluation.coco import CaptionedImage, read_captions
from mm.evaluation.records import Mark, Record, Response
from mm.evaluation.scorers.caption import cider_bleu
from mm.evaluation.statistics import Mean
from mm.types import Sample


class COCOCaptionsBenchmark(Benchmark):
    """Each image is described once and compared with its five captions.

    Args:
        path: the captions file.
        images: the folder of images (of Karpathy's file the one that holds `val2014`).
        split: of Karpathy's file: "test" or "val"; the official file has one split.
        prompt: what the model is asked.
    """

    name = "coco_captions"
    max_new_tokens = 40
    guessable = False
    running_score = False  # CIDEr needs the whole corpus, and Java

    def __init__(
        self,
        path: Path,
        images: Path,
        split: str = "test",
        prompt: str = "Provide a one-sentence caption for the image.",
    ) -> None:
        self.path = path
        self.images = images
        self.split = split
        self.prompt = prompt

    def samples(self) -> list[Sample]:
        return [self._sample(image) for image in read_captions(self.path, self.images, self.split)]

    def _sample(self, image: CaptionedImage) -> Sample:
        meta = {"category": "all", "answers": image.captions}
        return question(str(image.id), self.prompt, meta, [image.media])

    def origin(self) -> str:
        return str(self.path)

    def mark_all(self, samples: Sequence[Sample], responses: Sequence[Response]) -> list[Mark]:
        """A record's score is its image's own CIDEr, a tenth of it: within [0, 1]."""
        scores = cider_bleu([s.meta["answers"] for s in samples], [r.text.replace("\n", " ") for r in responses])
        return [Mark(value / 10, details={"cider": value}) for value in scores["cider_per_image"]]

    def statistics(self, records: Sequence[Record]) -> dict[str, Mean]:
        return {"cider": Mean([record.details["cider"] for record in records])}

    def aggregate(self, records: Sequence[Record]) -> dict[str, float]:
        """CIDEr (as published: 1.0 is called 100) and BLEU-1 to -4."""
        said = [record.prediction.replace("\n", " ") for record in records]
        scores = cider_bleu([record.answers for record in records], said)
        return {name: scores[name] for name in ("cider", "bleu1", "bleu2", "bleu3", "bleu4")}

    def submission(self, records: Sequence[Record]) -> dict[str, Any]:
        """The caption server's results file."""
        rows = [{"image_id": int(record.id), "caption": record.prediction} for record in records]
        return {f"captions_{self.path.stem.removeprefix('captions_')}_mm_results.json": rows}
