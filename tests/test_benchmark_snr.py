"""The SNR study: its truth against explicit gradients, its interval against known Gaussians, its command at a tiny size."""

import json
import math
from types import SimpleNamespace

import pytest
import torch

from benchmarks import snr
from benchmarks.sections import snr as section
from benchmarks.snr_drift import interpolated, lag_errors, noise_around, run_errors
from benchmarks.snr_estimates import (
    ESTIMATORS,
    PooledGradientSNR,
    SeparateGradientSNR,
    batch_estimates,
    estimate_batch,
    smoothed_ratios,
    stream_advantages,
)
from benchmarks.snr_policies import RunSettings, load_policy, training_run
from benchmarks.snr_population import population, rewarded_chunks, sketched_gradient
from benchmarks.snr_rollouts import Rollouts, draw_rollouts, merged
from benchmarks.snr_summary import error_summary, interval_coverage, verdict
from benchmarks.snr_truth import BatchGradients, exact_batch_gradients, expected_gradient, gradient_truth
from examples.tiny_qwen3.model import build_model, build_tokenizer
from oblr_trl.gradient_snr import GradientMoments, gradient_moments, rho
from oblr_trl.scores import reference_scores, score_sketches
from tests.tiny_models import random_batch, tiny_model, tiny_tokenizer

NUM_GENERATIONS = 4
PROMPTS = ["1+1=", "2+3=", "4+4=", "7+1="] * 3


def sampled_rollouts(model, prompts=PROMPTS, seed=0):
    torch.manual_seed(seed)
    return draw_rollouts(
        model,
        tiny_tokenizer(),
        prompts,
        lambda text, prompt: float(len(text) % 2) + prompt / 10,
        num_generations=NUM_GENERATIONS,
        max_completion_length=3,
        sketch_dim=256,
        projection_seed=5,
    )


