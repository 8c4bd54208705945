"""Relaxed accuracy of ChartQA (Masry et al. 2022), as pix2struct computes it: numbers within 5 % of the target."""

from __future__ import annotations

from collections.abc import Sequence


def relaxed_accuracy(prediction: str, targets: Sequence[str], tolerance: float = 0.05) -> float:
    """1.0 if the prediction meets any of the targets, else 0.0. Raises ValueError without targets."""
    if not targets:
        raise ValueError(f"no targets to score the prediction {prediction!r} against")
    return float(any(relaxed_match(prediction, target, tolerance) for target in targets))


def relaxed_match(prediction: str, target: str, tolerance: float = 0.05) -> bool:
    """Numbers match within `tolerance` of the target; text, and a target of zero, by case-insensitive equality.

    Nothing is stripped but what `float` allows.
    """
    number, wanted = _number(prediction), _number(target)
    if number is not None and wanted:  # a target of 0 has no relative error: compared as text
        return abs(number - wanted) / abs(wanted) <= tolerance
    return prediction.lower() == target.lower()


def _number(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100.0 if text.endswith("%") else float(text)
    except ValueError:
        return None
