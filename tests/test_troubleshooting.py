"""Every failure of `docs/troubleshooting.md` that a small run or a formula can show, and the page against the code."""

import dataclasses
import math
import random
import re
from pathlib import Path

import pytest
import torch

from oblr_trl import OBLRPOConfig, OBLRPOTrainer, gradient_weighted_baseline, leave_one_out_baseline
from oblr_trl.baselines import PRIOR_STRENGTH_GRID, AutomaticPriorStrength, gradient_variance, scaled_advantages
from oblr_trl.metrics import METRICS
from oblr_trl.runs.diagnosis import CAUSES, RULES, diagnose
from tests.tiny_models import digit_reward, logged, tiny_model, train

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text()
# Logged by TRL, the last one only with vLLM.
TRL_METRICS = {"reward", "reward_std", "learning_rate", "frac_reward_zero_std", "clip_ratio/region_mean", "grad_norm"}
TRL_METRICS |= {"step_time"}
VLLM_METRICS = {"sampling/sampling_logp_difference/mean"}


TRUST = {"lr_adaptation": "trust_region", "lr_scheduler_type": "constant"}


def run(output_dir, **options):
    return train(OBLRPOTrainer, OBLRPOConfig, output_dir, **options)


def names(trainer):
    return [finding.name for finding in diagnose(trainer.state.log_history)]


def normal(*size, generator):
    return torch.randn(*size, generator=generator, dtype=torch.float64)


@pytest.fixture(scope="module")
def healthy(tmp_path_factory):
    return run(tmp_path_factory.mktemp("healthy"), max_steps=12, trust_region_kl=0.05, **TRUST)


def test_a_healthy_run_learns_and_shows_no_failure(healthy):
    rewards = logged(healthy, "reward")
    assert sum(rewards[4:]) / 8 > sum(rewards[:4]) / 4
    assert set(names(healthy)) <= {"Too few prompts per step"}  # 4 of them


def test_rewards_at_random_take_the_learning_rate_to_its_floor(tmp_path):
    draw = random.Random(0)

    def broken_verifier(completions, **kwargs):
        return [float(draw.random() < 0.5) for _ in completions]

    options = {"per_device_train_batch_size": 64, "num_generations": 2, "max_steps": 12}
    trainer = run(tmp_path, reward=broken_verifier, **options)
    assert "Learning-rate collapse" in names(trainer)
    assert sum(multiplier == pytest.approx(0.05) for multiplier in logged(trainer, "lr_multiplier")[-6:]) >= 4


class FixedSteps(torch.optim.SGD):
    """Steps of its own length, whatever its rate is."""

    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data.add_(parameter.grad.sign(), alpha=-2e-3)


def test_an_optimizer_that_ignores_its_rate_moves_the_policy_too_far(tmp_path):
    model = tiny_model(num_layers=2)
    optimizers = (FixedSteps(model.parameters(), lr=1.0), None)
    trainer = run(tmp_path, model=model, optimizers=optimizers, max_steps=12, trust_region_kl=1e-4, **TRUST)
    assert "Policy moved too far" in names(trainer)
    rates = logged(trainer, "learning_rate")
    assert rates[-1] < rates[4] / 100  # the search lowers it in vain


def test_a_reward_that_drifts_away_hides_the_predicted_gain(tmp_path):
    num_calls = 0

    def stricter_and_stricter(completions, **kwargs):
        nonlocal num_calls
        num_calls += 1
        return [reward - 0.035 * num_calls for reward in digit_reward(completions)]

    options = {"max_steps": 30, "trust_region_kl": 0.01, **TRUST}
    steady, drifting = run(tmp_path / "a", **options), run(tmp_path / "b", reward=stricter_and_stricter, **options)
    gains = [[gain for gain in logged(t, "trust_region/predicted_gain") if gain] for t in (steady, drifting)]
    assert sum(gains[1]) == pytest.approx(sum(gains[0]), rel=0.5)
    # By itself: a reward that falls this far is told as a collapse, and what follows from that is left out.
    (rule,) = (rule for name, _, rule in RULES if name == "Gain not realised")
    assert list(rule(drifting.state.log_history))
    assert not list(rule(steady.state.log_history))


@pytest.mark.parametrize("prior_strength", PRIOR_STRENGTH_GRID)
def test_a_baseline_lies_between_the_minimum_and_the_maximum_reward(prior_strength):
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        rewards = 100 * normal(6, 4, generator=generator)
        weights = normal(6, 4, generator=generator).mul(6).exp()  # over 20 orders of magnitude
        baselines = gradient_weighted_baseline(rewards, weights, prior_strength=prior_strength)
        assert rewards.min() - 1e-9 <= baselines.min() <= baselines.max() <= rewards.max() + 1e-9


def test_an_outlier_among_the_rewards_moves_the_baseline_of_every_prompt(tmp_path, healthy):
    num_scored = 0

    def with_timeouts(completions, **kwargs):
        nonlocal num_scored
        rewards = digit_reward(completions)
        for i in range(len(rewards)):
            num_scored += 1
            if num_scored % 130 == 0:  # the last but one of every fifth batch of 32
                rewards[i] = -100.0
        return rewards

    trainer = run(tmp_path / "penalty", reward=with_timeouts, max_steps=12)

    shifts, noise = logged(trainer, "baseline/shift"), logged(trainer, "gradient_snr/noise")
    assert shifts[4] > 10 * max(logged(healthy, "baseline/shift"))
    assert max(shifts[5:8]) < 0.2 * shifts[4]  # the batches after it know nothing of it
    assert noise[4] > 10 * noise[3]
    assert "Exploding baseline" in names(trainer)


