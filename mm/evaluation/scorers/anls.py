"""ANLS: average normalised Levenshtein similarity (Biten et al. 2019), as the organisers' script of DocVQA and
InfographicVQA computes it (eval of the Robust Reading Competition). The `anls` package differs.
"""

from __future__ import annotations

from collections.abc import Sequence

THRESHOLD = 0.5


def anls(prediction: str, answers: Sequence[str]) -> float:
    """Best similarity over the answers in [0, 1]; below 0.5 it counts 0.

    The edit distance is taken on lower-cased text with whitespace collapsed, but divided by the length of the longer
    raw upper-cased string (upstream: so surplus spaces raise the score). Raises ValueError without answers.
    """
    if not answers:
        raise ValueError(f"no answers to score the prediction {prediction!r} against")
    best = max(1.0 - _normalised_distance(answer, prediction) for answer in answers)
    return best if best >= THRESHOLD else 0.0


def _normalised_distance(answer: str, prediction: str) -> float:
    longest = max(len(answer.upper()), len(prediction.upper()))
    if longest == 0:
        return 0.0
    return levenshtein(" ".join(answer.lower().split()), " ".join(prediction.lower().split())) / longest


def levenshtein(a: str, b: str) -> int:
    """Least number of insertions, deletions and substitutions of characters that turn `a` into `b`."""
    if len(a) > len(b):
        a, b = b, a
    row = list(range(len(a) + 1))
    for i, char_b in enumerate(b, start=1):
        diagonal, row[0] = row[0], i
        for j, char_a in enumerate(a, start=1):
            diagonal, row[j] = row[j], diagonal if char_a == char_b else 1 + min(diagonal, row[j], row[j - 1])
    return row[-1]
