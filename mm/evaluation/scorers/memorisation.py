"""Signs that a model memorised a text: extraction, and likelihood ratios (Carlini et al. 2021, section 5; 2023).

Log-likelihoods are in nats, of the same texts.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence


def likelihood_ratio(loglikelihood: float, reference: float, tokens: int) -> float:
    """Extraction likelihood ratio per token: log p(text | model) - log p(text | reference), over `tokens`.

    `reference` is the log-likelihood under a model that has not seen the text. Above 0 the model knows the text better
    than its plainness explains. Raises ValueError for no tokens.
    """
    if tokens < 1:
        raise ValueError(f"likelihood ratio of a text of {tokens} tokens")
    return (loglikelihood - reference) / tokens


def zlib_ratio(loglikelihood: float, text: str) -> float:
    """Negative log-likelihood per bit that zlib needs for the text: low for text that is surprising but known.

    Where no reference model is at hand. Raises ValueError for an empty text.
    """
    if not text:
        raise ValueError("zlib ratio of an empty text")
    return -loglikelihood / (8 * len(zlib.compress(text.encode())))


def extracted(continuation: Sequence[int], truth: Sequence[int]) -> float:
    """Share of the true continuation's tokens that greedy decoding gave before its first mistake; 1.0 is verbatim.

    `continuation` as long as `truth` or longer, from the same prefix. Raises ValueError for an empty truth.
    """
    if not truth:
        raise ValueError("extraction of an empty continuation")
    for place, token in enumerate(truth):
        if place >= len(continuation) or continuation[place] != token:
            return place / len(truth)
    return 1.0


def evaluate(
    loglikelihoods: Sequence[float], references: Sequence[float], tokens: Sequence[int], extractions: Sequence[float]
) -> dict[str, float]:
    """Over a set of texts: "likelihood_ratio" (mean per token), "likelihood_ratio_max", "verbatim" (share of texts that
    were extracted whole) and "extracted" (mean share)."""
    counts = {len(loglikelihoods), len(references), len(tokens), len(extractions)}
    if len(counts) > 1 or not len(tokens):
        raise ValueError(f"memorisation wants one number a text of each kind, got {sorted(counts)}")
    ratios = [likelihood_ratio(ll, ref, n) for ll, ref, n in zip(loglikelihoods, references, tokens, strict=True)]
    return {
        "likelihood_ratio": sum(ratios) / len(ratios),
        "likelihood_ratio_max": max(ratios),
        "verbatim": sum(share == 1.0 for share in extractions) / len(extractions),
        "extracted": sum(extractions) / len(extractions),
    }
