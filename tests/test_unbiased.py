"""Monte Carlo: baselines that keep a completion out of its own baseline do not move the mean policy gradient."""

import itertools
import math

import pytest
import torch

from oblr_trl.baselines import (
    AutomaticPriorStrength,
    gradient_weighted_baseline,
    group_mean_baseline,
    leave_one_out_baseline,
    leave_one_out_deviation,
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
        b = automatic.baseline(r, w)
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


# Exactly: over all outcomes of a small batch.


def expected_over_outcomes(quantity, num_prompts, num_generations):
    """Expectation of `quantity(rewards, weights, scores)` over all completions of the first prompts, by enumeration."""
    probs, rewards, _, scores, _ = softmax_policy()
    total = 0.0
    for outcome in itertools.product(range(NUM_ACTIONS), repeat=num_prompts * num_generations):
        actions = torch.tensor(outcome).view(num_prompts, num_generations)
        s = scores[:num_prompts].gather(1, actions.unsqueeze(-1).expand(-1, -1, NUM_ACTIONS))
        probability = probs[:num_prompts].gather(1, actions).prod()
        total += probability * quantity(rewards[:num_prompts].gather(1, actions), s.square().sum(dim=-1), s)
    return total


def gradient(advantages, scores):
    return torch.einsum("ng,ngk->nk", advantages, scores) / advantages.size(1)


MEMORY = torch.tensor([[3.0, 2.0], [0.4, 0.5], [0.0, 0.0]], dtype=torch.float64)


@pytest.mark.parametrize(("num_prompts", "num_generations"), [(3, 1), (2, 2)])
@pytest.mark.parametrize("prior_strength", [0.0, 2.0, math.inf])
@pytest.mark.parametrize("memory_strength", [0.0, 1.0, 4.0])
def test_the_expected_gradient_is_the_true_one_with_memory(
    num_prompts, num_generations, prior_strength, memory_strength
):
    if num_generations == 1 and prior_strength == 0:
        return  # a prompt without memory has no baseline
    options = {"prior_strength": prior_strength, "memory": MEMORY[:num_prompts], "memory_strength": memory_strength}

    def estimate(r, w, s):
        return gradient(r - gradient_weighted_baseline(r, w, **options), s)

    expected = expected_over_outcomes(estimate, num_prompts, num_generations)
    torch.testing.assert_close(expected, softmax_policy()[-1][:num_prompts], rtol=0, atol=1e-12)


@pytest.mark.parametrize(("num_prompts", "num_generations"), [(3, 1), (2, 2)])
@pytest.mark.parametrize("prior_strength", [0.0, 2.0, math.inf])
def test_reward_scaling_by_the_other_completions_weights_prompts_and_nothing_else(
    num_prompts, num_generations, prior_strength
):
    """E[(r - b) s / sigma] = E[1 / sigma] grad J of each prompt."""

    def inverse_deviation(r):
        return 1 / (leave_one_out_deviation(r, prior_strength=prior_strength) + 0.01)

    def estimate(r, w, s):
        b = gradient_weighted_baseline(r, w, prior_strength=max(prior_strength, 1.0), memory=MEMORY[:num_prompts])
        return gradient((r - b) * inverse_deviation(r), s)

    expected = expected_over_outcomes(estimate, num_prompts, num_generations)
    prompt_weights = expected_over_outcomes(
        lambda r, w, s: inverse_deviation(r).mean(dim=1), num_prompts, num_generations
    )
    true_gradient = softmax_policy()[-1][:num_prompts]
    torch.testing.assert_close(expected, prompt_weights.unsqueeze(1) * true_gradient, rtol=0, atol=1e-10)
    assert (prompt_weights[0] - prompt_weights[1]).abs() > 1e-3


def test_reward_scaling_by_a_deviation_that_sees_the_completion_turns_the_gradient():
    def estimate(r, w, s):
        return gradient((r - group_mean_baseline(r)) / (r.std(dim=1, keepdim=True) + 0.01), s)

    expected = expected_over_outcomes(estimate, 2, 2)
    cosine = torch.cosine_similarity(expected, softmax_policy()[-1][:2], dim=1)
    assert cosine.min() < 0.99
