import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from oblr_trl.gradient_snr import (
    GradientMoments,
    GradientSNR,
    StepGradientSNR,
    gradient_moments,
    per_prompt_gradients,
    rho,
    sampling_variance,
)


def test_moments_by_hand():
    # mean (2, 1); deviations (-1, -1) and (1, 1): noise = 4 / (2 - 1); signal = 5 - 4 / 2
    moments = gradient_moments(torch.tensor([[1.0, 0.0], [3.0, 2.0]]))
    assert moments.noise == pytest.approx(4.0)
    assert moments.signal == pytest.approx(3.0)
    # rho = N SNR / (1 + N SNR) with SNR = 3 / 4, N = 2
    assert rho(*moments, 2) == pytest.approx(1.5 / 2.5)


def test_signal_and_noise_are_unbiased():
    generator = torch.Generator().manual_seed(0)
    mean = torch.tensor([0.3, -0.2, 0.1], dtype=torch.float64)
    scale = torch.tensor([1.0, 0.5, 2.0], dtype=torch.float64)
    draws = [
        gradient_moments(mean + scale * torch.randn(4, 3, generator=generator, dtype=torch.float64))
        for _ in range(20_000)
    ]
    for values, expected in (([d.signal for d in draws], 0.14), ([d.noise for d in draws], 5.25)):
        sample = torch.tensor(values)
        assert abs(sample.mean().item() - expected) < 4 * sample.std().item() / math.sqrt(len(draws))


def test_limits_of_the_ratio():
    assert rho(2.0, 0.0, 8) == 1.0
    assert rho(-1.0, 1.0, 8) == 0.0
    assert math.isnan(rho(0.0, 0.0, 8))
    assert math.isnan(rho(math.nan, math.nan, 8))
    assert gradient_moments(torch.ones(5, 3)) == GradientMoments(3.0, 0.0)
    assert all(math.isnan(value) for value in gradient_moments(torch.ones(1, 3)))


# Zero or normal: divided or rescaled, the smallest numbers that a float can hold become zero.
NOISES = st.just(0.0) | st.floats(1e-100, 10)
SIGNALS = NOISES | st.floats(-10, -1e-100)


@settings(max_examples=100, deadline=None)
@given(SIGNALS, NOISES, st.integers(1, 100), st.floats(1e-3, 1e3))
def test_the_ratio_lies_in_the_unit_interval_and_has_no_unit(signal, noise, num_prompts, unit):
    ratio = rho(signal, noise, num_prompts)
    if math.isnan(ratio):
        assert noise == 0
        assert signal <= 0
        return
    assert 0 <= ratio <= 1
    assert rho(signal * unit, noise * unit, num_prompts) == pytest.approx(ratio, abs=1e-12)
    assert rho(signal, noise, num_prompts + 1) >= ratio


def test_without_decay_only_the_current_batch_counts():
    snr = GradientSNR(decay=0.0)
    snr.update(GradientMoments(5.0, 1.0))
    snr.update(GradientMoments(-2.0, 3.0))
    assert (snr.signal, snr.noise) == (-2.0, 3.0)


def test_the_average_is_bias_corrected_and_clamps_only_at_the_end():
    snr = GradientSNR(decay=0.5)
    snr.update(GradientMoments(4.0, 1.0))
    assert (snr.signal, snr.noise) == pytest.approx((4.0, 1.0))
    snr.update(GradientMoments(-1.0, 4.0))
    # weights 1/3 and 2/3: signal (4 - 2) / 3, noise (1 + 8) / 3
    assert (snr.signal, snr.noise) == pytest.approx((2 / 3, 3.0))
    # of which 1 - 0.5^2 has been seen: signal 0.75 x 2/3
    assert snr.rho(2) == pytest.approx(0.5 / (0.5 + 1.5))


def test_rho_starts_low_and_forgets_its_start():
    snr = GradientSNR(decay=0.9)
    ratios = []
    for _ in range(400):
        snr.update(GradientMoments(3.0, 8.0))
        ratios.append(snr.rho(8))
    assert ratios[0] == pytest.approx(0.3 / (0.3 + 1))
    assert ratios == sorted(ratios)
    assert ratios[-1] == pytest.approx(3 / (3 + 1))


def test_without_decay_the_start_is_not_held_back():
    snr = GradientSNR(decay=0.0)
    snr.update(GradientMoments(3.0, 8.0))
    assert snr.rho(8) == pytest.approx(3 / (3 + 1))


def test_a_batch_without_estimate_changes_nothing_and_the_state_is_plain():
    snr = GradientSNR(decay=0.9)
    assert math.isnan(snr.rho(4))
    snr.update(GradientMoments(1.0, 2.0))
    state = snr.state_dict()
    snr.update(GradientMoments(math.nan, math.nan))
    assert snr.state_dict() == state
    other = GradientSNR(decay=0.9)
    other.load_state_dict(state)
    assert other.rho(4) == snr.rho(4)
    with pytest.raises(ValueError, match=r"\[0, 1\)"):
        GradientSNR(decay=1.0)


def test_per_prompt_gradients_average_over_scored_completions_and_keep_dead_groups():
    sketches = torch.tensor([[[1.0, 0.0], [0.0, 2.0]], [[3.0, 1.0], [5.0, 5.0]], [[1.0, 1.0], [1.0, 1.0]]])
    nan = math.nan
    advantages = torch.tensor([[2.0, nan], [0.0, 0.0], [nan, nan]])
    # first prompt: only its first completion, 2 * (1, 0) / 1; second: a real zero; third: unscorable, dropped
    assert per_prompt_gradients(sketches, advantages).tolist() == [[2.0, 0.0], [0.0, 0.0]]


