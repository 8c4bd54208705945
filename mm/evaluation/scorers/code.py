"""pass@k of generated programs (Chen et al. 2021, equation 1)."""

from __future__ import annotations

from collections.abc import Sequence


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Unbiased estimate that at least one of k samples passes, given `num_correct` of `num_samples` did:
    1 - C(n - c, k) / C(n, k), as a product that does not overflow.

    Where fewer than k samples failed it is 1, also for k > n with no correct one (upstream; callers check k <= n).
    Raises ValueError for counts that cannot be.
    """
    if not 0 <= num_correct <= num_samples or k < 1:
        raise ValueError(f"pass@k of {num_correct=} in {num_samples=} with {k=}: want 0 <= correct <= samples, k >= 1")
    failed = num_samples - num_correct
    if failed < k:
        return 1.0
    none_passes = 1.0
    for i in range(failed + 1, num_samples + 1):
        none_passes *= 1.0 - k / i
    return 1.0 - none_passes


def evaluate(
    num_samples: Sequence[int], num_correct: Sequence[int], ks: Sequence[int] = (1, 10, 100)
) -> dict[str, float]:
    """{"pass@k": mean over problems} for every k that no problem has fewer samples than (the official rule)."""
    if len(num_samples) != len(num_correct) or not len(num_samples):
        raise ValueError(f"{len(num_samples)} problems have {len(num_correct)} counts of correct samples")
    return {
        f"pass@{k}": sum(pass_at_k(n, c, k) for n, c in zip(num_samples, num_correct, strict=True)) / len(num_samples)
        for k in ks
        if all(n >= k for n in num_samples)
    }
