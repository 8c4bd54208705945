"""Image-text retrieval on COCO's (or Flickr30k's) Karpathy test split: recall@1, 5, 10 in both directions.

Files: Karpathy's `dataset_coco.json` (https://cs.stanford.edu/people/karpathy/deepimagesent) and COCO's images.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mm.evaluation.benchmarks.base import Benchmark
from mm.evaluation.coco import read_captions
from mm.evaluation.records import Mark, Record, Response
from mm.evaluation.scorers import retrieval
from mm.evaluation.statistics import Mean
from mm.types import Sample


class COCORetrievalBenchmark(Benchmark):
    """Every image among all texts, and every text among all images, by the model's embedding head.

    Needs a model trained to align (its `embedding_dim`). Recalls are in percent, as published.

    Args:
        path: the captions file (Karpathy's, or an official one).
        images: the folder of images (of Karpathy's file the one that holds `val2014`).
        split: of Karpathy's file.
    """

    name = "coco_retrieval"
    ask = "embedding"
    guessable = False
    running_score = False  # a rank is one among all

    def __init__(self, path: Path, images: Path, split: str = "test") -> None:
        self.path = path
        self.images = images
        self.split = split

    def samples(self) -> list[Sample]:
        samples = []
        for image in read_captions(self.path, self.images, self.split):
            meta = {
                "question": image.captions[0],
                "category": "all",
                "answers": image.captions,
                "captions": image.captions,
            }
            shown = [{"role": "user", "content": [{"type": "image", "media": 0}]}]
            samples.append(Sample(str(image.id), shown, [image.media], meta=meta))
        return samples

    def origin(self) -> str:
        return str(self.path)

    def controlled(self, sample: Sample) -> bool:
        return False  # without its image nothing is asked, and with another's the right answer is the other's

    def mark_all(self, samples: Sequence[Sample], responses: Sequence[Response]) -> list[Mark]:
        """A record's score is 1.0 if a text of its own is the image's nearest."""
        images = np.array([response.vectors[0] for response in responses], dtype=np.float32)
        texts = np.array([vector for response in responses for vector in response.vectors[1:]], dtype=np.float32)
        owners = [image for image, response in enumerate(responses) for _ in response.vectors[1:]]
        own: dict[int, list[int]] = {image: [] for image in range(len(images))}
        for text, image in enumerate(owners):
            own[image].append(text)
        text_ranks, image_ranks = retrieval.ranks(images @ texts.T, own, dict(enumerate(owners)))
        return [
            Mark(
                float(rank == 0), details={"text_rank": rank, "image_ranks": [image_ranks[text] for text in own[image]]}
            )
            for image, rank in enumerate(text_ranks)
        ]

    def statistics(self, records: Sequence[Record]) -> dict[str, Mean]:
        """Each recall, and for its interval the images (with all their texts) drawn again."""
        found: dict[str, Mean] = {}
        for k in retrieval.RANKS:
            found[f"txt_r{k}"] = Mean([100.0 * (record.details["text_rank"] < k) for record in records])
            shares = [[rank < k for rank in record.details["image_ranks"]] for record in records]
            values = [100.0 * sum(share) / len(share) for share in shares]
            found[f"img_r{k}"] = Mean(values, [float(len(share)) for share in shares])
        return found

    def aggregate(self, records: Sequence[Record]) -> dict[str, float]:
        """txt_r1, ... (text found by image), img_r1, ... (image found by text), and their means."""
        ranks = [rank for record in records for rank in record.details["image_ranks"]]
        return retrieval.recalls([record.details["text_rank"] for record in records], ranks)
