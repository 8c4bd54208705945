"""pass@k of generated programs (Chen et al. 2021, equation 1)."""

from __future__ import annotations


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
