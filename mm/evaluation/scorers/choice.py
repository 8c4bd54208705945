"""Multiple choice by likelihood, as lm-eval scores it, and TruthfulQA's MC2 (Lin et al. 2022)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def accuracy(choices: Sequence[str], loglikelihoods: Sequence[float], gold: int) -> dict[str, float]:
    """{"acc", "acc_norm", "acc_bytes"}: 1.0 where the most likely choice is `gold`, else 0.0; ties go to the first.

    `choices` without the leading space with which they were scored. `acc_norm` divides each log-likelihood by the
    choice's characters, `acc_bytes` by its UTF-8 bytes. A `gold` outside the choices is scored 0 (upstream).
    """
    if not choices or len(choices) != len(loglikelihoods):
        raise ValueError(f"{len(choices)} choices have {len(loglikelihoods)} log-likelihoods")
    scores = np.array(loglikelihoods, dtype=np.float64)
    characters = np.array([len(choice) for choice in choices], dtype=np.float64)
    in_bytes = np.array([len(choice.encode()) for choice in choices], dtype=np.float64)
    if not characters.all():
        raise ValueError(f"choice {int(characters.argmin())} of {list(choices)} is empty: no length to divide by")
    return {
        "acc": float(int(np.argmax(scores)) == gold),
        "acc_norm": float(int(np.argmax(scores / characters)) == gold),
        "acc_bytes": float(int(np.argmax(scores / in_bytes)) == gold),
    }


def truthfulqa_mc2(loglikelihoods: Sequence[float], labels: Sequence[int]) -> float:
    """Probability mass on the true answers (label 1) among all. NaN where every likelihood underflows (upstream)."""
    if len(loglikelihoods) != len(labels):
        raise ValueError(f"{len(labels)} labels have {len(loglikelihoods)} log-likelihoods")
    probabilities = np.exp(np.array(loglikelihoods, dtype=np.float64))
    true = np.array(labels, dtype=bool)
    with np.errstate(invalid="ignore"):
        return float(probabilities[true].sum() / (probabilities[true].sum() + probabilities[~true].sum()))


def group_mean(scores: Sequence[float], sizes: Sequence[int], weighted: bool = True) -> float:
    """The score of a group of subtasks: their mean, weighted by how many questions each has, or plain."""
    if len(scores) != len(sizes) or not len(scores):
        raise ValueError(f"{len(scores)} scores have {len(sizes)} sizes")
    weights = [float(size) for size in sizes] if weighted else [1.0] * len(sizes)
    return sum(score * weight for score, weight in zip(scores, weights, strict=True)) / sum(weights)
