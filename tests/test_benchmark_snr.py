"""The SNR study: its truth against explicit gradients, its estimates against arithmetic, and its command."""

import json
import math
from pathlib import Path

import pytest
import torch

from benchmarks import snr
from benchmarks.completion_pool import sample_completions
from benchmarks.sections import snr as section
from benchmarks.snr_estimates import (
    Rollouts,
    batch_moments,
    error_summary,
    smoothed_rhos,
    stream_advantages,
    summarise_size,
    warm_rhos,
)
from benchmarks.snr_truth import count_problems, expected_gradient, squared_gradient_norms
from oblr_trl.gradient_snr import GradientMoments, gradient_moments, rho
from oblr_trl.scores import reference_scores, score_sketches
from tests.tiny_models import tiny_model, tiny_tokenizer
from tests.tiny_policies import length_parity, save_tiny_policy

PROMPTS = ["1+1=", "12+3=", "4+4=", "7+1="] * 2


@pytest.fixture(scope="module")
def model():
    return tiny_model(hidden_size=64, num_layers=1).double().eval()


@pytest.fixture
def rollouts(model):
    torch.manual_seed(0)
    completions = sample_completions(model, tiny_tokenizer(), PROMPTS, num_completions=4, max_completion_length=3)
    rewards = torch.tensor([len(text) % 2 + row / 100 for row, text in enumerate(completions.texts)]).view(-1, 4)
    sketches = score_sketches(model, *completions.inputs(), sketch_dim=256).unflatten(0, (-1, 4))
    return Rollouts(completions, rewards, sketches)


def test_exact_gradients_are_those_of_one_backward_per_completion(model, rollouts):
    advantages = torch.randn(8, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    scores = reference_scores(model, *rollouts.completions.inputs()).unflatten(0, (8, 4))  # (P, G, D)
    expected = (advantages.unsqueeze(2) * scores).mean(dim=1).square().sum(dim=1)
    measured = squared_gradient_norms(model, rollouts.completions, advantages)
    torch.testing.assert_close(measured, expected, rtol=1e-5, atol=0)  # Qwen3's norms compute in float32


def test_the_expected_gradient_is_that_of_the_probability_of_the_answers(model):
    draws = [("1+1=", "2"), ("12+30=", "42"), ("1+1=", "2"), ("4+4=", "8")]
    problems = count_problems(*zip(*draws, strict=True))
    shares = dict(zip(problems.prompts, problems.shares.tolist(), strict=True))
    assert shares == {"1+1=": 0.5, "12+30=": 0.25, "4+4=": 0.25}
    tokenizer = tiny_tokenizer()
    gradient = expected_gradient(model, tokenizer, problems)
    expected = torch.zeros_like(gradient)
    for prompt, answer in draws:  # one at a time and unpadded
        ids = torch.tensor([tokenizer(prompt + answer)["input_ids"] + [tokenizer.eos_token_id]])
        mask = torch.ones(1, len(answer) + 1, dtype=torch.long)
        logps = model(input_ids=ids).logits.log_softmax(dim=-1)[0, :-1].gather(1, ids[0, 1:, None])[-mask.size(1) :]
        expected += logps.sum().exp().item() / len(draws) * reference_scores(model, ids, torch.ones_like(ids), mask)[0]
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-9)


def test_batches_are_the_trainers_and_the_prior_of_a_batch_comes_from_earlier_ones(rollouts):
    prompts = torch.tensor([5, 2, 7, 1, 0, 3, 4])
    stream = list(stream_advantages(rollouts, prompts, 3))
    assert [batch.tolist() for batch, _ in stream] == [[5, 2, 7], [1, 0, 3]]  # the seventh prompt fills no batch
    batch, advantages = stream[1]
    gradients = (advantages.unsqueeze(2) * rollouts.sketches[batch]).mean(dim=1)
    assert batch_moments(rollouts, prompts, 3)[1] == pytest.approx(gradient_moments(gradients))
    rewards = rollouts.rewards.clone()
    rewards[3] = 1 - rewards[3]  # a prompt of the second batch
    changed = list(stream_advantages(rollouts._replace(rewards=rewards), prompts, 3))
    assert torch.equal(changed[0][1], stream[0][1])
    assert not torch.equal(changed[1][1], stream[1][1])


