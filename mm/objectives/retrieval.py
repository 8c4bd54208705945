"""Recall@k of media-to-text and text-to-media retrieval over a whole set, gathered from all ranks."""

from __future__ import annotations

from collections.abc import Sequence as Seq

import torch
import torch.distributed as dist
from torch import Tensor


class RetrievalPool:
    """Collects unit vectors of pairs and scores them against one another.

    A query counts as found if any item with the same text is among its k nearest: names that two pictures share
    are not held against the model. `chance_at_k` is k / n, n the number of pairs.
    """

    def __init__(self) -> None:
        self._pairs: list[tuple[Tensor, Tensor, tuple[int, ...]]] = []

    def __len__(self) -> int:
        return len(self._pairs)

    def add(self, media: Tensor, text: Tensor, ids: Tensor) -> None:
        """media and text (P, E); ids (P, T) int64 with negative padding."""
        for item, words, row in zip(media.detach().cpu(), text.detach().cpu(), ids.cpu().tolist(), strict=True):
            self._pairs.append((item, words, tuple(token for token in row if token >= 0)))

    def recalls(self, at: Seq[int]) -> dict[str, float]:
        """media_to_text_recall_at_k, text_to_media_recall_at_k, their mean recall_at_k, and chance_at_k: fractions.

        Empty where no rank has a pair. Every rank must call it.
        """
        pairs = self._pairs
        if dist.is_available() and dist.is_initialized():
            parts: list[list[tuple[Tensor, Tensor, tuple[int, ...]]]] = [[] for _ in range(dist.get_world_size())]
            dist.all_gather_object(parts, self._pairs)
            pairs = [pair for part in parts for pair in part]
        if not pairs:
            return {}
        media, text = (torch.stack([pair[i] for pair in pairs]) for i in (0, 1))  # type: ignore[misc]
        groups: dict[tuple[int, ...], int] = {}
        group = torch.tensor([groups.setdefault(pair[2], len(groups)) for pair in pairs])
        similarity = media @ text.T
        out: dict[str, float] = {}
        for k in at:
            directions = []
            for name, scores in (("media_to_text", similarity), ("text_to_media", similarity.T)):
                found = group[scores.topk(min(k, len(pairs)), -1).indices] == group[:, None]
                directions.append(found.any(-1).float().mean().item())
                out[f"{name}_recall_at_{k}"] = directions[-1]
            out[f"recall_at_{k}"] = sum(directions) / 2
            out[f"chance_at_{k}"] = min(1.0, k / len(pairs))
        return out
