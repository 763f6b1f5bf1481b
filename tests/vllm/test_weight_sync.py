"""Colocated vLLM generates with the weights that training has just made, on one process and under ZeRO-3, with and without LoRA."""

import math

import pytest

from tests.vllm.plans import SYNCED_RUNS

MEAN_DIFFERENCE = "sampling/sampling_logp_difference/mean"
MAX_DIFFERENCE = "sampling/sampling_logp_difference/max"


@pytest.mark.parametrize("name", SYNCED_RUNS)
def test_the_engine_has_the_weights_of_every_step(run_named, name):
    run = run_named(name)
    means, maxima = run.logged(MEAN_DIFFERENCE), run.logged(MAX_DIFFERENCE)
    assert len(means) == len(maxima) == 3
    assert max(means) < 2e-6  # float32 rounding: 1e-7 to 3e-7
    assert max(maxima) < 1e-5


@pytest.mark.parametrize("name", SYNCED_RUNS)
def test_the_weights_have_moved_between_the_steps(run_named, name):
    first, *later = run_named(name).recorded("fixed_logps")

    changes = [max(abs(a - b) for a, b in zip(first, logps, strict=True)) for logps in later]
    assert min(changes) > 0.1


def test_an_engine_that_is_not_synced_is_caught_from_the_second_step_on(run_named):
    run = run_named("stale")
    first, *later = run.logged(MEAN_DIFFERENCE)

    assert first < 2e-6  # the engine holds the start model
    assert len(later) == 2
    assert min(later) > 0.1


def test_the_snr_multiplier_drives_the_rate_of_a_run_with_vllm(run_named):
    multipliers = run_named("snr").logged("lr_multiplier")

    assert len(multipliers) == 3
    assert all(1e-6 <= multiplier <= 1 for multiplier in multipliers), multipliers
    assert len(set(multipliers)) == 3, multipliers


def test_the_trust_region_measures_the_movement_of_a_run_with_vllm(run_named):
    """Also over the weights that vLLM was given in between; the search raises the rate from where it cannot move too far."""
    run = run_named("trust_region")
    kls, targets, rates = (run.logged(name) for name in ("trust_region/kl", "trust_region/kl_target", "learning_rate"))

    assert kls[0] is None
    assert all(0 < kl < 1 for kl in kls[1:]), kls
    assert all(math.isfinite(target) for target in targets)
    assert rates[1] > 2 * rates[0]
    assert max(run.logged(MEAN_DIFFERENCE)) < 2e-6


@pytest.mark.parametrize("name", ["zero_3", "zero_3_lora"])
def test_zero_3_really_shares_the_parameters_between_two_processes(run_named, name):
    run = run_named(name)

    for rank in range(2):
        assert run.recorded("num_processes", rank) == [2, 2, 2]
        assert run.recorded("zero_stage", rank) == [3, 3, 3]
        shared = zip(run.recorded("num_local_elements", rank), run.recorded("num_elements", rank), strict=True)
        assert all(
            local == -(-whole // 2) for local, whole in shared
        )  # every tensor here has an even number of elements


@pytest.mark.parametrize("name", SYNCED_RUNS)
def test_scores_noise_and_gradient_are_positive_and_finite(run_named, name):
    run = run_named(name)

    for metric in ("score/norm/mean", "gradient_snr/noise", "grad_norm"):
        values = run.logged(metric)
        assert len(values) == 3, metric
        assert all(math.isfinite(value) and value > 0 for value in values), (metric, values)
    ratios = run.logged("gradient_snr/rho")  # 0 where the estimated signal is negative
    assert len(ratios) == 3
    assert all(0 <= ratio < 1 for ratio in ratios), ratios


@pytest.mark.parametrize(("name", "num_processes"), [("full", 1), ("zero_3", 2), ("zero_3_lora", 2)])
def test_the_training_script_ends_the_process_group(run_named, name, num_processes):
    run = run_named(name)

    assert [run.left_process_group(rank) for rank in range(num_processes)] == [False] * num_processes
