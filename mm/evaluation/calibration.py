"""Does a model know when it is right? Confidence against accuracy, for the calibration plot and its one number."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from mm.evaluation.records import Record
from mm.evaluation.scorers.calibration import ece

BINS = 10


def reliability(records: Sequence[Record]) -> dict[str, Any] | None:
    """{"n", "ece" (15 bins), "bins": [{"low", "high", "n", "confidence", "accuracy"}]}; None without confidences.

    Confidence is the probability that the model gave to its whole answer (or, among choices, to its choice); a record
    is right from a score of 0.5 up. Bins are (low, high], and empty ones are left out.
    """
    known = [(record.confidence, record.score) for record in records if record.confidence is not None]
    pairs = [(float(confidence), float(score >= 0.5)) for confidence, score in known if not math.isnan(score)]
    if not pairs:
        return None
    groups: dict[int, list[tuple[float, float]]] = {}
    for confidence, right in pairs:
        groups.setdefault(min(BINS - 1, max(0, math.ceil(confidence * BINS) - 1)), []).append((confidence, right))
    bins = [
        {
            "low": number / BINS,
            "high": (number + 1) / BINS,
            "n": len(group),
            "confidence": math.fsum(confidence for confidence, _ in group) / len(group),
            "accuracy": math.fsum(right for _, right in group) / len(group),
        }
        for number, group in sorted(groups.items())
    ]
    error = ece([confidence for confidence, _ in pairs], [right > 0 for _, right in pairs], 15)
    return {"n": len(pairs), "ece": error, "bins": bins}
