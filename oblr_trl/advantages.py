"""From rewards and scores to advantages r - b, and what the baseline in use did compared with the others.

Shapes: N prompts (groups), G completions per prompt; everything is gathered over processes before it comes here.
"""

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from oblr_trl.baselines import (
    AutomaticPriorStrength,
    gradient_variance,
    gradient_weighted_baseline,
    group_mean_baseline,
    leave_one_out_baseline,
    length_weighted_baseline,
)
from oblr_trl.gradient_snr import gradient_moments, per_prompt_gradients

Baseline = Literal["gradient_weighted", "group_mean", "leave_one_out", "length_weighted"]
BASELINES: tuple[str, ...] = get_args(Baseline)


@dataclass
class GroupedBatch:
    """
    One generation batch, grouped by prompt.

    Args:
        rewards (`torch.Tensor` of shape `(N, G)`): Rewards; `nan` where a completion could not be scored.
        lengths (`torch.Tensor` of shape `(N, G)`): Number of completion tokens in the loss.
        weights (`torch.Tensor` of shape `(N, G)`, *optional*): Squared score norms, if the scoring pass ran.
        sketches (`torch.Tensor` of shape `(N, G, k)`, *optional*): Score sketches, if the scoring pass ran.
    """

    rewards: Tensor
    lengths: Tensor
    weights: Tensor | None = None
    sketches: Tensor | None = None


class BaselineEstimator:
    """
    Applies the configured baseline, and keeps the state of the automatic prior strength.

    Args:
        baseline (`str`): One of `"gradient_weighted"`, `"group_mean"`, `"leave_one_out"`, `"length_weighted"`.
        leave_one_out (`bool`): Whether weighted baselines keep a completion out of its own baseline.
        prior_strength (`float`, *optional*): Prior strength of the gradient-weighted baseline; automatic if not given.
    """

    def __init__(self, baseline: str, *, leave_one_out: bool, prior_strength: float | None) -> None:
        self.baseline = baseline
        self.leave_one_out = leave_one_out
        self.automatic = AutomaticPriorStrength() if prior_strength is None else None
        self._fixed_strength = prior_strength

    @property
    def prior_strength(self) -> float:
        """Prior strength for the next batch, in completions; 0 for baselines without prior."""
        if self.baseline != "gradient_weighted":
            return 0.0
        if self.automatic is not None:
            return self.automatic.value
        assert self._fixed_strength is not None
        return self._fixed_strength

    def __call__(self, batch: GroupedBatch) -> Tensor:
        """The baseline of every completion, of shape `(N, G)`. The automatic strength learns from the batch afterwards."""
        if self.baseline == "group_mean":
            return group_mean_baseline(batch.rewards)
        if self.baseline == "leave_one_out":
            return leave_one_out_baseline(batch.rewards)
        if self.baseline == "length_weighted":
            return length_weighted_baseline(batch.rewards, batch.lengths, leave_one_out=self.leave_one_out)
        assert batch.weights is not None, "the gradient-weighted baseline needs the scoring pass"
        baselines = gradient_weighted_baseline(
            batch.rewards, batch.weights, leave_one_out=self.leave_one_out, prior_strength=self.prior_strength
        )
        if self.automatic is not None:
            self.automatic.update(batch.rewards, batch.weights)
        return baselines


