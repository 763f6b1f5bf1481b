r"""avg@k and pass@k as exact fractions, with bootstrap intervals over problems instead of over runs."""

import math
import statistics
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

NUM_BOOTSTRAP_SAMPLES = 10_000
INTERVAL = (2.5, 97.5)
# Resamples drawn at once: 1,000 of GSM8K's 1,319 problems take 10 MB.
_BOOTSTRAP_CHUNK = 1_000


def pass_at_k(num_correct: int, num_completions: int, k: int) -> Fraction:
    r"""
    Unbiased estimate of the probability that at least one of k completions of a problem is right:

    $$\mathrm{pass@}k = 1 - \binom{n - c}{k} \Big/ \binom{n}{k}$$

    ([Evaluating Large Language Models Trained on Code](https://huggingface.co/papers/2107.03374), equation 1). At
    k = 1 it is c / n, which is avg@n; at k = n whether any completion is right.

    Args:
        num_correct (`int`):
            c, right completions.
        num_completions (`int`):
            n, completions; at least `k`.
        k (`int`):
            Attempts, at least 1.
    """
    assert 0 <= num_correct <= num_completions
    assert 1 <= k <= num_completions
    return 1 - Fraction(math.comb(num_completions - num_correct, k), math.comb(num_completions, k))


def bootstrap_means(values: Sequence[float] | np.ndarray, *, seed: int) -> np.ndarray:
    """
    Means of resamples of problems, drawn with replacement.

    Args:
        values (`Sequence[float]`):
            The metric of every problem, of shape `(num_problems,)`.
        seed (`int`):
            Seed of the resamples: the same seed and number of problems give the same resamples, whatever the values.

    Returns:
        `np.ndarray`: of shape `(10_000,)`.
    """
    numbers = np.asarray(values, dtype=np.float64)
    rng = np.random.default_rng(seed)
    chunks = [
        numbers[rng.integers(len(numbers), size=(_BOOTSTRAP_CHUNK, len(numbers)))].mean(axis=1)
        for _ in range(NUM_BOOTSTRAP_SAMPLES // _BOOTSTRAP_CHUNK)
    ]
    return np.concatenate(chunks)


def estimate(*benchmarks: Sequence[Fraction], seed: int) -> dict[str, float]:
    """
    Unweighted mean over benchmarks of the means over their problems, with its 95 % percentile bootstrap interval.

    Each benchmark is the metric of all its problems, which are resampled among themselves; equal values give an
    interval of length 0.

    Returns:
        `dict[str, float]`: `value` (exact, rounded once), `low` and `high`, in the metric's own units.
    """
    means = [bootstrap_means([float(value) for value in values], seed=seed + i) for i, values in enumerate(benchmarks)]
    low, high = np.percentile(np.mean(means, axis=0), INTERVAL)
    value = statistics.mean([statistics.mean(values) for values in benchmarks])
    return {"value": float(value), "low": float(low), "high": float(high)}


def paired_differences(first: Sequence[Fraction], second: Sequence[Fraction]) -> list[Fraction]:
    """`second - first` problem by problem, whose mean is known better than the two scores: the problems' difficulty cancels."""
    return [b - a for a, b in zip(first, second, strict=True)]
