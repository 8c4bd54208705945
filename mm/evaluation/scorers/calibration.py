"""Expected calibration error (Guo et al. 2017), as the authors' code computes it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def ece(confidences: Sequence[float] | Tensor, correct: Sequence[bool] | Tensor, bins: int = 15) -> float:
    """Mean |accuracy - confidence| over equal-width bins, weighted by how many answers fall in each; float32.

    Bins are (low, high], where torchmetrics has [low, high): a confidence on an edge belongs to the lower bin.
    """
    confidence = torch.as_tensor(confidences, dtype=torch.float32)
    right = torch.as_tensor(correct, dtype=torch.float32)
    if confidence.shape != right.shape or confidence.dim() != 1 or not len(confidence):
        raise ValueError(f"confidences {tuple(confidence.shape)} and correct {tuple(right.shape)}: want two of (N,)")
    edges = torch.linspace(0, 1, bins + 1)
    error = torch.zeros(())
    for low, high in zip(edges[:-1], edges[1:], strict=True):
        inside = (confidence > low) & (confidence <= high)
        if inside.any():
            gap = (confidence[inside].mean() - right[inside].mean()).abs()
            error = error + gap * inside.float().mean()
    return error.item()
