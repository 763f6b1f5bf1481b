import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from oblr_trl.baselines import (
    MEMORY_STRENGTH_GRID,
    PRIOR_STRENGTH_GRID,
    AutomaticPriorStrength,
    gradient_variance,
    gradient_weighted_baseline,
    group_mean_baseline,
    leave_one_out_baseline,
    length_weighted_baseline,
)

NAN = math.nan


def slow_baseline(rewards, weights, leave_one_out, prior_strength, memory=None, memory_strength=0.0):
    """The formula of the docstring, one completion at a time, in Python floats. Remembered completions are further ones, in the unit of
    the other groups' mean."""
    num_groups, num_generations = rewards.shape
    out = torch.full_like(rewards, NAN)
    r, w = rewards.tolist(), weights.tolist()

    def scored(n):
        return [j for j in range(num_generations) if not math.isnan(r[n][j])]

    for n, (past_wr, past_w) in enumerate(memory or [(0.0, 0.0)] * num_groups):
        outside = [(m, j) for m in range(num_groups) if m != n for j in scored(m)]
        prior_wr = sum(w[m][j] * r[m][j] for m, j in outside) / max(len(outside), 1)
        prior_w = sum(w[m][j] for m, j in outside) / max(len(outside), 1)
        for i in range(num_generations):
            inside = [j for j in scored(n) if not (leave_one_out and j == i)]
            numerator = sum(w[n][j] * r[n][j] for j in inside)
            denominator = sum(w[n][j] for j in inside)
            if math.isinf(prior_strength):
                if prior_w > 0:
                    numerator, denominator = prior_wr, prior_w
            else:
                numerator += prior_strength * prior_wr + memory_strength * prior_w * past_wr
                denominator += prior_strength * prior_w + memory_strength * prior_w * past_w
            if denominator > 0:
                out[n, i] = numerator / denominator
            elif inside:
                out[n, i] = sum(r[n][j] for j in inside) / len(inside)
    return out


groups = st.tuples(st.integers(1, 4), st.integers(1, 5))


@st.composite
def batches(draw, with_nan=True):
    num_groups, num_generations = draw(groups)
    size = num_groups * num_generations
    reward = st.floats(-10, 10)
    if with_nan:
        reward = st.one_of(reward, st.just(NAN))
    rewards = draw(st.lists(reward, min_size=size, max_size=size))
    weight = st.one_of(st.just(0.0), st.floats(1e-3, 1e3))
    weights = draw(st.lists(weight, min_size=size, max_size=size))
    shape = (num_groups, num_generations)
    return (
        torch.tensor(rewards, dtype=torch.float64).view(shape),
        torch.tensor(weights, dtype=torch.float64).view(shape),
    )


@settings(max_examples=150, deadline=None)
@given(batches(), st.booleans(), st.sampled_from(PRIOR_STRENGTH_GRID))
def test_the_gradient_weighted_baseline_is_its_formula(batch, leave_one_out, prior_strength):
    rewards, weights = batch
    fast = gradient_weighted_baseline(rewards, weights, leave_one_out=leave_one_out, prior_strength=prior_strength)
    slow = slow_baseline(rewards, weights, leave_one_out, prior_strength)
    torch.testing.assert_close(fast, slow, rtol=1e-10, atol=1e-10, equal_nan=True)


@settings(max_examples=160, deadline=None)
@given(
    batches(with_nan=False),
    st.sampled_from(PRIOR_STRENGTH_GRID),
    st.sampled_from((None, *MEMORY_STRENGTH_GRID)),
    st.floats(-50, 50),
    st.floats(0, 1e6),
)
def test_no_completion_enters_its_own_baseline(batch, strength, memory_strength, other_reward, other_weight):
    """Bit for bit: the baseline of a completion stays when its own reward and weight change. Memory is of the past, and its unit is that of
    the other groups."""
    rewards, weights = batch
    options = {"prior_strength": strength}
    if memory_strength is not None:
        memory = torch.arange(2.0 * len(rewards), dtype=torch.float64).view(-1, 2) + 0.3
        options |= {"memory": memory, "memory_strength": memory_strength}
    before = gradient_weighted_baseline(rewards, weights, **options)[0, 0]
    rewards, weights = rewards.clone(), weights.clone()
    rewards[0, 0], weights[0, 0] = other_reward, other_weight
    after = gradient_weighted_baseline(rewards, weights, **options)[0, 0]
    assert torch.equal(before, after) or bool(before.isnan() & after.isnan())


@settings(max_examples=60, deadline=None)
@given(batches(), st.floats(-5, 5), st.floats(0.1, 10), st.sampled_from(PRIOR_STRENGTH_GRID))
def test_baselines_move_with_the_rewards_and_ignore_the_unit_of_the_weights(batch, shift, unit, prior_strength):
    rewards, weights = batch
    baselines = gradient_weighted_baseline(rewards, weights, prior_strength=prior_strength)
    moved = gradient_weighted_baseline(rewards + shift, unit * weights, prior_strength=prior_strength)
    torch.testing.assert_close(moved, baselines + shift, rtol=1e-9, atol=1e-9, equal_nan=True)


