"""Signal, noise and rho as a training run would have estimated them, and their errors.

Everything is the package's own code on the package's own sketches. Errors are relative to the true rho of the same
batch size. *Bias* is the error of the mean over batches, *typical* the median of the absolute errors: an estimate
without bias can still be far off every time.

Shapes: P prompts, N prompts per batch, G completions per prompt, k numbers of a sketch.
"""

import math
from collections.abc import Iterator, Sequence
from statistics import mean
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.completion_pool import Completions
from benchmarks.gradient_variance import advantages_in_turn
from oblr_trl.baselines import GroupedBatch
from oblr_trl.gradient_snr import GradientMoments, GradientSNR, gradient_moments, per_prompt_gradients, rho

# A moving average counts once the weights of its batches, before correction, add up to this.
_WARM = 0.9
# The trainer's default.
DECAY = 0.9


class Rollouts(NamedTuple):
    """Completions of a policy, their rewards `(P, G)` and their score sketches `(P, G, k)`."""

    completions: Completions
    rewards: Tensor
    sketches: Tensor


def stream_advantages(rollouts: Rollouts, prompts: Tensor, num_prompts: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of prompts `(N,)` and their advantages `(N, G)` under the trainer's default baseline, in the order of
    `prompts`; prompts that fill no batch are left out."""
    batches = [batch for batch in prompts.split(num_prompts) if batch.numel() == num_prompts]
    norms = rollouts.sketches.square().sum(dim=2)
    lengths = rollouts.completions.completion_mask.sum(dim=1).view_as(norms)
    grouped = [GroupedBatch(rollouts.rewards[batch], lengths[batch], norms[batch]) for batch in batches]
    return zip(batches, advantages_in_turn(grouped), strict=True)


def batch_moments(rollouts: Rollouts, prompts: Tensor, num_prompts: int) -> list[GradientMoments]:
    """The package's signal and noise of the batches of [`stream_advantages`]."""
    return [
        gradient_moments(per_prompt_gradients(rollouts.sketches[batch], advantages))
        for batch, advantages in stream_advantages(rollouts, prompts, num_prompts)
    ]


def mean_moments(batches: Sequence[GradientMoments]) -> GradientMoments:
    """Mean signal and mean noise of many batches."""
    return GradientMoments(*(mean(values) for values in zip(*batches, strict=True)))


def smoothed_rhos(batches: Sequence[GradientMoments], decay: float, num_prompts: int) -> list[float]:
    """Rho after each batch by [`GradientSNR`], without the holding back at the start."""
    snr = GradientSNR(decay=decay)
    rhos = []
    for moments in batches:
        snr.update(moments)
        rhos.append(rho(snr.signal, snr.noise, num_prompts))
    return rhos


def warm_rhos(batches: Sequence[GradientMoments], decay: float, num_prompts: int) -> list[float]:
    """[`smoothed_rhos`] from where the moving average has filled up; empty if it never does."""
    warm_up = 0 if decay == 0 else math.ceil(math.log(1 - _WARM) / math.log(decay)) - 1
    return smoothed_rhos(batches, decay, num_prompts)[warm_up:]


def error_summary(rhos: Sequence[float], true: float) -> dict[str, float] | None:
    """Bias and spread of estimates of one true rho; `None` without estimates or without a positive true rho."""
    values = torch.tensor([value for value in rhos if not math.isnan(value)], dtype=torch.float64)
    if not values.numel() or not true > 0:
        return None
    errors = values / true - 1
    return {
        "num_estimates": values.numel(),
        "bias": errors.mean().item(),
        "typical_error": errors.abs().median().item(),
    }


def summarise_size(streams: Sequence[Sequence[GradientMoments]], true_rho: float, num_prompts: int) -> dict[str, Any]:
    """Errors of the estimates at one batch size; `streams` are the batches in several orders of the prompts."""
    batches = [batch for stream in streams for batch in stream]
    smoothed = [value for stream in streams for value in warm_rhos(stream, DECAY, num_prompts)]
    return {
        "num_prompts": num_prompts,
        "true_rho": true_rho,
        "error_of_mean_moments": rho(*mean_moments(batches), num_prompts) / true_rho - 1,
        "negative_signal": mean(signal < 0 for signal, _ in batches),
        "single_batch": error_summary([rho(*moments, num_prompts) for moments in batches], true_rho),
        "moving_average": error_summary(smoothed, true_rho),
    }
