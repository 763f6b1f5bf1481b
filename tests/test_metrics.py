import math

import pytest
import torch

from oblr_trl.baselines import BaselineEstimator, GroupedBatch
from oblr_trl.metrics import baseline_metrics


def test_variance_ratios_by_hand():
    """One dimension, so that a completion's gradient is a number: A z."""
    sketches = torch.tensor([[[1.0], [2.0]], [[-1.0], [1.0]]])
    rewards = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    batch = GroupedBatch(rewards, torch.ones(2, 2), sketches.square().sum(dim=2), sketches)
    metrics = baseline_metrics(batch, torch.zeros(2, 2))
    # b = 0: A z = (1, 0), (-1, 0); second moment 2 / 4. g = 1/2, -1/2: mean 0, noise 1/2, signal 0 - 1/4.
    own = 0.5 + 0.25
    # Leave-one-out: A = 1, -1; A z = (1, -2), (-1, -1); second moment 7 / 4. g = -1/2, -1: mean -3/4, noise 1/8, signal 9/16 - 1/16.
    loo = 7 / 4 - 0.5
    assert metrics["variance_ratio/leave_one_out"] == pytest.approx(own / loo)
    # Equal lengths are the leave-one-out mean; the group mean's advantages are half of it, its variance a quarter.
    assert metrics["variance_ratio/length_weighted"] == pytest.approx(own / loo)
    assert metrics["variance_ratio/group_mean"] == pytest.approx(4 * own / loo)


def test_without_noise_there_is_no_variance_to_compare():
    sketches = torch.ones(
        4, 2, 1
    )  # every completion's gradient under b = 0 is 1: a second moment of 1, all of it signal
    rewards = torch.ones(4, 2)
    metrics = baseline_metrics(
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