@settings(max_examples=60, deadline=None)
@given(batches(), st.sampled_from(PRIOR_STRENGTH_GRID[1:]))
def test_one_completion_per_prompt_has_the_mean_of_the_other_prompts_at_any_strength(batch, prior_strength):
    rewards, weights = (values[:, :1] for values in batch)
    baselines = gradient_weighted_baseline(rewards, weights, prior_strength=prior_strength)
    for n, value in enumerate(baselines.flatten().tolist()):
        others = [m for m in range(len(rewards)) if m != n and not math.isnan(rewards[m, 0])]
        weight = sum(weights[m, 0].item() for m in others)
        expected = sum(weights[m, 0].item() * rewards[m, 0].item() for m in others) / weight if weight else NAN
        assert value == pytest.approx(expected, rel=1e-9, abs=1e-9, nan_ok=True)
    assert gradient_weighted_baseline(rewards, weights).isnan().all()  # without prior there is none


def test_one_completion_per_prompt_tells_strengths_above_zero_not_apart_and_never_takes_zero():
    automatic = AutomaticPriorStrength()
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        rewards, weights = torch.rand(16, 1, generator=generator), torch.rand(16, 1, generator=generator)
        assert automatic.value > 0
        assert gradient_weighted_baseline(rewards, weights, prior_strength=automatic.value).isfinite().all()
        automatic.update(rewards, weights)
    assert automatic.value == AutomaticPriorStrength().value


def test_equal_weights_give_rloo_and_the_advantages_are_g_over_g_minus_1_times_those_of_grpo():
    rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0], [3.0, 1.0, 2.0, 6.0]])
    rloo = leave_one_out_baseline(rewards)
    # others of the first completion: (0 + 0 + 1) / 3 and (1 + 2 + 6) / 3
    assert rloo[:, 0].tolist() == pytest.approx([1 / 3, 3.0])
    torch.testing.assert_close(gradient_weighted_baseline(rewards, torch.full_like(rewards, 7.0)), rloo)
    torch.testing.assert_close(rewards - rloo, 4 / 3 * (rewards - group_mean_baseline(rewards)))


def test_unscorable_completions_leave_every_sum():
    rewards = torch.tensor([[1.0, NAN, 0.0, 4.0], [NAN, NAN, NAN, NAN]])
    # (1 + 0 + 4) / 3, and nothing in the second group
    means = group_mean_baseline(rewards)
    assert means[0].tolist() == pytest.approx([5 / 3] * 4)
    assert means[1].isnan().all()
    # others of the first: (0 + 4) / 2; of the unscorable one: all three
    assert leave_one_out_baseline(rewards)[0].tolist() == pytest.approx([2.0, 5 / 3, 2.5, 0.5])
    # the weight of an unscorable completion is never read, not even as nan
    weights = torch.tensor([[1.0, NAN, 1.0, 1.0], [NAN] * 4])
    weighted = gradient_weighted_baseline(rewards, weights, prior_strength=2.0)
    assert weighted[0].tolist() == pytest.approx([2.0, 5 / 3, 2.5, 0.5])
    # the dead group takes the prior: mean reward of the others
    assert weighted[1].tolist() == pytest.approx([5 / 3] * 4)


def test_length_weights_are_opo():
    rewards = torch.tensor([[1.0, 0.0, 1.0]])
    lengths = torch.tensor([[2, 6, 4]])
    # (2 + 0 + 4) / 12, and without the first (0 + 4) / 10
    assert length_weighted_baseline(rewards, lengths, leave_one_out=False).tolist()[0] == pytest.approx([0.5] * 3)
    assert length_weighted_baseline(rewards, lengths)[0, 0].item() == pytest.approx(0.4)


def test_an_infinite_prior_is_one_baseline_from_the_other_groups():
    rewards = torch.tensor([[1.0, 0.0], [2.0, 4.0], [0.0, 8.0]])
    weights = torch.tensor([[1.0, 1.0], [1.0, 3.0], [2.0, 1.0]])
    # for group 0: (1*2 + 3*4 + 2*0 + 1*8) / (1 + 3 + 2 + 1) = 22 / 7
    baselines = gradient_weighted_baseline(rewards, weights, prior_strength=math.inf)
    assert baselines[0].tolist() == pytest.approx([22 / 7] * 2)
    # one group alone has no prior: leave-one-out within it
    alone = gradient_weighted_baseline(rewards[:1], weights[:1], prior_strength=math.inf)
    assert alone[0].tolist() == pytest.approx([0.0, 1.0])


def test_a_lone_completion_without_prior_has_no_baseline():
    assert leave_one_out_baseline(torch.tensor([[1.0]])).isnan().all()


