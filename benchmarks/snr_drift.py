r"""How far a moving average lags behind a policy that moves, on one real run.

The path of the truth: signals of snapshots, exact, and the noise of the steps around them. Between snapshots both are
interpolated in their logarithms. Smoothed without any sampling error, the path shows the lag alone; the run's own batches,
smoothed and held against the path, show lag and sampling error together.
"""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from benchmarks.snr_estimates import ESTIMATORS, estimate_batch
from oblr_trl.gradient_snr import GradientMoments, GradientSNR, gradient_moments, rho


def interpolated(path: Mapping[int, GradientMoments]) -> list[GradientMoments]:
    """Moments at every step from the first to the last step of `path`; they must be positive."""
    steps = sorted(path)
    result = []
    for start, end in pairwise(steps):
        for step in range(start, end):
            share = (step - start) / (end - start)
            pairs = zip(path[start], path[end], strict=True)
            result.append(
                GradientMoments(*(math.exp((1 - share) * math.log(a) + share * math.log(b)) for a, b in pairs))
            )
    return [*result, path[steps[-1]]]


def lag_errors(path: Mapping[int, GradientMoments], decay: float, num_prompts: int) -> list[float]:
    """Relative error of rho by lag alone, at every step of the path."""
    snr = GradientSNR(decay=decay)
    errors = []
    for moments in interpolated(path):
        snr.update(moments)
        errors.append(rho(snr.signal, snr.noise, num_prompts) / rho(*moments, num_prompts) - 1)
    return errors


def lag_summary(path: Mapping[int, GradientMoments], decays: Sequence[float], num_prompts: int) -> dict[str, Any]:
    """Root mean square and mean of [`lag_errors`] by decay."""
    summary = {}
    for decay in decays:
        errors = torch.tensor(lag_errors(path, decay, num_prompts), dtype=torch.float64)
        summary[str(decay)] = {"rms": errors.square().mean().sqrt().item(), "mean": errors.mean().item()}
    return summary


def noise_around(step_gradients: Tensor, step: int, *, half_width: int) -> float:
    """Mean noise of the run's batches at most `half_width` steps from the policy after `step` steps."""
    around = step_gradients[max(step - half_width, 0) : step + half_width + 1]
    return sum(gradient_moments(gradients).noise for gradients in around) / len(around)


def run_errors(step_gradients: Tensor, path: Mapping[int, GradientMoments], decays: Sequence[float]) -> dict[str, Any]:
    """
    Error of rho along the run, in units of rho (it is near 0 at some steps), by estimator and decay.

    Args:
        step_gradients (`torch.Tensor` of shape `(num_steps, num_prompts, k)`): As the trainer computed them; batch t is drawn
            from the policy after t steps.
        path (`Mapping[int, GradientMoments]`): True moments by number of steps.
        decays (`Sequence[float]`): Decays to compare.
    """
    num_prompts = step_gradients.size(1)
    true = torch.tensor([rho(*m, num_prompts) for m in interpolated(path)][: len(step_gradients)])
    batches = [estimate_batch(gradients) for gradients in step_gradients]
    errors: dict[str, dict[str, Any]] = {}
    for name, estimator in ESTIMATORS.items():
        errors[name] = {}
        for decay in decays:
            smoothed = estimator(decay)
            error = torch.tensor([smoothed.add(batch, num_prompts) for batch in batches]) - true
            errors[name][str(decay)] = {
                "mean": error.nanmean().item(),
                "rms": error.square().nanmean().sqrt().item(),
            }
    # The spread of the true rho is the error of a constant equal to its mean: what tracking has to beat.
    return {"mean_true_rho": true.mean().item(), "constant_rms": true.std(correction=0).item(), "errors": errors}