def test_moving_averages_smooth_both_moments_and_are_read_once_they_are_warm():
    batches = [GradientMoments(1.0, 8.0), GradientMoments(2.0, 4.0), GradientMoments(4.0, 2.0)]
    assert smoothed_rhos(batches, 0.0, 6) == pytest.approx([rho(*moments, 6) for moments in batches])
    # Decay 0.5 after three batches: weights 1, 2 and 4 of 7: signal 21 / 7, noise 24 / 7.
    assert smoothed_rhos(batches, 0.5, 4)[-1] == pytest.approx(rho(21 / 7, 24 / 7, 4))
    # 1 - 0.8^t reaches 0.9 at t = 11 batches: two of twelve count.
    assert len(warm_rhos(batches * 4, 0.8, 3)) == 2
    assert warm_rhos(batches * 3, 0.8, 3) == []


def test_errors_are_relative_to_the_truth_and_bias_is_not_spread():
    summary = error_summary([0.3, 0.5, 0.52, 0.68, math.nan], 0.5)
    # torch's median is the lower one of 0, 0.04, 0.36, 0.4.
    assert summary == pytest.approx({"num_estimates": 4, "bias": 0.0, "typical_error": 0.04})
    assert error_summary([], 0.5) is None
    assert error_summary([0.5], 0.0) is None


def test_a_batch_size_is_summarised_over_all_orders_of_the_prompts():
    streams = [[GradientMoments(-1.0, 8.0), GradientMoments(3.0, 8.0)], [GradientMoments(4.0, 8.0)] * 2]
    summary = summarise_size(streams, 0.5, num_prompts=4)
    # Signals -1, 3, 4 and 4, noise 8, of 4 prompts: mean 2.5 / (2.5 + 2); single rhos 0, 0.6, 2 / 3 and 2 / 3.
    assert summary["error_of_mean_moments"] == pytest.approx(2.5 / 4.5 / 0.5 - 1)
    assert summary["negative_signal"] == 0.25
    assert summary["single_batch"]["bias"] == pytest.approx((0.6 + 4 / 3) / 4 / 0.5 - 1)
    assert summary["moving_average"] is None  # two batches do not fill it


@pytest.mark.parametrize(
    ("batch_sizes", "message"),
    [([4], "`num_prompts` is 10, .*of 4 .*do not divide"), ([1], "fewer than the two prompts")],
)
def test_batches_that_do_not_fit_name_the_field_and_the_remedy(batch_sizes, message):
    with pytest.raises(ValueError, match=message):
        snr.SNRArguments(num_prompts=10, batch_sizes=batch_sizes, truth_batch_size=5)


@pytest.mark.slow
def test_the_command_writes_truth_and_estimates_and_resumes(tmp_path, monkeypatch, capsys):
    save_tiny_policy(tmp_path / "model")
    # An untrained model never answers correctly, so its answers are rewarded for a property that they do have.
    monkeypatch.setattr(snr, "task_reward", lambda task, params: length_parity)
    sizes = {"steps": [0, 2], "num_prompts": 12, "num_seeds": 2, "population_size": 64}
    arguments = snr.SNRArguments(
        model=str(tmp_path / "model"),
        run_dir=str(tmp_path / "run"),
        output=str(tmp_path / "snr.json"),
        batch_sizes=[4, 12],
        truth_batch_size=4,
        **sizes,
    )
    snr.main(arguments)
    record = json.loads((tmp_path / "snr.json").read_text())
    assert str(tmp_path) not in json.dumps(record)
    assert [policy["step"] for policy in record["policies"]] == [0, 2]
    for policy in record["policies"]:
        assert policy["noise"] > 0
        assert [entry["num_prompts"] for entry in policy["batches"]] == [4, 12]
        # Two draws and as many orders: 24 prompts make 6 batches of 4, twice.
        assert policy["batches"][0]["single_batch"]["num_estimates"] == 12
    printed = section.markdown(record)
    assert printed in capsys.readouterr().out
    table = printed.split("\n\n")[1].splitlines()
    assert [line.split(" | ")[0] for line in table[2:]] == ["| 4", "| 12"]

    # A second call of the same settings trains nothing.
    monkeypatch.setattr(snr, "_train", None)
    policies = snr.snapshots(arguments.model, [2, 0], arguments.run_dir)
    assert list(policies) == [0, 2]
    assert all((Path(directory) / "config.json").is_file() for directory in policies.values())
