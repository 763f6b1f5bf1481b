r"""How far weights, baselines and rho from sketches are from exact ones, on one batch; for `benchmarks.fidelity`.

Shapes: P prompts, G completions of each, D trained parameters, k numbers of a sketch.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from oblr_trl.baselines import gradient_variance, gradient_weighted_baseline, leave_one_out_baseline
from oblr_trl.gradient_snr import GradientMoments, gradient_moments, per_prompt_gradients, rho

# Relative difference below which two weights are one: equal completions differ by rounding.
_TIE = 1e-4


def average_ranks(values: Tensor) -> Tensor:
    """Ranks along the last dimension; values that differ by rounding alone share the mean of theirs."""
    difference = values.unsqueeze(-1) - values.unsqueeze(-2)
    tied = difference.abs() <= _TIE * values.abs().amax(dim=-1, keepdim=True).unsqueeze(-1)
    return torch.where(tied, 0.5, (difference > 0).double()).sum(dim=-1)


def rank_correlation(estimate: Tensor, exact: Tensor) -> float:
    """
    Spearman's rank correlation within groups, mean over the groups in which both differ; `nan` if there is none.

    Args:
        estimate (`torch.Tensor` of shape `(P, G)`): Weights.
        exact (`torch.Tensor` of shape `(P, G)`): Exact weights.
    """
    a, b = (ranks - ranks.mean(dim=1, keepdim=True) for ranks in (average_ranks(estimate), average_ranks(exact)))
    scale = (a.square().sum(dim=1) * b.square().sum(dim=1)).sqrt()
    used = scale > 0
    return ((a * b).sum(dim=1)[used] / scale[used]).mean().item() if bool(used.any()) else math.nan


def measure_sketches(
    rewards: Tensor,
    scores: Sequence[Tensor],
    sketches: Mapping[str, tuple[Tensor, Mapping[str, Tensor]]],
    *,
    prior_strength: float,
) -> dict[str, Any]:
    """
    Compare every sketch of a batch with exact scores.

    Args:
        rewards (`torch.Tensor` of shape `(P, G)`): Rewards.
        scores (`Sequence[torch.Tensor]`): Exact scores `(G, D)` of every prompt.
        sketches (`Mapping`): By scope, the exact squared norms `(P, G)` in that scope, and sketches `(P * G, k)` by their name.
        prior_strength (`float`): Prior strength of the baseline.

    Returns:
        `dict`: The exact moments; `rloo_objective`, the objective of RLOO relative to that of the exact baseline; and for every
        scope and sketch `rank_correlation` of the weights with exact ones; `norm_error`, the median relative error of ‖z‖²
        against the scope's own norms; `baseline_difference`, the mean difference of the baselines in standard deviations of
        the reward; `objective` of the baseline relative to that of the exact one; and the `moments` of the gradient under
        the exact baseline's advantages.
    """
    exact = torch.stack([score.double().square().sum(dim=1) for score in scores])
    baseline = gradient_weighted_baseline(rewards, exact, prior_strength=prior_strength)
    advantages = rewards - baseline
    least = gradient_variance(rewards, exact, baseline)
    gradients = torch.stack(
        [advantage @ score.double() / len(advantage) for advantage, score in zip(advantages, scores, strict=True)]
    )

    def compared(norms: Tensor, sketch: Tensor) -> dict[str, Any]:
        weights = sketch.double().square().sum(dim=1).view_as(rewards)
        own = gradient_weighted_baseline(rewards, weights, prior_strength=prior_strength)
        sketched = per_prompt_gradients(sketch.double().view(*rewards.shape, -1), advantages)
        scored = norms > 0
        return {
            "rank_correlation": rank_correlation(weights, exact),
            "norm_error": (weights / norms - 1)[scored].abs().median().item(),
            "baseline_difference": ((own - baseline).abs().mean() / rewards.std()).item(),
            "objective": gradient_variance(rewards, exact, own) / least,
            "moments": tuple(gradient_moments(sketched)),
        }

    return {
        "moments": tuple(gradient_moments(gradients)),
        "rloo_objective": gradient_variance(rewards, exact, leave_one_out_baseline(rewards)) / least,
        "scopes": {
            scope: {name: compared(norms, sketch) for name, sketch in by_name.items()}
            for scope, (norms, by_name) in sketches.items()
        },
    }


def rho_differences(batches: Sequence[dict[str, Any]], scope: str, name: str, num_prompts: int) -> dict[str, float]:
    """
    Rho from sketches minus rho from exact gradients, each formed from the mean signal and noise of the batches: a difference and
    no ratio, because a signal estimated from few batches may be negative and its rho 0. `min` and `max` leave one batch out.
    """
    exact = [batch["moments"] for batch in batches]
    sketched = [batch["scopes"][scope][name]["moments"] for batch in batches]
    indices = range(len(batches))
    left_out = [
        _difference([sketched[i] for i in indices if i != out], [exact[i] for i in indices if i != out], num_prompts)
        for out in indices
        if len(batches) > 1
    ] or [math.nan]
    return {
        "exact": _rho(exact, num_prompts),
        "difference": _difference(sketched, exact, num_prompts),
        "min": min(left_out),
        "max": max(left_out),
    }


def _rho(moments: Sequence[tuple[float, float]], num_prompts: int) -> float:
    mean = GradientMoments(*(sum(values) / len(moments) for values in zip(*moments, strict=True)))
    return rho(mean.signal, mean.noise, num_prompts)


def _difference(
    sketched: Sequence[tuple[float, float]], exact: Sequence[tuple[float, float]], num_prompts: int
) -> float:
    return _rho(sketched, num_prompts) - _rho(exact, num_prompts)
