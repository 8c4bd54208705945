"""How sure a score is: bootstrap intervals of means, and paired tests of two runs on the same samples.

Everything is seeded: the same records give the same numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 2_000
CELLS = 4_000_000  # of one block of resampling: bounds its memory


def identity(value: float) -> float:
    return value


@dataclass(frozen=True)
class Mean:
    """A score as a function of a weighted mean over samples: accuracy, word error rate (errors / words, weighted by
    words), perplexity (`finish` = exp of the mean negative log-likelihood, weighted by units)."""

    values: Sequence[float]
    weights: Sequence[float] | None = None
    finish: Callable[[float], float] = identity

    @property
    def value(self) -> float:
        """Raises ValueError for no values, or weights that sum to 0."""
        if not len(self.values):
            raise ValueError("no records to average: the benchmark, or the part of it that was asked for, is empty")
        if self.weights is None:
            return self.finish(math.fsum(self.values) / len(self.values))
        total = math.fsum(self.weights)
        if not total:
            raise ValueError("no records to average: their weights sum to 0")
        return self.finish(math.fsum(v * w for v, w in zip(self.values, self.weights, strict=True)) / total)

    def interval(self, confidence: float = 0.95, resamples: int = RESAMPLES, seed: int = 0) -> tuple[float, float]:
        """Percentile bootstrap (Efron and Tibshirani 1993, chapter 13): samples are drawn again with replacement.

        Where all values are equal, so are the ends: such an interval says nothing about samples not seen.
        """
        values = np.asarray(self.values, dtype=np.float64)
        weights = np.ones_like(values) if self.weights is None else np.asarray(self.weights, dtype=np.float64)
        sums = _resampled_sums(np.stack([values * weights, weights]), resamples, np.random.default_rng(seed))
        means = sums[0] / np.where(sums[1] == 0, np.nan, sums[1])
        tail = 50 * (1 - confidence)
        low, high = np.nanpercentile(means, [tail, 100 - tail])
        ends = sorted((self.finish(float(low)), self.finish(float(high))))
        return ends[0], ends[1]


def _resampled_sums(columns: NDArray[np.float64], resamples: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """(k, n) values -> (k, resamples): the sums over n draws with replacement, the same draws for every row."""
    count = columns.shape[1]
    block = max(1, CELLS // count)
    parts = []
    for start in range(0, resamples, block):
        drawn = rng.integers(count, size=(min(block, resamples - start), count))
        parts.append(columns[:, drawn].sum(-1))
    return np.concatenate(parts, axis=1)


@dataclass(frozen=True)
class Paired:
    """Two runs on the same samples: the mean of `b - a`, its bootstrap interval, how often each was better, and the
    probability of so large a difference if the runs were alike."""

    difference: float
    low: float
    high: float
    a_better: int
    b_better: int
    p_value: float
    test: str


def paired(a: Sequence[float], b: Sequence[float], seed: int = 0, resamples: int = 10_000) -> Paired:
    """McNemar's exact test where all scores are 0 or 1, else a sign-flip permutation test (two-sided).

    Raises ValueError for different lengths or no samples.
    """
    if len(a) != len(b) or not len(a):
        raise ValueError(f"a paired test needs as many scores of both runs, got {len(a)} and {len(b)}")
    first, second = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    difference = second - first
    low, high = Mean(difference.tolist()).interval(seed=seed)
    a_better, b_better = int((difference < 0).sum()), int((difference > 0).sum())
    binary = bool(np.isin(np.concatenate([first, second]), (0.0, 1.0)).all())
    p_value = mcnemar(a_better, b_better) if binary else sign_flip(difference, seed, resamples)
    test = "McNemar's exact test" if binary else f"sign-flip permutation test, {resamples:,} draws"
    return Paired(float(difference.mean()), low, high, a_better, b_better, p_value, test)


def mcnemar(a_better: int, b_better: int) -> float:
    """Two-sided exact p-value: of the samples on which the runs differ, either wins with probability 1/2."""
    decided = a_better + b_better
    if decided == 0:
        return 1.0
    tail = sum(math.comb(decided, k) for k in range(min(a_better, b_better) + 1))
    return min(1.0, 2 * tail / 2**decided)


def sign_flip(difference: NDArray[np.float64], seed: int = 0, resamples: int = 10_000) -> float:
    """Two-sided p-value of the mean difference when each pair's sign is drawn at random; at least 1/(resamples + 1)."""
    moved = difference[difference != 0]
    if not len(moved):
        return 1.0
    rng = np.random.default_rng(seed)
    observed = abs(moved.sum()) * (1 - 1e-12)  # a tie counts, whatever the order of its sum
    block = max(1, CELLS // len(moved))
    hits = 0
    for start in range(0, resamples, block):
        signs = rng.integers(2, size=(min(block, resamples - start), len(moved))) * 2 - 1
        hits += int((np.abs(signs @ moved) >= observed).sum())
    return (hits + 1) / (resamples + 1)
