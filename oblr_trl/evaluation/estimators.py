r"""avg@k and pass@k over problems, exact where arithmetic allows it, with bootstrap intervals over problems."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

NUM_BOOTSTRAP_SAMPLES = 10_000
INTERVAL = (2.5, 97.5)
# Resamples drawn at once: 1,000 of GSM8K's 1,319 problems take 10 MB.
_BOOTSTRAP_CHUNK = 1_000


@dataclass(frozen=True)
class Estimate:
    """A mean over problems and its 95 % percentile bootstrap interval; both in the metric's own units."""

    value: float
    low: float
    high: float


def average(num_correct: int, num_completions: int) -> Fraction:
    """avg@n of one problem: the fraction of its n completions that are right; pass@1 is the same number."""
    return Fraction(num_correct, num_completions)


def pass_at_k(num_correct: int, num_completions: int, k: int) -> Fraction:
    r"""
    Unbiased estimate of the probability that at least one of k completions of a problem is right:

    $$\mathrm{pass@}k = 1 - \binom{n - c}{k} \Big/ \binom{n}{k}$$

    ([Evaluating Large Language Models Trained on Code](https://huggingface.co/papers/2107.03374), equation 1). At k = 1 it is
    the average, at k = n whether any completion is right.

    Args:
        num_correct (`int`):
            c, right completions.
        num_completions (`int`):
            n, completions; at least `k`.
        k (`int`):
            Attempts, at least 1.

    Raises:
        `ValueError`: `k` is not in [1, n], or `num_correct` not in [0, n].
    """
    if not 1 <= k <= num_completions:
        raise ValueError(
            f"pass@{k} of {num_completions} completions is not defined: k must be from 1 to {num_completions}."
        )
    if not 0 <= num_correct <= num_completions:
        raise ValueError(f"{num_correct} of {num_completions} completions cannot be right.")
    return 1 - Fraction(math.comb(num_completions - num_correct, k), math.comb(num_completions, k))


def exact_mean(values: Sequence[Fraction]) -> float:
    """Mean of fractions, rounded once."""
    return float(sum(values, Fraction(0)) / len(values))


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


def estimate(values: Sequence[Fraction], *, seed: int) -> Estimate:
    """The mean over problems and its interval; all values equal give an interval of length 0."""
    low, high = interval(bootstrap_means([float(value) for value in values], seed=seed))
    return Estimate(value=exact_mean(values), low=low, high=high)


def mean_of_benchmarks(benchmarks: Mapping[str, Sequence[Fraction]], *, seed: int) -> Estimate:
    """The unweighted mean over benchmarks; the problems of each one are resampled among themselves."""
    means = [
        bootstrap_means([float(value) for value in values], seed=seed + position)
        for position, values in enumerate(benchmarks.values())
    ]
    low, high = interval(np.mean(means, axis=0))
    value = sum((sum(values, Fraction(0)) / len(values) for values in benchmarks.values()), Fraction(0))
    return Estimate(value=float(value / len(benchmarks)), low=low, high=high)


def paired_differences(first: Sequence[Fraction], second: Sequence[Fraction]) -> list[Fraction]:
    """
    `second - first` problem by problem. Their mean has the smaller interval the more the two models find the same problems
    hard, since the difficulty of a problem cancels.
    """
    return [b - a for a, b in zip(first, second, strict=True)]


def interval(means: np.ndarray) -> tuple[float, float]:
    """The 95 % percentile interval of bootstrap means."""
    low, high = np.percentile(means, INTERVAL)
    return float(low), float(high)
