"""Names of the metrics, which every writer and reader of logs takes from here, and the diagnostics of one batch."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from oblr_trl.baselines import (
    GroupedBatch,
    gradient_variance,
    group_mean_baseline,
    leave_one_out_baseline,
    length_weighted_baseline,
)
from oblr_trl.baselines.weights_choice import EQUAL, LM_HEAD
from oblr_trl.gradient_snr import gradient_moments, per_prompt_gradients

# Of TRL and transformers.
REWARD = "reward"
EVAL_ACCURACY = "eval_accuracy"
EVAL_REWARD = "eval_reward"
EVALUATIONS = (EVAL_ACCURACY, EVAL_REWARD)
LEARNING_RATE = "learning_rate"  # with the multiplier in it

# Of OBLRPOTrainer, each bound to its name where it is listed.
METRICS = (
    BASELINE_MEAN := "baseline/mean",
    BASELINE_SHIFT := "baseline/shift",
    PRIOR_STRENGTH := "baseline/prior_strength",
    MEMORY_STRENGTH := "baseline/memory_strength",
    REMEMBERED_FRACTION := "baseline/remembered_fraction",
    EFFECTIVE_GROUP_SIZE := "baseline/effective_group_size",
    LIVE_FRACTION := "advantage/live_fraction",
    LIVE_FRACTION_GROUP_MEAN := "advantage/live_fraction_group_mean",
    SCORED_FRACTION := "score/fraction",
    SCORE_NORM_MEAN := "score/norm/mean",
    SCORE_NORM_MAX := "score/norm/max",
    PASS_TIME := "score/pass_time",
    SIGNAL := "gradient_snr/signal",
    NOISE := "gradient_snr/noise",
    NOISE_PER_ROLLOUT := "gradient_snr/noise_per_rollout",
    RHO := "gradient_snr/rho",
    NUM_PROMPTS := "gradient_snr/num_prompts",
    LR_MULTIPLIER := "lr_multiplier",
    KL := "trust_region/kl",
    KL_TARGET := "trust_region/kl_target",
    ENTROPY := "trust_region/entropy",
    CORRELATION := "trust_region/correlation",
    CURVATURE := "trust_region/curvature",
    PREDICTED_GAIN := "trust_region/predicted_gain",
    VARIANCE_VS_GROUP_MEAN := "variance_ratio/group_mean",
    VARIANCE_VS_LEAVE_ONE_OUT := "variance_ratio/leave_one_out",
    VARIANCE_VS_LENGTH_WEIGHTED := "variance_ratio/length_weighted",
    VARIANCE_VS_EQUAL_WEIGHTS := "variance_ratio/equal_weights",
    VARIANCE_VS_LM_HEAD_WEIGHTS := "variance_ratio/lm_head_weights",
)


def baseline_metrics(batch: GroupedBatch, baselines: Tensor) -> dict[str, float]:
    r"""
    What the baseline did on one batch; every value is `nan` where it is undefined.

    `baseline/mean` (reward units); `baseline/shift`, the mean of abs(b - group mean); `advantage/live_fraction`, the share of
    scored completions whose reward differs from their baseline, and `advantage/live_fraction_group_mean`, the same of GRPO's
    baseline, both in [0, 1].
    """
    rewards, group_means = batch.rewards, group_mean_baseline(batch.rewards)
    used = ~rewards.isnan()
    return {
        BASELINE_MEAN: baselines[used].nanmean().item(),
        BASELINE_SHIFT: (baselines - group_means)[used].abs().nanmean().item(),
        LIVE_FRACTION: _live_fraction(rewards, baselines),
        LIVE_FRACTION_GROUP_MEAN: _live_fraction(rewards, group_means),
    }


def score_metrics(scored: GroupedBatch, baselines: Tensor) -> dict[str, float]:
    r"""
    What the scores of a batch, or of a sample of its prompts, say of the baseline in use.

    `baseline/effective_group_size` \\( (\sum w)^2 / \sum w^2 \\), from 1 to G; `score/norm/mean` and `score/norm/max`; and
    `variance_ratio/*`, the variance of one completion's gradient under the baseline in use over that under another one (below 1 is
    a gain): [`gradient_variance`], a second moment, less the squared norm of the mean gradient, estimated from the same batch. The
    group mean sees its own completion, which shrinks its gradient by (G - 1) / G and its variance by the square of it; the fair
    comparison at small G is `variance_ratio/leave_one_out`. At G = 1 no other baseline is left to compare with.
    """
    rewards, weights, sketches = scored.rewards, scored.weights, scored.sketches
    assert weights is not None
    assert sketches is not None
    used = ~rewards.isnan()
    squares = torch.where(used, weights, 0.0).double()
    effective = squares.sum(dim=1).square() / squares.square().sum(dim=1)
    norms = weights[used].double().sqrt()

    def variance(baseline: Tensor) -> float:
        signal = gradient_moments(per_prompt_gradients(sketches, rewards - baseline)).signal
        return max(gradient_variance(rewards, weights, baseline) - signal, 0.0)

    own = variance(baselines)
    others = {
        VARIANCE_VS_GROUP_MEAN: variance(group_mean_baseline(rewards)),
        VARIANCE_VS_LEAVE_ONE_OUT: variance(leave_one_out_baseline(rewards)),
        VARIANCE_VS_LENGTH_WEIGHTED: variance(length_weighted_baseline(rewards, scored.lengths)),
    }
    return {
        EFFECTIVE_GROUP_SIZE: effective.nanmean().item(),
        SCORE_NORM_MEAN: norms.mean().item(),
        SCORE_NORM_MAX: norms.max().item() if norms.numel() else math.nan,
        **{name: own / other if other > 0 else math.nan for name, other in others.items()},
    }


def weights_metrics(gains: Mapping[str, float]) -> dict[str, float]:
    """`variance_ratio/equal_weights` and `variance_ratio/lm_head_weights`: the variance with the weights of all parameters over that with
    cheaper ones, smoothed over batches, which decides between them (see [`~baselines.WeightsChoice`])."""
    return {
        VARIANCE_VS_EQUAL_WEIGHTS: gains.get(EQUAL, math.nan),
        VARIANCE_VS_LM_HEAD_WEIGHTS: gains.get(LM_HEAD, math.nan),
    }


def _live_fraction(rewards: Tensor, baselines: Tensor) -> float:
    """Share of the scored completions with a non-zero advantage; one without baseline gets the advantage 0."""
    scored = ~rewards.isnan()
    # The mean of equal rewards may differ from them by rounding.
    live = scored & ~baselines.isnan() & ~baselines.isclose(rewards)
    return (live.sum() / scored.sum()).item()