def baseline_metrics(batch: GroupedBatch, baselines: Tensor) -> dict[str, float]:
    r"""
    What the baseline did on one batch; every value is `nan` where it is undefined.

    `baseline/mean` (reward units); `baseline/shift`, the mean of abs(b - group mean); and, where the scoring pass ran,
    `baseline/effective_group_size` \\( (\sum w)^2 / \sum w^2 \\), from 1 to G; `score/norm/mean` and `score/norm/max`; and
    `variance_ratio/*`, the variance of one completion's gradient under the baseline in use over that under another one (below
    1 is a gain): [`gradient_variance`], a second moment, less the squared norm of the mean gradient, estimated from the same
    batch. The group mean sees its own completion, which shrinks its gradient by (G - 1) / G and its variance by the square of
    it; the fair comparison at small G is `variance_ratio/leave_one_out`.
    """
    rewards, weights, sketches = batch.rewards, batch.weights, batch.sketches
    group_means = group_mean_baseline(rewards)
    used = ~rewards.isnan()
    metrics = {
        "baseline/mean": baselines[used].nanmean().item(),
        "baseline/shift": (baselines - group_means)[used].abs().nanmean().item(),
    }
    if weights is None or sketches is None:
        return metrics
    scored = torch.where(used, weights, 0.0).double()
    effective = scored.sum(dim=1).square() / scored.square().sum(dim=1)
    norms = weights[used].double().sqrt()

    def variance(baseline: Tensor) -> float:
        signal = gradient_moments(per_prompt_gradients(sketches, rewards - baseline)).signal
        return max(gradient_variance(rewards, weights, baseline) - signal, 0.0)

    own = variance(baselines)
    others = {
        "group_mean": group_means,
        "leave_one_out": leave_one_out_baseline(rewards),
        "length_weighted": length_weighted_baseline(rewards, batch.lengths),
    }
    return metrics | {
        "baseline/effective_group_size": effective.nanmean().item(),
        "score/norm/mean": norms.mean().item(),
        "score/norm/max": norms.max().item() if norms.numel() else math.nan,
        **{f"variance_ratio/{name}": _ratio(own, variance(other)) for name, other in others.items()},
    }


def _ratio(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator > 0 else math.nan


def differentiates_sequences(loss_type: str, importance_sampling_level: str) -> bool:
    """Whether the loss differentiates one importance ratio per sequence. `cispo` weights the gradient of every token, whatever
    the level of its ratio."""
    return importance_sampling_level == "sequence" and loss_type != "cispo"


def applied_importance_ratio(
    ratio: Tensor, loss_mask: Tensor, *, loss_type: str, importance_sampling_level: str
) -> Tensor:
    r"""
    What vLLM's correction multiplies \\( \nabla \log \pi(o_t) \\) by.

    That is the ratio itself, except where the loss differentiates the ratio of a sequence, whose gradient is the mean over its
    tokens: \\( \sum_t c_t \nabla \tfrac{1}{|o|} \sum_s \log \pi(o_s) \\) gives every token the mean of the \\( c_t \\).

    Args:
        ratio (`torch.Tensor` of shape `(B, C)` or `(B, 1)`): vLLM's importance ratio, of tokens or of sequences.
        loss_mask (`torch.Tensor` of shape `(B, C)`): Completion mask x tool mask.
        loss_type (`str`): Loss type of [`~trl.GRPOConfig`].
        importance_sampling_level (`str`): `"token"` or `"sequence"`: level of the ratio that the loss differentiates.

    Returns:
        `torch.Tensor` of shape `(B, C)` or `(B, 1)`.
    """
    if not differentiates_sequences(loss_type, importance_sampling_level):
        return ratio
    return (ratio * loss_mask).sum(dim=1, keepdim=True) / loss_mask.sum(dim=1, keepdim=True).clamp(min=1)


def loss_token_weights(loss_type: str, loss_mask: Tensor, importance_ratio: Tensor | None = None) -> Tensor:
    r"""
    What the loss multiplies \\( A \nabla \log \pi(o_t) \\) by at importance ratio 1, up to one constant per batch.

    `grpo` averages over each completion's tokens, \\( 1 / |o_i| \\); `bnpo` over all tokens of the process; the others divide
    by a constant, so the sum over tokens stays: the paper's sequence score.

    Args:
        loss_type (`str`): Loss type of [`~trl.GRPOConfig`], linear in the advantage.
        loss_mask (`torch.Tensor` of shape `(B, C)`): Completion mask x tool mask.
        importance_ratio (`torch.Tensor` of shape `(B, C)` or `(B, 1)`, *optional*): [`applied_importance_ratio`].

    Returns:
        `torch.Tensor` of shape `(B, C)`: The token weights, in float32.
    """
    weights = loss_mask.float()
    if loss_type == "grpo":
        weights = weights / weights.sum(dim=1, keepdim=True).clamp(min=1)
    elif loss_type == "bnpo":
        weights = weights * weights.size(0) / weights.sum().clamp(min=1)
    return weights if importance_ratio is None else weights * importance_ratio
