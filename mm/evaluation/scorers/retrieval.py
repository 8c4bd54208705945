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
    text_ranks, image_ranks = ranks(similarity, image_to_texts, text_to_image)
    return recalls(text_ranks, image_ranks)


def ranks(
    similarity: ArrayLike, image_to_texts: Mapping[int, Sequence[int]], text_to_image: Mapping[int, int]
) -> tuple[list[int], list[int]]:
    """Each image's rank of its best text, and each text's rank of its image: 0 is the most similar.

    Raises ValueError if `similarity` is not (images, texts).
    """
    scores = np.asarray(similarity)
    if scores.shape != (len(image_to_texts), len(text_to_image)):
        raise ValueError(f"similarity {scores.shape} for {len(image_to_texts)} images and {len(text_to_image)} texts")
    texts = [int(min(_ranks(row)[list(image_to_texts[i])])) for i, row in enumerate(scores)]
    images = [int(_ranks(column)[text_to_image[i]]) for i, column in enumerate(scores.T)]
    return texts, images


def recalls(text_ranks: Sequence[int], image_ranks: Sequence[int]) -> dict[str, float]:
    """The numbers of `recall_at_k` from its ranks."""
    result: dict[str, float] = {}
    for name, found in (("txt", np.array(text_ranks)), ("img", np.array(image_ranks))):
        each = {f"{name}_r{k}": 100.0 * int((found < k).sum()) / len(found) for k in RANKS}
        result |= each | {f"{name}_r_mean": sum(each.values()) / len(each)}
    return result | {"r_mean": (result["txt_r_mean"] + result["img_r_mean"]) / 2}


def _ranks(scores: np.ndarray) -> np.ndarray:
    """0 for the highest score, 1 for the next, ..."""
    order = np.empty(len(scores), dtype=np.int64)
    order[np.argsort(scores, kind="stable")[::-1]] = np.arange(len(scores))
    return order