def test_batches_of_one_step_are_pooled_and_counted_once():
    gradients = torch.randn(12, 5, generator=torch.Generator().manual_seed(0))
    whole = StepGradientSNR(GradientSNR(decay=0.7))
    parts = StepGradientSNR(GradientSNR(decay=0.7))
    expected = [whole.add(gradients[:6], step=0), whole.add(gradients[6:], step=1)]
    pooled = []
    for step in range(2):
        for half in gradients[6 * step : 6 * step + 6].split(3):
            ratio = parts.add(half, step=step)
        pooled.append(ratio)
    assert pooled == pytest.approx(expected)
    assert parts.averages.state_dict() == pytest.approx(whole.averages.state_dict())


@pytest.mark.parametrize("num_steps", [2, 4])
def test_the_variance_of_a_step_that_draws_its_completions_from_the_batch(num_steps):
    """Against many batches, shuffled and cut as TRL does: the variance of the first step's gradient, and rho from it."""
    generator = torch.Generator().manual_seed(0)
    num_prompts, group_size, k = 4, 4, 3
    n = num_prompts * group_size
    mean = torch.tensor([0.4, -0.3, 0.2], dtype=torch.float64)

    def batch():
        prompts = 0.5 * torch.randn(num_prompts, 1, k, generator=generator, dtype=torch.float64)
        return mean + prompts + torch.randn(num_prompts, group_size, k, generator=generator, dtype=torch.float64)

    ones = torch.ones(num_prompts, group_size, dtype=torch.float64)
    steps, estimates, noises = [], [], []
    for _ in range(8000):
        sketches = batch()
        order = torch.randperm(n, generator=generator)[: n // num_steps]
        steps.append(sketches.flatten(0, 1)[order].mean(dim=0))
        added = sampling_variance(sketches, ones, num_steps)
        step = StepGradientSNR(GradientSNR())
        step.add(per_prompt_gradients(sketches, ones), step=0, sampling_variance=added)
        estimates.append(step.averages.noise / num_prompts)
        noises.append(gradient_moments(per_prompt_gradients(sketches, ones)).noise / num_prompts)
    true = torch.stack(steps).var(dim=0).sum().item()
    # By hand: 3 axes x (0.25 + 1 / 4) / 4 between batches, and (S - 1) / 16 x the variance of all completions, 3 x (1 + about 0.25 x 12/15)
    assert true == pytest.approx(0.375 + (num_steps - 1) / 16 * 3 * (1 + 0.25 * 12 / 15), rel=0.04)
    assert sum(estimates) / len(estimates) == pytest.approx(true, rel=0.04)
    assert sum(noises) / len(noises) == pytest.approx(0.375, rel=0.04)  # which alone would be too little
    expected = mean.square().sum().item()
    assert expected / (expected + sum(estimates) / len(estimates)) < expected / (expected + 0.375)


def test_one_step_per_batch_draws_nothing_and_unscored_completions_stay_out():
    sketches = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0))
    advantages = torch.randn(3, 4, generator=torch.Generator().manual_seed(1))
    assert sampling_variance(sketches, advantages, 1) == 0
    assert sampling_variance(sketches, advantages, 0.5) == 0
    advantages[0] = math.nan
    expected = sampling_variance(sketches[1:], advantages[1:], 2)
    assert sampling_variance(sketches, advantages, 2) == pytest.approx(expected)
    assert expected > 0
    assert sampling_variance(sketches, torch.full((3, 4), math.nan), 2) == 0


def test_equal_rewards_use_up_nothing_of_the_averages_start():
    """A batch of zero gradients says nothing; groups of zeros among others are real samples."""
    steps = StepGradientSNR(GradientSNR(decay=0.9))
    assert math.isnan(steps.add(torch.zeros(4, 3), step=0))
    assert steps.averages.state_dict() == GradientSNR(decay=0.9).state_dict()
    gradients = torch.ones(4, 3) + torch.eye(4, 3)
    gradients[3] = 0
    steps.add(gradients, step=1)
    before = steps.averages.state_dict()
    assert steps.averages.signal == pytest.approx(gradient_moments(gradients).signal)
    steps.add(torch.zeros(4, 3), step=2)
    assert steps.averages.state_dict() == before
    # Pooled with another batch of the same step they count: 8 prompts, 4 of them zero.
    steps.add(gradients, step=3)
    steps.add(torch.zeros(4, 3), step=3)
    pooled = torch.cat([gradients, torch.zeros(4, 3)])
    assert steps.averages.signal == pytest.approx(
        (0.9 * gradient_moments(gradients).signal + gradient_moments(pooled).signal) / 1.9
    )
    assert (steps.num_prompts, steps.num_batches) == (8, 2)


def test_a_step_without_prompts_has_no_rho():
    assert math.isnan(StepGradientSNR(GradientSNR()).add(torch.zeros(0, 5), step=0))


def test_fewer_than_two_prompts_say_nothing_of_rho_whatever_is_remembered():
    snr = StepGradientSNR(GradientSNR(decay=0.5))
    before = snr.add(torch.randn(8, 5, generator=torch.Generator().manual_seed(0)) + 1, step=0)
    assert 0 < before < 1
    for step, num_prompts in ((1, 1), (2, 0)):
        assert math.isnan(snr.add(torch.ones(num_prompts, 5), step=step))
