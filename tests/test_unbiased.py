"""Monte Carlo: baselines that keep a completion out of its own baseline do not move the mean policy gradient."""

import math

import pytest
import torch

from oblr_trl.baselines import (
    AutomaticPriorStrength,
    gradient_weighted_baseline,
    group_mean_baseline,
    leave_one_out_baseline,
    length_weighted_baseline,
)

NUM_PROMPTS, NUM_GENERATIONS, NUM_ACTIONS, NUM_BATCHES = 3, 3, 4, 3000


def softmax_policy():
    """A categorical policy per prompt, with rewards and lengths by action; scores are e_a - p, by hand."""
    generator = torch.Generator().manual_seed(0)
    probs = torch.randn(NUM_PROMPTS, NUM_ACTIONS, generator=generator, dtype=torch.float64).mul(1.5).softmax(-1)
    rewards = torch.rand(NUM_PROMPTS, NUM_ACTIONS, generator=generator, dtype=torch.float64) * 3
    lengths = torch.randint(1, 9, (NUM_PROMPTS, NUM_ACTIONS), generator=generator).double()
    scores = torch.eye(NUM_ACTIONS, dtype=torch.float64) - probs.unsqueeze(1)  # (N, action, k)
    true_gradient = torch.einsum("na,na,nak->nk", probs, rewards, scores)
    return probs, rewards, lengths, scores, true_gradient


def worst_z_score(baseline, num_generations=NUM_GENERATIONS):
    """Largest deviation of the mean gradient from the true one, in standard errors, over all coordinates."""
    probs, rewards, lengths, scores, true_gradient = softmax_policy()
    generator = torch.Generator().manual_seed(1)
    estimates = []
    for _ in range(NUM_BATCHES):
        actions = torch.multinomial(probs, num_generations, replacement=True, generator=generator)
        r, length = rewards.gather(1, actions), lengths.gather(1, actions)
        s = scores.gather(1, actions.unsqueeze(-1).expand(-1, -1, NUM_ACTIONS))  # (N, G, k)
        b = baseline(r, s.square().sum(-1), length)
        estimates.append(torch.einsum("ng,ngk->nk", r - b, s) / num_generations)
    stacked = torch.stack(estimates)
    standard_error = stacked.std(dim=0) / math.sqrt(NUM_BATCHES)
    return ((stacked.mean(dim=0) - true_gradient).abs() / standard_error).max().item()


@pytest.mark.parametrize("prior_strength", [0.0, 1.0, 16.0, math.inf])
def test_the_gradient_weighted_baseline_is_unbiased_at_any_prior_strength(prior_strength):
    z = worst_z_score(lambda r, w, length: gradient_weighted_baseline(r, w, prior_strength=prior_strength))
    assert z < 4.0


@pytest.mark.parametrize("num_generations", [1, NUM_GENERATIONS])
def test_the_automatic_prior_strength_is_unbiased(num_generations):
    automatic = AutomaticPriorStrength(grid=(0.0, 4.0, math.inf))

    def baseline(r, w, length):
        b = gradient_weighted_baseline(r, w, prior_strength=automatic.value)
        automatic.update(r, w)
        return b

    assert worst_z_score(baseline, num_generations) < 4.0


@pytest.mark.parametrize("prior_strength", [1.0, math.inf])
def test_the_prior_alone_is_unbiased_with_one_completion_per_prompt(prior_strength):
    def baseline(r, w, length, *, leave_one_out=True):
        return gradient_weighted_baseline(r, w, leave_one_out=leave_one_out, prior_strength=prior_strength)

    assert worst_z_score(baseline, num_generations=1) < 4.0
    if prior_strength == 1.0:  # an infinite one drowns the completion itself
        assert worst_z_score(lambda r, w, length: baseline(r, w, length, leave_one_out=False), num_generations=1) > 8.0


def test_leave_one_out_and_length_weights_are_unbiased():
    assert worst_z_score(lambda r, w, length: leave_one_out_baseline(r)) < 4.0
    assert worst_z_score(lambda r, w, length: length_weighted_baseline(r, length)) < 4.0


@pytest.mark.parametrize(
    "baseline",
    [
        lambda r, w, length: gradient_weighted_baseline(r, w, leave_one_out=False),
        lambda r, w, length: gradient_weighted_baseline(r, w, leave_one_out=False, prior_strength=1.0),
        lambda r, w, length: length_weighted_baseline(r, length, leave_one_out=False),
        lambda r, w, length: group_mean_baseline(r),
    ],
    ids=["gradient_weighted", "gradient_weighted_with_prior", "length_weighted", "group_mean"],
)
def test_a_baseline_that_sees_its_own_completion_is_measurably_biased(baseline):
    assert worst_z_score(baseline) > 8.0
