"""Recall@k of image-text retrieval in both directions, as LAVIS and BLIP report it for COCO and Flickr30k."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike

RANKS = (1, 5, 10)


def recall_at_k(
    similarity: ArrayLike, image_to_texts: Mapping[int, Sequence[int]], text_to_image: Mapping[int, int]
) -> dict[str, float]:
    """Percent of queries with a right item among the k most similar.

    `similarity` (images, texts). Returns txt_r1/5/10 (image queries, any of its texts counts), img_r1/5/10 (text
    queries), their means txt_r_mean, img_r_mean and r_mean. Of equal similarities the later index ranks first, as in
    a reversed ascending sort.
    """
    scores = np.asarray(similarity)
    if scores.shape != (len(image_to_texts), len(text_to_image)):
        raise ValueError(f"similarity {scores.shape} for {len(image_to_texts)} images and {len(text_to_image)} texts")
    texts = [min(_ranks(row)[list(image_to_texts[i])]) for i, row in enumerate(scores)]
    images = [_ranks(column)[text_to_image[i]] for i, column in enumerate(scores.T)]
    result: dict[str, float] = {}
    for name, ranks in (("txt", np.array(texts)), ("img", np.array(images))):
        recalls = {f"{name}_r{k}": 100.0 * int((ranks < k).sum()) / len(ranks) for k in RANKS}
        result |= recalls | {f"{name}_r_mean": sum(recalls.values()) / len(recalls)}
    return result | {"r_mean": (result["txt_r_mean"] + result["img_r_mean"]) / 2}


def _ranks(scores: np.ndarray) -> np.ndarray:
    """0 for the highest score, 1 for the next, ..."""
    ranks = np.empty(len(scores), dtype=np.int64)
    ranks[np.argsort(scores, kind="stable")[::-1]] = np.arange(len(scores))
    return ranks
