import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from oblr_trl.baselines import (
    BaselineEstimator,
    GroupedBatch,
    gradient_weighted_baseline,
    group_mean_baseline,
)
from oblr_trl.metrics import baseline_metrics, score_metrics


def test_variance_ratios_by_hand():
    """One dimension, so that a completion's gradient is a number: A z."""
    sketches = torch.tensor([[[1.0], [2.0]], [[-1.0], [1.0]]])
    rewards = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    batch = GroupedBatch(rewards, torch.ones(2, 2), sketches.square().sum(dim=2), sketches)
    metrics = score_metrics(batch, torch.zeros(2, 2))
    # b = 0: A z = (1, 0), (-1, 0); second moment 2 / 4. g = 1/2, -1/2: mean 0, noise 1/2, signal 0 - 1/4.
    own = 0.5 + 0.25
    # Leave-one-out: A = 1, -1; A z = (1, -2), (-1, -1); second moment 7 / 4. g = -1/2, -1: mean -3/4, noise 1/8, signal 9/16 - 1/16.
    loo = 7 / 4 - 0.5
    assert metrics["variance_ratio/leave_one_out"] == pytest.approx(own / loo)
    # Equal lengths are the leave-one-out mean; the group mean's advantages are half of it, its variance a quarter.
    assert metrics["variance_ratio/length_weighted"] == pytest.approx(own / loo)
    assert metrics["variance_ratio/group_mean"] == pytest.approx(4 * own / loo)


def batch_of(rewards):
    """Rewards with random scores of three coordinates."""
    rewards = torch.tensor(rewards)
    sketches = torch.randn(*rewards.shape, 3, generator=torch.Generator().manual_seed(0))
    return GroupedBatch(rewards, torch.ones_like(rewards), sketches.square().sum(dim=2), sketches)


def test_live_completions_are_those_with_an_advantage():
    # The second group is dead under its own mean, and so is the completion in the middle of the third.
    batch = batch_of([[1.0, 0.0, 0.0], [1.0, 1.0, 1.0], [0.0, 0.5, 1.0]])
    metrics = baseline_metrics(batch, torch.full_like(batch.rewards, 0.4))
    assert metrics["advantage/live_fraction"] == 1.0
    assert metrics["advantage/live_fraction_group_mean"] == pytest.approx(5 / 9)
    metrics = baseline_metrics(batch, group_mean_baseline(batch.rewards))
    assert metrics["advantage/live_fraction"] == pytest.approx(5 / 9)


def test_unscorable_completions_are_neither_live_nor_counted():
    batch = batch_of([[1.0, math.nan, 0.0], [1.0, math.nan, 1.0]])
    metrics = baseline_metrics(batch, torch.tensor([[0.5, 0.5, 0.5], [1.0, 1.0, 0.5]]))
    assert metrics["advantage/live_fraction"] == 3 / 4
    assert metrics["advantage/live_fraction_group_mean"] == 2 / 4
    nothing = baseline_metrics(batch_of([[math.nan], [math.nan]]), torch.full((2, 1), math.nan))
    assert math.isnan(nothing["advantage/live_fraction"])
    assert math.isnan(nothing["advantage/live_fraction_group_mean"])


@settings(max_examples=100, deadline=None)
@given(st.floats(-100, 100, width=32), st.integers(1, 5), st.integers(2, 9), st.floats(0, 64))
def test_equal_rewards_make_no_live_completion_whatever_the_rounding(reward, num_groups, num_generations, strength):
    batch = batch_of([[reward] * num_generations] * num_groups)
    baselines = gradient_weighted_baseline(batch.rewards, batch.weights, prior_strength=strength)
    metrics = baseline_metrics(batch, baselines)
    assert metrics["advantage/live_fraction"] == metrics["advantage/live_fraction_group_mean"] == 0.0


def test_of_one_completion_per_prompt_the_ratios_to_other_baselines_are_undefined():
    batch = batch_of([[1.0], [0.0], [0.0], [math.nan]])
    baselines = gradient_weighted_baseline(batch.rewards, batch.weights, prior_strength=16.0)
    metrics = baseline_metrics(batch, baselines) | score_metrics(batch, baselines)
    assert {name for name, value in metrics.items() if math.isnan(value)} == {
        "variance_ratio/group_mean",
        "variance_ratio/leave_one_out",
        "variance_ratio/length_weighted",
    }
    assert metrics["baseline/effective_group_size"] == 1.0
    assert metrics["advantage/live_fraction"] == 1.0
    assert metrics["advantage/live_fraction_group_mean"] == 0.0  # a mean of one is the reward itself
    assert metrics["baseline/shift"] == pytest.approx((batch.rewards - baselines)[:3].abs().mean().item())


def test_without_noise_there_is_no_variance_to_compare():
    sketches = torch.ones(
        4, 2, 1
    )  # every completion's gradient under b = 0 is 1: a second moment of 1, all of it signal
    rewards = torch.ones(4, 2)
    metrics = score_metrics(
        GroupedBatch(rewards, torch.ones(4, 2), torch.ones(4, 2), sketches), torch.zeros_like(rewards)
    )
    assert math.isnan(metrics["variance_ratio/leave_one_out"])


def test_an_automatic_prior_is_judged_leave_one_out_also_where_the_baseline_is_not():
    """In sample no prior ever helps: a baseline that sees its own reward is closest to it without one."""
    strengths = {}
    for leave_one_out in (True, False):
        generator = torch.Generator().manual_seed(0)
        estimator = BaselineEstimator("gradient_weighted", leave_one_out=leave_one_out, prior_strength=None)
        for _ in range(20):
            weights = torch.exp(2 * torch.randn(24, 4, generator=generator))
            rewards = (torch.rand(24, 4, generator=generator) < 0.5).float()
            estimator.update(GroupedBatch(rewards, torch.ones(24, 4), weights))
        strengths[leave_one_out] = estimator.prior_strength
    assert strengths[False] == strengths[True] >= 8


@pytest.mark.parametrize("baseline", ["group_mean", "leave_one_out", "length_weighted"])
def test_a_baseline_without_prior_learns_no_strength(baseline):
    estimator = BaselineEstimator(baseline, leave_one_out=True, prior_strength=None)
    before = estimator.automatic.state_dict()
    generator = torch.Generator().manual_seed(0)
    rewards, weights = torch.rand(8, 4, generator=generator), torch.rand(8, 4, generator=generator)
    estimator.update(GroupedBatch(rewards, torch.ones(8, 4), weights))
    assert estimator.automatic.state_dict() == before