def test_an_unscorable_completion_in_its_place_is_left_out(tmp_path):
    def with_none(completions, **kwargs):
        return [None if i == 7 else reward for i, reward in enumerate(digit_reward(completions))]

    assert "Exploding baseline" not in names(run(tmp_path, reward=with_none, max_steps=8))


def test_the_groups_own_deviation_with_a_prior_would_have_no_bound():
    rewards = torch.tensor([[1.0] * 4, [0.0] * 4])  # equal within every group, not within the batch
    weights = torch.ones_like(rewards)
    deviation = rewards.std(dim=1, keepdim=True) + 1e-4  # as TRL scales
    with_prior = (rewards - gradient_weighted_baseline(rewards, weights, prior_strength=16.0)) / deviation
    without = (rewards - gradient_weighted_baseline(rewards, weights)) / deviation
    # b = (3 * 1 + 16 * 0) / 19 in the first group: 16 / 19 is divided by 1e-4.
    assert with_prior[0].tolist() == pytest.approx([1e4 * 16 / 19] * 4, rel=1e-4)
    assert without.abs().max() == 0
    baselines = gradient_weighted_baseline(rewards, weights, prior_strength=16.0)
    # 3 rewards of 1 and 16 of 0: variance 3 / 19 * 16 / 19, so that (16 / 19) / sqrt(48 / 361) = 4 / sqrt(3)
    ours = scaled_advantages(rewards, baselines, prior_strength=16.0)
    assert ours[0].tolist() == pytest.approx([4 / math.sqrt(3)] * 4, rel=1e-3)


def test_weights_that_say_nothing_of_the_rewards_make_a_noisy_baseline_without_a_prior():
    generator = torch.Generator().manual_seed(0)
    automatic = AutomaticPriorStrength()
    plain = paper = ours = 0.0
    for _ in range(200):
        rewards = (torch.rand(16, 4, generator=generator) < 0.5).double()
        weights = normal(16, 4, generator=generator).mul(2).exp()
        plain += gradient_variance(rewards, weights, leave_one_out_baseline(rewards))
        paper += gradient_variance(rewards, weights, gradient_weighted_baseline(rewards, weights))
        baselines = gradient_weighted_baseline(rewards, weights, prior_strength=automatic.value)
        ours += gradient_variance(rewards, weights, baselines)
        automatic.update(rewards, weights)
    # Var(r - b) is p (1 - p) (1 + sum w^2 / (sum w)^2): 4 / 3 for three equal weights, nearly 2 where one carries all.
    assert 1.15 < paper / plain < 1.5
    assert ours / plain < 0.9


def test_the_group_mean_shows_itself_by_a_constant_ratio(tmp_path):
    trainer = run(tmp_path, baseline="group_mean", max_steps=5)
    assert logged(trainer, "variance_ratio/leave_one_out") == pytest.approx([(7 / 8) ** 2] * 5)


def test_equal_rewards_give_no_gradient_at_all(tmp_path):
    trainer = run(tmp_path, reward=lambda completions, **kwargs: [0.0] * len(completions), max_steps=5)
    assert logged(trainer, "frac_reward_zero_std") == [1.0] * 5
    assert logged(trainer, "grad_norm") == [0.0] * 5
    assert "Constant rewards" in names(trainer)


def test_many_steps_on_one_batch_leave_the_clipping_range(tmp_path, healthy):
    trainer = run(tmp_path, num_iterations=4, learning_rate=5e-3, lr_adaptation="none", max_steps=8)
    assert logged(healthy, "clip_ratio/region_mean") == [0.0] * 12
    assert logged(trainer, "clip_ratio/region_mean")[0] == 0.0
    assert "Off-policy drift" in names(trainer)


# The page


def test_the_page_names_only_metrics_and_options_that_exist(healthy):
    rows = {name for row in healthy.state.log_history for name in row}
    assert set(METRICS) | TRL_METRICS <= rows
    named = set(re.findall(r"`([a-z_]+(?:/[a-z_]+)+)`", PAGE)) | set(re.findall(r"`(\w+)`", PAGE)) & TRL_METRICS
    assert named <= rows | VLLM_METRICS
    assert len(named) > 10

    fields = {field.name for field in dataclasses.fields(OBLRPOConfig)}
    words = {word for word in re.findall(r"`([a-z]+_\w+)(?:=[^`]*)?`", PAGE) if not word.startswith("test_")}
    assert words <= fields | set(METRICS) | TRL_METRICS | {"lm_head", "eval_accuracy"}
    assert {"snr_min_multiplier", "baseline_prior_strength", "score_scope"} <= words


def test_every_failure_has_its_section_a_row_and_a_reproduction():
    found_in_code = {name for name, _, _ in RULES}
    sections = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", PAGE, flags=re.MULTILINE | re.DOTALL))
    assert set(CAUSES) < found_in_code <= set(sections)
    assert re.findall(r"^\| \[(.+?)\]", PAGE, flags=re.MULTILINE) == list(sections)
    anchors = {re.sub(r"[^\w -]", "", name.lower()).replace(" ", "-") for name in sections}
    assert set(re.findall(r"\(#([^)]+)\)", PAGE)) <= anchors
    for name, text in sections.items():
        reproductions = re.findall(r"`(test_\w+)`\]\(([^)]+)\)", text)
        assert reproductions or "../notebooks/" in text, name
        for test, file in reproductions:
            assert f"def {test}(" in (ROOT / "docs" / file).read_text(), test
