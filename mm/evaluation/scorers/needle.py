"""Needle in a haystack, as RULER scores it (Hsieh et al. 2024)."""

from __future__ import annotations

from collections.abc import Sequence


def score(prediction: str, needles: Sequence[str]) -> float:
    """Share of the needles that stand in the prediction, whatever their case. Raises ValueError without needles."""
    if not needles:
        raise ValueError("no needles to look for")
    return sum(needle.lower() in prediction.lower() for needle in needles) / len(needles)
