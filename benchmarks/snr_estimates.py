r"""What a training run would have estimated: signal, noise and rho batch by batch, an interval, moving averages.

Everything is the package's own code on the package's own sketches, but for two things under test: an interval, which the
package does not give, and [`PooledGradientSNR`], which uses the inner products of *different* batches too.

Shapes: P prompts, N prompts per batch, G completions per prompt, k numbers of a sketch.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from benchmarks.snr_rollouts import Rollouts
from benchmarks.snr_truth import jackknife_error
from oblr_trl.baselines import BaselineEstimator, GroupedBatch
from oblr_trl.gradient_snr import GradientMoments, GradientSNR, gradient_moments, per_prompt_gradients, rho

# Two-sided 95 % of the normal distribution.
_NORMAL_QUANTILE = 1.96
INTERVALS = ("log", "plain")
# A moving average counts once the weights of its batches, before correction, add up to this.
_WARM = 0.9


@dataclass(frozen=True)
class BatchEstimate:
    """
    One batch.

    Args:
        moments (`GradientMoments`): The package's signal and noise.
        mean_gradient (`torch.Tensor` of shape `(k,)`): Sketch of the batch's mean gradient.
        intervals (`dict[str, tuple[float, float]]`): 95 % interval of rho by its name in `INTERVALS`.
    """

    moments: GradientMoments
    mean_gradient: Tensor
    intervals: dict[str, tuple[float, float]]


class SNREstimate(Protocol):
    """A smoothed estimate of rho, fed with one batch at a time."""

    def add(self, batch: BatchEstimate, num_prompts: int) -> float:
        """Take in a batch and return rho."""


class SeparateGradientSNR:
    """The package's [`GradientSNR`], without the holding back at the start: signal from the pairs within each batch, averaged."""

    def __init__(self, decay: float) -> None:
        self._snr = GradientSNR(decay=decay)

    def add(self, batch: BatchEstimate, num_prompts: int) -> float:
        """Take in a batch and return rho."""
        self._snr.update(batch.moments)
        return rho(self._snr.signal, self._snr.noise, num_prompts)


class PooledGradientSNR:
    r"""
    Signal from the pairs of *all* remembered prompts: the moving average is taken of the mean gradient itself.

    With normalised weights \\( a_t \\) of the batches, \\( \|\sum_t a_t \hat g_t\|^2 \\) has the expectation
    \\( \|\nabla J\|^2 + \sum_t a_t^2\, \mathrm{tr}(H) / N_t \\) as long as the gradient does not turn; the second term is
    subtracted. A decay of 0 is [`GradientSNR`].
    """

    def __init__(self, decay: float) -> None:
        self._snr = GradientSNR(decay=decay)
        self._mean: Tensor | float = 0.0
        self._weight = 0.0
        self._noise_weight = 0.0

    def add(self, batch: BatchEstimate, num_prompts: int) -> float:
        """Take in a batch and return rho."""
        decay = self._snr.decay
        self._snr.update(batch.moments)
        self._mean = decay * self._mean + (1 - decay) * batch.mean_gradient.double()
        self._weight = decay * self._weight + (1 - decay)
        self._noise_weight = decay**2 * self._noise_weight + (1 - decay) ** 2 / num_prompts
        square = self._mean.square().sum().item()
        self.signal = (square - self._noise_weight * self._snr.noise) / self._weight**2
        return rho(self.signal, self._snr.noise, num_prompts)


ESTIMATORS: dict[str, type[SeparateGradientSNR] | type[PooledGradientSNR]] = {
    "separate": SeparateGradientSNR,
    "pooled": PooledGradientSNR,
}


