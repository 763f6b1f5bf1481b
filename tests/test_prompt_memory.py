"""The memory of prompts: its sums against a slow loop, its limits, and the strengths that are chosen with it."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from oblr_trl.baselines import (
    MEMORY_STRENGTH_GRID,
    PRIOR_STRENGTH_GRID,
    AutomaticPriorStrength,
    BaselineEstimator,
    GroupedBatch,
    PromptMemory,
    gradient_variance,
    gradient_weighted_baseline,
    prompt_key,
)
from tests.test_baselines import batches, slow_baseline

NAN = math.nan


def visited(memory, *visits):
    """`memory` after batches of `(keys, rewards, weights)`."""
    for keys, rewards, weights in visits:
        memory.update(torch.tensor(keys), torch.tensor(rewards, dtype=torch.float64), torch.tensor(weights))
    return memory


def sums_of(memory, *keys):
    return memory.recall(torch.tensor(keys)).tolist()


def random_batch(generator, num_prompts=5, num_groups=4, num_generations=3):
    keys = torch.randint(0, num_prompts, (num_groups,), generator=generator)
    rewards = torch.randn(num_groups, num_generations, generator=generator, dtype=torch.float64)
    rewards[torch.rand(rewards.shape, generator=generator) < 0.3] = NAN
    weights = torch.exp(2 * torch.randn(rewards.shape, generator=generator, dtype=torch.float64))
    return keys, rewards, weights


def slow_sums(past, key):
    """The formula of the docstring, from all batches of the past, one completion at a time."""
    weighted_reward = weight = 0.0
    age = 0
    for keys, rewards, weights in reversed(past):
        scored = [
            (k, r, w)
            for k, row_r, row_w in zip(keys.tolist(), rewards.tolist(), weights.tolist(), strict=True)
            for r, w in zip(row_r, row_w, strict=True)
            if not math.isnan(r)
        ]
        mean_weight = sum(w for _, _, w in scored) / max(len(scored), 1)
        visit = [(r, w / mean_weight) for k, r, w in scored if k == key]
        if visit:
            weighted_reward += 0.5**age * sum(w * r for r, w in visit)
            weight += 0.5**age * sum(w for _, w in visit)
            age += 1
    return weighted_reward, weight


@pytest.mark.parametrize("prior_strength", [0.0, 2.0])
@pytest.mark.parametrize("memory_strength", [0.0, 0.5, 4.0])
def test_sums_and_baselines_are_those_of_the_slow_loop(prior_strength, memory_strength):
    generator = torch.Generator().manual_seed(0)
    memory, past = PromptMemory(100), []
    for _ in range(12):
        keys, rewards, weights = random_batch(generator)
        recalled = memory.recall(keys)
        expected = [slow_sums(past, key) for key in keys.tolist()]
        torch.testing.assert_close(recalled, torch.tensor(expected, dtype=torch.float64))
        fast = gradient_weighted_baseline(
            rewards, weights, prior_strength=prior_strength, memory=recalled, memory_strength=memory_strength
        )
        slow = slow_baseline(rewards, weights, True, prior_strength, expected, memory_strength)
        torch.testing.assert_close(fast, slow, equal_nan=True)
        memory.update(keys, rewards, weights)
        past.append((keys, rewards, weights))
    assert recalled[:, 1].min() > 0  # it ends with prompts that it knows


def test_one_visit_counts_as_completions_of_the_batch():
    # mean weight (1 + 3 + 2 + 2) / 4 = 2: prompt 7 has w / 2 = 0.5, 1.5 and w r = 0.5 * 1 + 1.5 * 3 = 5
    memory = visited(PromptMemory(10), ([7, 8], [[1.0, 3.0], [0.0, 1.0]], [[1.0, 3.0], [2.0, 2.0]]))
    assert sums_of(memory, 7, 9) == [[5.0, 2.0], [0.0, 0.0]]
    # Next time the others' mean weight is 10. b of the first: (4 * 2 + 10 * 5) / (4 + 10 * 2) with its neighbour's w = 4, r = 2.
    rewards, weights = torch.tensor([[9.0, 2.0], [0.0, 0.0]]), torch.tensor([[1.0, 4.0], [10.0, 10.0]])
    baselines = gradient_weighted_baseline(rewards, weights, memory=memory.recall(torch.tensor([7, 9])))
    assert baselines[0, 0].item() == pytest.approx(58 / 24)
    # A prompt that was never seen has its group alone.
    assert baselines[1].tolist() == [0.0, 0.0]


def test_a_prompt_that_became_easy_is_followed():
    memory = visited(PromptMemory(10), *[([1, 2], [[0.0], [0.0]], [[1.0], [1.0]])] * 8)
    means = []
    for _ in range(3):
        visited(memory, ([1, 2], [[1.0], [0.0]], [[1.0], [1.0]]))
        ((weighted_reward, weight),) = sums_of(memory, 1)
        means.append(weighted_reward / weight)
    # The sums of weights are about 2, and the visits at which it was hard count 1, 1/2, 1/4 of it.
    assert means == pytest.approx([1 / 2, 3 / 4, 7 / 8], abs=0.005)


def test_groups_of_the_same_prompt_are_one_visit_in_any_order():
    twice = ([5, 5], [[1.0, 0.0], [4.0, 0.0]], [[1.0, 3.0], [2.0, 2.0]])
    memory = visited(PromptMemory(10), ([5], [[8.0, 0.0]], [[1.0, 1.0]]), twice)
    # first visit (8, 2), halved; then w / 2: 0.5 * 1 + 1 * 4, and 0.5 + 1.5 + 1 + 1
    assert sums_of(memory, 5) == [[4 + 4.5, 1 + 4.0]]
    swapped = visited(PromptMemory(10), ([5], [[8.0, 0.0]], [[1.0, 1.0]]), [part[::-1] for part in twice])
    assert sums_of(swapped, 5) == sums_of(memory, 5)


def test_what_could_not_be_scored_is_no_visit():
    memory = visited(PromptMemory(10), ([1, 2], [[1.0, 0.0], [0.0, 1.0]], [[1.0, 1.0], [1.0, 1.0]]))
    before = memory.state_dict()
    visited(
        memory,
        ([1, 2], [[NAN, NAN], [NAN, NAN]], [[NAN, 1.0], [1.0, 1.0]]),
        ([1, 2], [[1.0, 1.0], [1.0, 1.0]], [[0.0, 0.0], [0.0, 0.0]]),
    )
    assert all(torch.equal(tensor, before[name]) for name, tensor in memory.state_dict().items())
    visited(memory, ([1, 2], [[NAN, NAN], [2.0, NAN]], [[NAN, 1.0], [5.0, NAN]]))
    # the weight of the only scored completion is the mean: 1, after the halved sums of the first visit
    assert sums_of(memory, 1, 2) == [[1.0, 2.0], [0.5 + 2.0, 1.0 + 1.0]]


def test_the_least_recently_visited_prompt_leaves_first():
    def batch(*keys):
        return list(keys), [[1.0]] * len(keys), [[1.0]] * len(keys)

    memory = visited(PromptMemory(3), batch(1, 2, 3), batch(1), batch(4))
    assert memory.state_dict()["keys"].tolist() == [3, 1, 4]  # 2 is gone: 1 came back
    visited(memory, batch(5, 6, 7, 8))
    assert memory.state_dict()["keys"].tolist() == [6, 7, 8]
    assert len(memory) == 3


def test_a_memory_resumes_exactly_and_a_smaller_one_keeps_the_last_prompts():
    generator = torch.Generator().manual_seed(1)
    memory = visited(PromptMemory(50))
    for _ in range(5):
        memory.update(*random_batch(generator, num_prompts=20))
    resumed, smaller = PromptMemory(50), PromptMemory(2)
    resumed.load_state_dict(memory.state_dict())
    smaller.load_state_dict(memory.state_dict())
    keys = memory.state_dict()["keys"]
    assert torch.equal(resumed.recall(keys), memory.recall(keys))
    assert torch.equal(smaller.recall(keys[-2:]), memory.recall(keys[-2:]))
    assert smaller.recall(keys[:-2]).eq(0).all()
    batch = random_batch(generator, num_prompts=20)
    memory.update(*batch)
    resumed.update(*batch)
    assert all(torch.equal(resumed.state_dict()[name], tensor) for name, tensor in memory.state_dict().items())


@settings(max_examples=60, deadline=None)
@given(batches(), st.sampled_from(PRIOR_STRENGTH_GRID), st.sampled_from(MEMORY_STRENGTH_GRID))
def test_an_empty_memory_changes_nothing_bit_for_bit(batch, strength, memory_strength):
    rewards, weights = batch
    empty = PromptMemory(10).recall(torch.arange(len(rewards)))
    plain = gradient_weighted_baseline(rewards, weights, prior_strength=strength)
    with_memory = gradient_weighted_baseline(
        rewards, weights, prior_strength=strength, memory=empty, memory_strength=memory_strength
    )
    assert torch.equal(plain.nan_to_num(nan=99.0), with_memory.nan_to_num(nan=99.0))


def test_with_an_infinite_prior_memory_has_no_say_and_with_a_large_one_little():
    generator = torch.Generator().manual_seed(2)
    _, rewards, weights = random_batch(generator)
    memory = torch.tensor([[30.0, 3.0]] * 4, dtype=torch.float64)
    without = gradient_weighted_baseline(rewards, weights, prior_strength=math.inf)
    infinite = gradient_weighted_baseline(rewards, weights, prior_strength=math.inf, memory=memory)
    assert torch.equal(infinite, without)
    large = gradient_weighted_baseline(rewards, weights, prior_strength=1e9, memory=memory)
    torch.testing.assert_close(large, without, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"memory_strength": -1.0}, "`memory_strength` must be at least 0"),
        ({"memory_strength": math.inf}, "`memory_strength` must be at least 0"),
        ({"memory": torch.zeros(2)}, "`memory` must have two sums per group"),
        ({"memory": torch.zeros(3, 2)}, "`memory` must have two sums per group"),
    ],
)
def test_bad_memories_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        gradient_weighted_baseline(torch.zeros(2, 2), torch.ones(2, 2), **options)


# Choice of the strengths.


class Prompts:
    """Prompts with a success rate each, visited in turn; the weights are heavy-tailed and drift."""

    def __init__(self, rates, num_groups, num_generations):
        self.rates, self.shape = torch.tensor(rates), (num_groups, num_generations)
        self.generator = torch.Generator().manual_seed(0)

    def epoch(self, unit=1.0):
        for keys in torch.randperm(len(self.rates), generator=self.generator).split(self.shape[0]):
            noise = torch.rand(self.shape, generator=self.generator)
            rewards = (noise < self.rates[keys].unsqueeze(1)).float()
            weights = unit * torch.exp(torch.randn(self.shape, generator=self.generator))
            yield GroupedBatch(rewards, torch.ones(self.shape), weights, prompt_keys=keys)


def estimators(size=100, **options):
    options = {"leave_one_out": True, "prior_strength": None} | options
    return (BaselineEstimator("gradient_weighted", memory_size=size, **options) for size in (size, 0))


@pytest.mark.parametrize("num_generations", [1, 2, 4])
def test_the_first_epoch_is_that_without_memory_and_the_second_uses_it(num_generations):
    prompts = Prompts([0.3, 0.7] * 16, 8, num_generations)
    remembering, plain = estimators()
    for batch in prompts.epoch():
        assert torch.equal(remembering(batch), plain(batch))
        assert remembering.remembered_fraction(batch) == 0
        remembering.update(batch)
        plain.update(batch)
        assert remembering.prior_strength == plain.prior_strength
        assert remembering.memory_strength == 1.0
    batch = next(prompts.epoch())
    assert remembering.remembered_fraction(batch) == 1
    assert not torch.equal(remembering(batch), plain(batch))


def test_memory_lowers_the_variance_where_difficulty_varies():
    prompts = Prompts([0.05, 0.95] * 32, 16, 1)
    remembering, plain = estimators()
    variances = {remembering: 0.0, plain: 0.0}
    for epoch in range(6):
        for batch in prompts.epoch(unit=10.0**epoch):
            for estimator in variances:
                if epoch > 1:
                    variances[estimator] += (
                        gradient_variance(batch.rewards, batch.weights, estimator(batch)) / 10**epoch
                    )
                estimator.update(batch)
    assert remembering.memory_strength > 0
    # Without memory b is 1/2 and leaves 1/4; the prompt's own b leaves p (1 - p), a fifth of it, and the error of its estimate.
    assert variances[remembering] < 0.45 * variances[plain]


def test_memory_is_not_used_where_it_misleads():
    """Prompts whose success changes sides at every visit: what is remembered is wrong each time."""
    remembering, _ = estimators()
    for epoch in range(8):
        for batch in Prompts([0.05, 0.95] * 16 if epoch % 2 else [0.95, 0.05] * 16, 8, 2).epoch():
            remembering.update(batch)
    assert remembering.memory_strength == 0 or remembering.prior_strength == math.inf


def test_a_fixed_prior_strength_stays_and_that_of_the_memory_is_chosen():
    prompts = Prompts([0.02, 0.98] * 32, 16, 1)
    for fixed in (4.0, math.inf):
        remembering, plain = estimators(prior_strength=fixed)
        for _ in range(6):
            for batch in prompts.epoch():
                remembering.update(batch)
                assert remembering.prior_strength == fixed
        # The prior of 4 completions would hide the few that are remembered: each counts as much as the grid allows.
        assert remembering.memory_strength == (4.0 if fixed == 4.0 else 1.0)
        assert torch.equal(remembering(batch), plain(batch)) == math.isinf(fixed)


def test_a_chosen_strength_of_zero_leaves_no_lone_completion_without_baseline():
    """Of a group of one only priors tell: they count one completion there, and every strength can be compared."""
    rewards, weights = torch.tensor([[1.0], [0.0], [4.0]]), torch.tensor([[1.0], [1.0], [2.0]])
    automatic = AutomaticPriorStrength(grid=(0.0, 4.0), initial=0.0)
    # the others' sums of w r over those of w: (0 + 8) / 3, (1 + 8) / 3, (1 + 0) / 2
    assert automatic.baseline(rewards, weights).flatten().tolist() == pytest.approx([8 / 3, 3.0, 0.5])
    automatic.update(rewards, weights)
    assert automatic.state_dict()["seen"]
    assert all(math.isfinite(variance) for variance in automatic.state_dict()["variances"])
    # with memory: the first has (others' mean of w r: 4, of w: 1.5) one prior completion and its past, in the unit of 1.5
    memory = torch.tensor([[0.0, 2.0], [0.0, 0.0], [0.0, 0.0]], dtype=torch.float64)
    assert automatic.baseline(rewards, weights, memory)[0].item() == pytest.approx(0.0)  # at m = 1 it knows its past
    assert automatic.baseline(rewards, weights, memory)[1].item() == pytest.approx(3.0)
    # A prior that was switched off stays out.
    off = AutomaticPriorStrength(grid=(0.0,), initial=0.0)
    assert off.baseline(rewards, weights, memory).isnan().flatten().tolist() == [False, True, True]
    off.update(rewards[:, :1], weights)
    assert not off.state_dict()["seen"]  # no completion has a baseline, so that there is nothing to compare


def test_groups_of_one_teach_every_pair_of_strengths():
    prompts = Prompts([0.1, 0.9] * 16, 8, 1)
    remembering, _ = estimators()
    for _ in range(3):
        for batch in prompts.epoch():
            assert remembering(batch).isfinite().all()
            remembering.update(batch)
    variances = remembering.automatic.state_dict()["variances"]
    assert len(variances) == 8 * 5 + 1
    assert all(0 < variance < 1 for variance in variances)


def test_the_state_of_another_fixed_strength_is_left_alone():
    fixed, _ = estimators(prior_strength=2.0)
    for _ in range(2):
        for batch in Prompts([0.1, 0.9] * 16, 8, 2).epoch():
            fixed.update(batch)
    assert fixed.state_dict()["seen"]
    for other in (None, 3.0):
        changed, _ = estimators(prior_strength=other)
        before = changed.state_dict()
        changed.load_state_dict(fixed.state_dict())
        assert changed.state_dict() == before
    same, without_memory = estimators(prior_strength=2.0)
    same.load_state_dict(fixed.state_dict())
    assert same.state_dict() == fixed.state_dict()
    without_memory.load_state_dict(fixed.state_dict())
    assert without_memory.state_dict() is None


# Keys.


def test_a_key_is_that_of_the_content():
    chat = [{"role": "system", "content": "Add."}, {"role": "user", "content": "1 + 2"}]
    reordered = [{"content": message["content"], "role": message["role"]} for message in chat]
    assert prompt_key(chat) == prompt_key(reordered)
    keys = [prompt_key(prompt) for prompt in ("1 + 2", "1 + 3", "1  + 2", "", None, chat, chat[1:], "\ud800")]
    assert len(set(keys)) == len(keys)
    assert all(0 <= key < 2**63 for key in keys)
    # the same in every process, whatever its hash seed
    assert prompt_key("1 + 2") == 2628032007608406162


def test_images_are_left_out_of_a_key():
    def chat(image):
        return [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "Count."}]}]

    assert prompt_key(chat(object())) == prompt_key(chat(None))