@pytest.mark.parametrize(
    ("rewards", "weights", "strength", "message"),
    [
        (torch.zeros(4), torch.zeros(4), 0.0, "must have shape"),
        (torch.zeros(2, 2), torch.zeros(2, 3), 0.0, "Expected the shape of `rewards`"),
        (torch.zeros(2, 2), torch.ones(2, 2), -1.0, "at least 0"),
        (torch.zeros(2, 2), torch.ones(2, 2), NAN, "at least 0"),
        (torch.zeros(2, 2), torch.tensor([[1.0, NAN], [1.0, 1.0]]), 0.0, "finite and non-negative"),
        (torch.zeros(2, 2), torch.tensor([[1.0, math.inf], [1.0, 1.0]]), 0.0, "finite and non-negative"),
        (torch.zeros(2, 2), torch.tensor([[1.0, -1.0], [1.0, 1.0]]), 0.0, "finite and non-negative"),
    ],
)
def test_bad_inputs_are_refused(rewards, weights, strength, message):
    with pytest.raises(ValueError, match=message):
        gradient_weighted_baseline(rewards, weights, prior_strength=strength)


def test_the_variance_objective_is_least_at_the_optimal_baseline():
    torch.manual_seed(0)
    rewards, weights = torch.rand(1, 1000), torch.rand(1, 1000) ** 4
    optimal = (weights * rewards).sum() / weights.sum()
    minimum = gradient_variance(rewards, weights, optimal.expand_as(rewards))
    for shift in (-0.1, -0.01, 0.01, 0.1):
        assert gradient_variance(rewards, weights, (optimal + shift).expand_as(rewards)) > minimum


def heavy_tailed_batch(generator, num_groups=24, num_generations=4):
    weights = torch.exp(2 * torch.randn(num_groups, num_generations, generator=generator))
    rewards = (torch.rand(num_groups, num_generations, generator=generator) < 0.5).float() + 0.1 * weights.sqrt()
    return rewards, weights


def test_the_automatic_strength_finds_the_best_grid_point_from_earlier_batches_only():
    generator = torch.Generator().manual_seed(0)
    automatic = AutomaticPriorStrength()
    assert automatic.value == 16.0
    totals = dict.fromkeys(PRIOR_STRENGTH_GRID, 0.0)
    for _ in range(40):
        rewards, weights = heavy_tailed_batch(generator)
        automatic.update(rewards, weights)
        for strength in PRIOR_STRENGTH_GRID:
            baselines = gradient_weighted_baseline(rewards, weights, prior_strength=strength)
            totals[strength] += gradient_variance(rewards, weights, baselines) / weights.mean().item()
    # prompts are alike here, so a strong prior must win, and what was chosen must be nearly as good as the best
    assert automatic.value >= 8
    assert totals[automatic.value] <= 1.02 * min(totals.values())
    assert totals[automatic.value] < 0.9 * totals[0.0]


def test_the_automatic_strength_resumes_from_plain_numbers():
    generator = torch.Generator().manual_seed(1)
    first = AutomaticPriorStrength()
    for _ in range(3):
        first.update(*heavy_tailed_batch(generator))
    second = AutomaticPriorStrength()
    second.load_state_dict(first.state_dict())
    batch = heavy_tailed_batch(generator)
    first.update(*batch)
    second.update(*batch)
    assert first.state_dict() == second.state_dict()
    assert first.value == second.value
    with pytest.raises(ValueError, match="grid points"):
        AutomaticPriorStrength(grid=(0.0, 1.0)).load_state_dict(first.state_dict())


@pytest.mark.parametrize(
    ("rewards", "weights"),
    [
        (torch.full((2, 2), NAN), torch.ones(2, 2)),
        (torch.ones(2, 2), torch.zeros(2, 2)),
        # Of equal rewards every strength has the variance 0, and without prior, in one group, all have the same: ties, which would go to the
        # first of the grid.
        (torch.tensor([[1.0, 1.0], [1.0, NAN]]), torch.tensor([[0.3, 2.0], [5.0, 1.0]])),
        (torch.cat([torch.arange(8.0).view(1, 8), torch.full((3, 8), NAN)]), torch.ones(4, 8)),
        (torch.arange(8.0).view(1, 8), torch.ones(1, 8)),
    ],
    ids=["unscored", "no weight", "equal rewards", "one scored group", "one group"],
)
def test_batches_without_information_leave_the_automatic_strength_alone(rewards, weights):
    automatic = AutomaticPriorStrength()
    automatic.update(rewards, weights)
    assert automatic.value == 16.0
    assert automatic.state_dict() == AutomaticPriorStrength().state_dict()


def test_the_automatic_strength_does_not_depend_on_the_unit_of_a_batchs_weights():
    """Score norms drift by orders of magnitude; each batch counts alike."""
    generator = torch.Generator().manual_seed(2)
    plain, scaled = AutomaticPriorStrength(), AutomaticPriorStrength()
    for unit in (1.0, 1e4, 1e-3):
        rewards, weights = heavy_tailed_batch(generator)
        plain.update(rewards, weights)
        scaled.update(rewards, unit * weights)
    assert scaled.state_dict()["variances"] == pytest.approx(plain.state_dict()["variances"], rel=1e-5)