def stream_advantages(rollouts: Rollouts, prompts: Tensor, num_prompts: int) -> Iterator[tuple[Tensor, Tensor]]:
    """
    Advantages of the trainer's default baseline, batch by batch; the automatic prior strength comes from earlier batches.

    Args:
        rollouts ([`Rollouts`]): The rollouts.
        prompts (`torch.Tensor` of shape `(P,)`): Order of the prompts.
        num_prompts (`int`): Prompts per batch; prompts that fill no batch are left out.

    Yields:
        Prompts of the batch `(N,)` and their advantages `(N, G)`.
    """
    norms = rollouts.sketches.square().sum(dim=1)
    lengths = rollouts.completion_mask.sum(dim=1)
    estimator = BaselineEstimator("gradient_weighted", leave_one_out=True, prior_strength=None)
    for batch in prompts.split(num_prompts):
        if batch.numel() == num_prompts:
            sequences = rollouts.sequences[batch]
            rewards = rollouts.rewards[batch]
            grouped = GroupedBatch(rewards, lengths[sequences], norms[sequences])
            yield batch, rewards - estimator(grouped)
            estimator.update(grouped)


def batch_estimates(rollouts: Rollouts, prompts: Tensor, num_prompts: int) -> list[BatchEstimate]:
    """Estimates of the batches of `num_prompts` prompts that `prompts` (P,) divides into; arguments as above."""
    return [
        estimate_batch(per_prompt_gradients(rollouts.sketches[rollouts.sequences[batch]], advantages))
        for batch, advantages in stream_advantages(rollouts, prompts, num_prompts)
    ]


def estimate_batch(gradients: Tensor) -> BatchEstimate:
    """Moments and intervals from the per-prompt gradients `(N, k)` of one batch."""
    return BatchEstimate(gradient_moments(gradients), gradients.mean(dim=0), ratio_intervals(gradients))


def ratio_intervals(gradients: Tensor) -> dict[str, tuple[float, float]]:
    r"""
    95 % intervals of rho from one batch, by the jackknife over its prompts.

    `plain` is the normal interval of rho itself. `log` is that of log F with
    \\( F = \|\hat g\|^2 / (\text{noise} / N) = 1 / (1 - \rho) \\), estimated as 1 + N signal / noise: unlike rho, F has no
    upper bound that its spread would have to shrink before. Both are cut to [0, 1]; `nan` for fewer than three prompts.
    """
    num_prompts = gradients.size(0)
    if num_prompts < 3:
        return dict.fromkeys(INTERVALS, (math.nan, math.nan))
    grams = gradients.double() @ gradients.double().T
    squares, dots, total = grams.diagonal(), grams.sum(dim=1), grams.sum()

    def statistic(total: Tensor, squares: Tensor, count: int) -> Tensor:
        """F of a step of N prompts, from the `count` prompts that are left."""
        mean_square = total / count**2
        noise = (squares / count - mean_square) * count / (count - 1)
        return 1 + num_prompts * (mean_square - noise / count) / noise

    whole = statistic(total, squares.sum(), num_prompts)
    without = statistic(total - 2 * dots + squares, squares.sum() - squares, num_prompts - 1)
    rho = 1 - 1 / whole
    # F is a ratio of two positive numbers for the whole batch; without a prompt it may leave the range of the logarithm.
    log_error, plain_error = (jackknife_error(values) for values in (without.clamp(min=1e-3).log(), 1 - 1 / without))
    log_ends = [1 - 1 / (whole * math.exp(side * _NORMAL_QUANTILE * log_error)) for side in (-1, 1)]
    plain_ends = [rho + side * _NORMAL_QUANTILE * plain_error for side in (-1, 1)]
    ends = {"log": log_ends, "plain": plain_ends}
    return {name: (_clip(low), _clip(high)) for name, (low, high) in ends.items()}


def _clip(end: Tensor) -> float:
    return min(max(end.item(), 0.0), 1.0)


def smoothed_ratios(batches: Sequence[BatchEstimate], estimator: str, decay: float, num_prompts: int) -> list[float]:
    """rho after each batch of a stream at which the moving average has filled up; empty if it never does."""
    smoothed = ESTIMATORS[estimator](decay)
    ratios = [smoothed.add(batch, num_prompts) for batch in batches]
    warm_up = 0 if decay == 0 else math.ceil(math.log(1 - _WARM) / math.log(decay)) - 1
    return ratios[warm_up:]
