"""Needle in a haystack, as RULER scores it (Hsieh et al. 2024)."""

from __future__ import annotations

from collections.abc import Sequence


def score(prediction: str, needles: Sequence[str]) -> float:
    """Share of the needles that stand in the prediction, whatever their case. Raises ValueError without needles."""
    if not needles:
        raise ValueError("no needles to look for")
    return sum(needle.lower() in prediction.lower() for needle in needles) / len(needles)


def mean(scores: Sequence[float]) -> float:
    """The mean over samples; those of another context length are marked -1 and left out. Raises ValueError for none."""
    asked = [score for score in scores if score != -1]
    if not asked:
        raise ValueError("no samples of this context length")
    return sum(asked) / len(asked)
