"""Reward scaling by the group with a prior: against a slow loop, at its limits, in the trainer."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from trl.trainer.utils import nanstd

from oblr_trl import OBLRPOConfig, gradient_weighted_baseline, leave_one_out_baseline
from oblr_trl.baselines import PRIOR_STRENGTH_GRID, leave_one_out_deviation, scaled_advantages
from tests.recording import Recording, oracle_scores
from tests.test_baselines import batches
from tests.tiny_models import logged, train

NAN = math.nan


def slow_deviation(rewards, prior_strength):
    """The formula of the docstring, one completion at a time, in Python floats."""
    out = torch.full_like(rewards, NAN)
    scored = [[r for r in row if not math.isnan(r)] for row in rewards.tolist()]
    for n, row in enumerate(rewards.tolist()):
        outside = [r for m, group in enumerate(scored) if m != n for r in group]
        for i in range(len(row)):
            inside = [r for j, r in enumerate(row) if j != i and not math.isnan(r)]
            if not outside:
                if len(scored[n]) > 1:
                    mean = sum(scored[n]) / len(scored[n])
                    out[n, i] = math.sqrt(sum((r - mean) ** 2 for r in scored[n]) / (len(scored[n]) - 1))
                continue
            if math.isinf(prior_strength):
                mixture = [(r, 1 / len(outside)) for r in outside]
            else:
                kappa = max(prior_strength, 1.0)
                total = len(inside) + kappa
                mixture = [(r, 1 / total) for r in inside] + [(r, kappa / len(outside) / total) for r in outside]
            mean = sum(share * r for r, share in mixture)
            out[n, i] = math.sqrt(sum(share * (r - mean) ** 2 for r, share in mixture))
    return out


@settings(max_examples=100, deadline=None)
@given(batches(), st.sampled_from(PRIOR_STRENGTH_GRID))
def test_the_deviation_is_its_formula(batch, prior_strength):
    rewards, _ = batch
    fast = leave_one_out_deviation(rewards, prior_strength=prior_strength)
    torch.testing.assert_close(fast, slow_deviation(rewards, prior_strength), rtol=1e-9, atol=1e-9, equal_nan=True)


@settings(max_examples=60, deadline=None)
@given(batches(with_nan=False), st.sampled_from(PRIOR_STRENGTH_GRID), st.floats(-50, 50))
def test_no_completion_enters_its_own_deviation(batch, prior_strength, reward):
    """Bit for bit, unless it belongs to the only prompt."""
    rewards, _ = batch
    if len(rewards) == 1:
        return
    before = leave_one_out_deviation(rewards, prior_strength=prior_strength)[0, 0]
    rewards = rewards.clone()
    rewards[0, 0] = reward
    assert torch.equal(leave_one_out_deviation(rewards, prior_strength=prior_strength)[0, 0], before)


@settings(max_examples=60, deadline=None)
@given(batches(), st.sampled_from(PRIOR_STRENGTH_GRID), st.floats(-5, 5), st.floats(0.1, 10))
def test_the_deviation_ignores_a_shift_of_the_rewards_and_has_their_unit(batch, prior_strength, shift, unit):
    rewards, _ = batch
    deviation = leave_one_out_deviation(rewards, prior_strength=prior_strength)
    moved = leave_one_out_deviation(unit * rewards + shift, prior_strength=prior_strength)
    torch.testing.assert_close(moved, unit * deviation, rtol=1e-6, atol=1e-6, equal_nan=True)


def test_a_small_spread_of_large_rewards_is_not_lost():
    rewards = torch.tensor([[0.0, 1e-3], [1e-3, 0.0]], dtype=torch.float64)
    small = leave_one_out_deviation(rewards, prior_strength=2.0)
    large = leave_one_out_deviation(rewards + 2.0**30, prior_strength=2.0)  # spaced by 2.4e-7
    torch.testing.assert_close(large, small, rtol=1e-3, atol=0.0)


def test_a_group_of_equal_rewards_has_a_deviation_by_hand():
    rewards = torch.tensor([[1.0, 1.0], [0.0, 1.0]])
    # one other reward of 1, and one pseudo-completion that is 0 or 1: mean 3/4, second moment 3/4
    deviation = leave_one_out_deviation(rewards, prior_strength=0.5)
    assert deviation[0].tolist() == pytest.approx([math.sqrt(3 / 16)] * 2)
    # other reward 1 or 0 and one pseudo-completion of 1
    assert deviation[1].tolist() == pytest.approx([0.0, 0.5])


def test_one_completion_per_prompt_and_an_infinite_prior_give_the_deviation_of_the_other_prompts():
    rewards = torch.tensor([[1.0], [0.0], [4.0], [NAN]])
    # of 0 and 4, of 1 and 4, of 1 and 0
    expected = [2.0, 1.5, 0.5]
    for prior_strength in (0.0, 3.0, math.inf):
        deviation = leave_one_out_deviation(rewards, prior_strength=prior_strength)
        assert deviation[:3, 0].tolist() == pytest.approx(expected)
    groups = torch.tensor([[1.0, 7.0], [0.0, 4.0]])
    assert leave_one_out_deviation(groups, prior_strength=math.inf)[0].tolist() == pytest.approx([2.0, 2.0])


def test_where_no_other_prompt_was_scored_the_deviation_is_trls():
    rewards = torch.tensor([[1.0, NAN, 0.5, 3.0], [NAN] * 4])
    for prior_strength in (0.0, 4.0, math.inf):
        deviation = leave_one_out_deviation(rewards, prior_strength=prior_strength)
        torch.testing.assert_close(deviation[0], nanstd(rewards[:1], dim=1).expand(4))


def test_the_first_right_answer_of_a_batch_is_bounded():
    rewards = torch.zeros(8, 2)
    rewards[3, 1] = 1.0
    baselines = gradient_weighted_baseline(rewards, torch.ones_like(rewards), prior_strength=4.0)
    advantages = scaled_advantages(rewards, baselines, prior_strength=4.0)
    assert advantages[3, 1] == 4.0  # the square root of 16 completions; (1 - 0) / 1e-4 otherwise
    advantages[3, 1] = 0.0
    assert -1 < advantages.min() < advantages.max() == 0


def test_all_equal_rewards_have_no_advantage():
    rewards = torch.full((4, 3), 0.7)
    baselines = gradient_weighted_baseline(rewards, torch.rand(4, 3), prior_strength=4.0)
    assert scaled_advantages(rewards, baselines, prior_strength=4.0).abs().max() < 2e-3  # rounding, over 1e-4


def test_unscorable_completions_have_no_advantage():
    rewards = torch.tensor([[1.0, NAN], [0.0, 1.0]])
    advantages = scaled_advantages(rewards, leave_one_out_baseline(rewards), prior_strength=1.0)
    assert advantages.isnan().tolist() == [[True, True], [False, False]]


def test_training_scales_by_the_group_with_the_prior_in_use(tmp_path):
    trainer = train(Recording, OBLRPOConfig, tmp_path, score_method="exact", scale_rewards="group")
    strengths = logged(trainer, "baseline/prior_strength")
    for batch, strength in zip(trainer.batches, strengths, strict=True):
        rewards, weights = batch["rewards"], oracle_scores(batch).square().sum(dim=2)
        advantages = rewards - gradient_weighted_baseline(rewards, weights, prior_strength=strength)
        expected = advantages / (slow_deviation(rewards.double(), strength) + 1e-4).float()
        torch.testing.assert_close(batch["advantages"].view_as(rewards), expected, rtol=1e-3, atol=1e-5)


def test_the_papers_baseline_is_scaled_by_trls_deviation(tmp_path):
    options = {"score_method": "exact", "scale_rewards": "group", "baseline_prior_strength": 0.0, "max_steps": 1}
    trainer = train(Recording, OBLRPOConfig, tmp_path, **options)
    (batch,) = trainer.batches
    rewards, weights = batch["rewards"], oracle_scores(batch).square().sum(dim=2)
    advantages = rewards - gradient_weighted_baseline(rewards, weights)
    expected = advantages / (rewards.std(dim=1, keepdim=True) + 1e-4)
    torch.testing.assert_close(batch["advantages"].view_as(rewards), expected, rtol=1e-3, atol=1e-5)