def gaussian_batches(num_batches, num_prompts, mean, scale, seed=0):
    """Per-prompt gradients (K, N, D) with a known mean and a diagonal covariance."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(num_batches, num_prompts, mean.numel(), generator=generator, dtype=torch.float64)
    return mean + scale * noise


@pytest.fixture(scope="module")
def model():
    return tiny_model(hidden_size=64, num_layers=1).double().eval()


def test_equal_completions_are_scored_once_and_get_the_sketch_of_their_own(model):
    rollouts = sampled_rollouts(model)
    rows = rollouts.sequences.flatten()
    assert rollouts.sketches.size(0) <= rows.numel()
    assert rollouts.input_ids.unique(dim=0).size(0) <= rollouts.sketches.size(0)
    inputs = (rollouts.input_ids[rows], rollouts.attention_mask[rows], rollouts.completion_mask[rows])
    direct = score_sketches(model, *inputs, sketch_dim=256, seed=5)
    torch.testing.assert_close(rollouts.sketches[rows], direct, rtol=1e-6, atol=1e-8)
    # Every prompt's rows begin with that prompt: left-padded, so its last tokens stand before the completion.
    tokenizer = tiny_tokenizer()
    for prompt, sequences in zip(PROMPTS, rollouts.sequences, strict=True):
        ids = tokenizer(prompt)["input_ids"]
        assert all(row.tolist() == ids for row in rollouts.input_ids[sequences][:, : len(ids)])
    # The first prompt's rewards are 0 or 1, by the lengths of its texts.
    assert set(rollouts.rewards[0].tolist()) <= {0.0, 1.0}


def test_merged_draws_keep_their_rewards_beside_their_sketches(model):
    first, second = sampled_rollouts(model, seed=1), sampled_rollouts(model, PROMPTS[:2], seed=2)
    both = merged([first, second])
    sketches = both.sketches[both.sequences]
    torch.testing.assert_close(sketches[: len(PROMPTS)], first.sketches[first.sequences], rtol=0, atol=0)
    torch.testing.assert_close(sketches[len(PROMPTS) :], second.sketches[second.sequences], rtol=0, atol=0)
    assert both.rewards.tolist() == first.rewards.tolist() + second.rewards.tolist()


def test_exact_gradients_are_those_of_one_backward_per_completion(model):
    ids, attention, completion = random_batch("left", batch_size=24)
    generator = torch.Generator().manual_seed(0)
    sequences = torch.randint(0, 24, (12, NUM_GENERATIONS), generator=generator)  # some occur several times
    sequences[3] = 0  # the empty completion alone
    rollouts = Rollouts(ids, attention, completion, sequences, torch.zeros(sequences.shape), torch.empty(0))
    advantages = torch.randn(sequences.shape, generator=generator, dtype=torch.float64)
    measured = exact_batch_gradients(model, rollouts, advantages, num_prompts=4)
    scores = reference_scores(model, ids, attention, completion)[sequences]  # (P, G, D)
    gradients = (advantages.unsqueeze(2) * scores).mean(dim=1).unflatten(0, (3, 4))  # (K, N, D)
    # Qwen3's norms compute in float32.
    torch.testing.assert_close(measured.means, gradients.mean(dim=1), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(measured.squared_norms, gradients.square().sum(dim=2).mean(dim=1), rtol=1e-5, atol=0)


def test_the_expected_gradient_is_that_of_the_probability_of_the_answers(model):
    draws = [("1+1=", "2"), ("12+30=", "42"), ("1+1=", "2"), ("4+4=", "8")]
    problems = population(*zip(*draws, strict=True))
    assert dict(zip(problems.prompts, problems.shares.tolist(), strict=True)) == {
        "1+1=": 0.5,
        "12+30=": 0.25,
        "4+4=": 0.25,
    }
    tokenizer = tiny_tokenizer()
    gradient, reward = expected_gradient(model, *rewarded_chunks(tokenizer, problems))
    expected, probability = torch.zeros_like(gradient), 0.0
    for prompt, answer in draws:  # one at a time and unpadded
        ids = torch.tensor([tokenizer(prompt + answer)["input_ids"] + [tokenizer.eos_token_id]])
        mask = torch.ones(1, len(answer) + 1, dtype=torch.long)
        logps = model(input_ids=ids).logits.log_softmax(dim=-1)[0, :-1].gather(1, ids[0, 1:, None])[-mask.size(1) :]
        share = logps.sum().exp().item() / len(draws)
        expected += share * reference_scores(model, ids, torch.ones_like(ids), mask)[0]
        probability += share
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-9)
    assert reward == pytest.approx(probability, rel=1e-6)


def test_a_full_gradient_has_the_sketch_that_the_scoring_pass_gives_its_sequence():
    model = tiny_model(hidden_size=64, num_layers=2)
    inputs = random_batch("left", batch_size=3)
    sketches = score_sketches(model, *inputs, sketch_dim=1024, seed=7)
    for score, sketch in zip(reference_scores(model, *inputs), sketches, strict=True):
        ours = sketched_gradient(model, score, sketch_dim=1024, seed=7)
        torch.testing.assert_close(ours, sketch, rtol=1e-4, atol=1e-4)


def test_the_truth_recovers_known_moments_and_its_standard_errors_are_right():
    mean, scale = torch.zeros(20, dtype=torch.float64), torch.linspace(0.5, 1.5, 20, dtype=torch.float64)
    mean[:4] = 0.2
    signal, noise, num_prompts = 0.16, scale.square().sum().item(), 8
    truths = []
    for seed in range(60):
        gradients = gaussian_batches(50, num_prompts, mean, scale, seed)
        batches = BatchGradients(gradients.mean(dim=1), gradients.square().sum(dim=2).mean(dim=1))
        truths.append(gradient_truth(batches, mean, num_prompts=num_prompts))
    assert truths[0].signal == pytest.approx(signal)
    for name, expected in (
        ("noise", noise),
        ("rollout_signal", signal),
        ("rollout_projection", 1),
        ("batch_noise_ratio", 1),
    ):
        values = torch.tensor([getattr(truth, name).value for truth in truths])
        error = math.sqrt(sum(getattr(truth, name).standard_error ** 2 for truth in truths) / len(truths))
        assert values.mean().item() == pytest.approx(expected, abs=4 * error / math.sqrt(len(truths)))
        assert error == pytest.approx(values.std().item(), rel=0.4)  # the spread of 60 draws is known to 9 %
    # rho at 32 prompts: 0.16 / (0.16 + noise / 32)
    rho = truths[0].rho(32, noise_factor=noise / truths[0].noise.value)
    assert rho.value == pytest.approx(signal / (signal + noise / 32))


@pytest.mark.parametrize("true_rho", [0.3, 0.6, 0.9])
def test_the_interval_covers_a_known_rho_of_gaussian_gradients(true_rho):
    num_prompts, dim = 32, 30
    scale = torch.ones(dim, dtype=torch.float64)
    mean = torch.zeros(dim, dtype=torch.float64)
    mean[0] = math.sqrt(true_rho / (1 - true_rho) * dim / num_prompts)  # signal = rho / (1 - rho) x noise / N
    batches = [estimate_batch(gradients) for gradients in gaussian_batches(400, num_prompts, mean, scale)]
    covered = interval_coverage(batches, "log", true_rho)
    assert (
        0.91 <= covered["coverage"] <= 1
    )  # 0.95 with a standard error of 0.011; it may be too wide, never too narrow
    assert covered["coverage"] + covered["too_high"] + covered["too_low"] == pytest.approx(1)
    assert covered["mean_width"] < 0.75
    low, high = batches[0].intervals["log"]
    assert low < rho(*batches[0].moments, num_prompts) < high


def test_two_prompts_have_no_interval():
    estimate = estimate_batch(torch.randn(2, 5))
    assert all(math.isnan(end) for ends in estimate.intervals.values() for end in ends)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_without_decay_every_estimator_is_that_of_the_single_batch(name):
    batches = [
        estimate_batch(gradients) for gradients in torch.randn(5, 6, 3, generator=torch.Generator().manual_seed(0)) + 1
    ]
    expected = [rho(*batch.moments, 6) for batch in batches]
    assert smoothed_ratios(batches, name, 0.0, 6) == pytest.approx(expected)


def test_the_pooled_signal_is_unbiased_and_steadier_where_the_gradient_stands_still():
    mean, scale = torch.full((10,), 0.1, dtype=torch.float64), torch.ones(10, dtype=torch.float64)
    pooled, separate = [], []
    for seed in range(100):
        estimators = PooledGradientSNR(0.8), SeparateGradientSNR(0.8)
        for gradients in gaussian_batches(12, 4, mean, scale, seed):
            batch = estimate_batch(gradients)
            for estimator in estimators:
                estimator.add(batch, 4)
        pooled.append(estimators[0].signal)
        separate.append(estimators[1]._snr.signal)
    spreads = [torch.tensor(values).std().item() for values in (pooled, separate)]
    assert sum(pooled) / 100 == pytest.approx(0.1, abs=4 * spreads[0] / math.sqrt(100))
    assert spreads[0] < 0.8 * spreads[1]


def test_moving_averages_are_read_once_they_are_warm():
    batches = [estimate_batch(gradients) for gradients in torch.ones(12, 3, 2) + torch.eye(3, 2)]
    # 1 - 0.8^t reaches 0.9 at t = 11 batches: two of twelve count.
    assert len(smoothed_ratios(batches, "separate", 0.8, 3)) == 2
    assert smoothed_ratios(batches[:10], "separate", 0.8, 3) == []


def test_batches_are_the_trainers_and_the_prior_of_a_batch_comes_from_earlier_ones(model):
    rollouts = sampled_rollouts(model)
    prompts = torch.tensor([5, 2, 7, 1, 0, 3, 4])
    stream = list(stream_advantages(rollouts, prompts, 3))
    assert [batch.tolist() for batch, _ in stream] == [[5, 2, 7], [1, 0, 3]]  # the seventh prompt fills no batch
    estimates = batch_estimates(rollouts, prompts, 3)
    batch, advantages = stream[1]
    gradients = (advantages.unsqueeze(2) * rollouts.sketches[rollouts.sequences[batch]]).mean(dim=1)
    assert estimates[1].moments == pytest.approx(gradient_moments(gradients))
    last = rollouts.rewards.clone()
    last[3] = 1 - last[3]  # a prompt of the second batch
    rollouts.rewards = last
    changed = list(stream_advantages(rollouts, prompts, 3))
    assert torch.equal(changed[0][1], stream[0][1])
    assert not torch.equal(changed[1][1], stream[1][1])


def test_a_path_is_interpolated_in_logarithms_and_a_policy_at_rest_has_no_lag():
    path = {0: GradientMoments(1.0, 8.0), 2: GradientMoments(4.0, 2.0)}
    assert [tuple(moments) for moments in interpolated(path)] == [
        pytest.approx(pair) for pair in ((1, 8), (2, 4), (4, 2))
    ]
    # decay 0.5 after three steps: weights 1, 2 and 4 of 7: signal 21 / 7, noise 24 / 7
    expected = rho(21 / 7, 24 / 7, 4) / rho(4, 2, 4) - 1
    assert lag_errors(path, 0.5, 4)[-1] == pytest.approx(expected)
    rest = {0: GradientMoments(1.0, 8.0), 5: GradientMoments(1.0, 8.0)}
    assert lag_errors(rest, 0.9, 4) == pytest.approx([0.0] * 6, abs=1e-12)


def test_the_run_is_held_against_its_own_step_of_the_path():
    gradients = gaussian_batches(3, 4, torch.ones(5, dtype=torch.float64), torch.ones(5, dtype=torch.float64))
    moments = [gradient_moments(batch) for batch in gradients]
    assert noise_around(gradients, 2, half_width=1) == pytest.approx((moments[1].noise + moments[2].noise) / 2)
    path = {step: GradientMoments(max(m.signal, 0.1), m.noise) for step, m in enumerate(moments)}
    path[3] = GradientMoments(1.0, 1.0)  # after the last batch: no batch is held against it
    errors = run_errors(gradients, path, [0.0])
    expected = [rho(*m, 4) - rho(*p, 4) for m, p in zip(moments, path.values(), strict=False)]
    true = torch.tensor([rho(*p, 4) for p in list(path.values())[:3]])
    assert errors["mean_true_rho"] == pytest.approx(true.mean().item())
    assert errors["constant_rms"] == pytest.approx(true.std(correction=0).item())
    assert errors["errors"]["separate"]["0.0"]["mean"] == pytest.approx(sum(expected) / 3, abs=1e-6)


def test_errors_are_relative_to_the_truth_and_bias_is_not_spread():
    summary = error_summary([0.3, 0.5, 0.52, 0.68, math.nan], 0.5)
    assert summary is not None
    assert summary["num_estimates"] == 4
    assert summary["bias"] == pytest.approx(0.0)
    assert summary["typical_error"] == pytest.approx(0.04)  # torch's median is the lower one of 0, 0.04, 0.36, 0.4
    assert summary["within_tolerance"] == 0.5
    assert error_summary([], 0.5) is None


def entry(num_prompts, error, bias):
    summary = {"bias": bias, "typical_error": abs(bias), "within_tolerance": 0.5}
    smoothed = {name: {section._DECAY: summary if num_prompts < 256 else None} for name in ESTIMATORS}
    return {
        "num_prompts": num_prompts,
        "ratio_of_means": {"relative_error": error},
        "single_batch": summary,
        "smoothed": smoothed,
    }


def test_the_verdict_is_about_the_worst_of_the_large_batches():
    entries = [entry(32, 0.9, 0.9), entry(64, -0.2, 0.1), entry(256, 0.1, -0.3)]
    result = verdict([{"batches": entries}])
    assert result["ratio_of_means_worst"] == -0.2
    assert result["single_batch"]["worst_bias"] == -0.3
    assert result["separate"]["worst_bias"] == 0.1  # no moving average has filled up at 256


def test_settings_that_do_not_fit_name_the_field_and_the_remedy(tmp_path):
    with pytest.raises(ValueError, match=r"`num_prompts` is 10, which batches of 4 prompts.*do not divide"):
        snr.SNRArguments(num_prompts=10, batch_sizes=[4], truth_batch_size=5)
    with pytest.raises(ValueError, match=r"fewer than three prompts"):
        snr.SNRArguments(num_prompts=16, batch_sizes=[2], truth_batch_size=4)
    with pytest.raises(ValueError, match=r"`population_size` is 10, but .* need 96 prompts"):
        snr.SNRArguments(num_prompts=8, batch_sizes=[4], truth_batch_size=4, population_size=10)
    with pytest.raises(ValueError, match=r"`snapshot_steps` is \[1, 2\], which must hold 0"):
        snr.SNRArguments(snapshot_steps=[1, 2])
    with pytest.raises(ValueError, match=r"at least three batches"):
        snr.SNRArguments(num_prompts=16, num_seeds=1, batch_sizes=[4], truth_batch_size=16)
    with pytest.raises(ValueError, match=r"python -m examples\.tiny_qwen3"):
        load_policy(str(tmp_path))


def test_the_command_writes_truth_estimates_and_drift_and_the_section_shows_them(tmp_path, monkeypatch):
    torch.manual_seed(0)
    tokenizer = build_tokenizer(["State the final answer to the following arithmetic problem: 6 + 2 + 0 ="])
    for part in (build_model(tokenizer, hidden_size=64, num_hidden_layers=1), tokenizer):
        part.save_pretrained(tmp_path / "model")
    # An untrained model never answers correctly, so its answers are scored by a property that they do have.
    scorer = SimpleNamespace(score_answer=lambda answer, entry: float(len(answer) % 2))
    monkeypatch.setattr(snr, "make_task", lambda *args, **kwargs: scorer)
    arguments = snr.SNRArguments(
        model=str(tmp_path / "model"),
        run_dir=str(tmp_path / "run"),
        output=str(tmp_path / "results" / "snr.json"),
        snapshot_steps=[0, 2],
        path_steps=[1],
        num_prompts=12,
        num_seeds=2,
        population_size=64,
        batch_sizes=[4, 12],
        truth_batch_size=4,
        decays=[0.0, 0.8],
        num_projections=2,
    )
    snr.main(arguments)
    record = json.loads((tmp_path / "results" / "snr.json").read_text())
    assert record["settings"]["model"] == "model"  # no path of this machine
    assert str(tmp_path) not in json.dumps(record)
    assert [policy["step"] for policy in record["policies"]] == [0, 2]
    for policy in record["policies"]:
        assert policy["noise"]["value"] > 0
        assert [e["num_prompts"] for e in policy["batches"]] == [4, 12]
        # Two seeds and as many orders: 24 prompts make 6 batches of 4, twice.
        assert policy["batches"][0]["single_batch"]["num_estimates"] == 12
        assert len(policy["batches"][0]["ratio_of_means"]["relative_error_by_seed"]) == 2
    assert [point["step"] for point in record["drift"]["path"]] == [0, 1, 2]
    assert len(record["drift"]["cosine_to_next"]) == 2

    text = section.markdown(record)
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert [line.split(" | ")[0] for line in table[2:]] == ["| 4", "| 12"]
    assert all(line.count("|") == table[0].count("|") for line in table)
    axes = section.figure(record).axes
    assert [axis.get_title() for axis in axes] == ["start model", "after 2 steps"]
    true = [e["true_rho"]["value"] for e in record["policies"][1]["batches"]]
    assert axes[1].lines[0].get_ydata().tolist() == true

    # A second call of the same settings trains nothing.
    monkeypatch.setattr("benchmarks.snr_policies._train", None)
    again = training_run(RunSettings(arguments.recipe, arguments.model, (0, 1, 2)), arguments.run_dir)
    assert again.gradients.shape[:2] == (2, 16)
