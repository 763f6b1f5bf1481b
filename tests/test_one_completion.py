"""One completion per prompt, with the real TRL: the other prompts give the baseline, whatever else is asked for."""

import math
import warnings

import pandas
import pytest
import torch
from trl import GRPOConfig
from trl.trainer.utils import nanstd

from oblr_trl import OBLRPOConfig, OBLRPOTrainer
from oblr_trl.metrics import METRICS
from tests.recording import Recording, oracle_scores
from tests.tiny_models import OF_LAST_STEP, algorithm_state, construct, digit_reward, logged, train

ALONE = {"num_generations": 1, "per_device_train_batch_size": 16, "max_steps": 2}
RATIOS = ("variance_ratio/group_mean", "variance_ratio/leave_one_out", "variance_ratio/length_weighted")


def oracle_advantages(batch):
    """r_n - sum over the other prompts of w r / sum of w, one prompt at a time in float64."""
    weights = oracle_scores(batch).double().square().sum(dim=2).flatten().tolist()
    rewards = batch["rewards"].flatten().tolist()
    advantages = []
    for n, reward in enumerate(rewards):
        others = [m for m in range(len(rewards)) if m != n and not math.isnan(rewards[m])]
        weight = sum(weights[m] for m in others)
        advantages.append(reward - sum(weights[m] * rewards[m] for m in others) / weight)
    return torch.tensor(advantages)


@pytest.mark.parametrize("prior_strength", [None, 2.0, math.inf])
def test_the_advantages_are_those_of_the_oracles_full_gradients(tmp_path, prior_strength):
    options = {"baseline_prior_strength": prior_strength, "score_method": "exact", "log_completions": True}
    trainer = train(Recording, OBLRPOConfig, tmp_path, **(ALONE | options))
    assert len(trainer.batches) == 2
    for step, batch in enumerate(trainer.batches, start=1):
        torch.testing.assert_close(batch["advantages"], oracle_advantages(batch), rtol=1e-4, atol=1e-6)
        table = pandas.read_parquet(tmp_path / "completions" / f"completions_{step:05d}.parquet")
        assert table["prompt"].nunique() == 16
        assert table["advantage"].tolist() == pytest.approx(batch["advantages"].tolist())


def test_every_metric_is_logged_and_only_ratios_to_other_baselines_are_blank(tmp_path):
    trainer = train(OBLRPOTrainer, OBLRPOConfig, tmp_path, lr_adaptation="trust_region", **ALONE)
    for name in METRICS:
        values = logged(trainer, name)
        assert len(values) == 2, name
        known = [] if name in RATIOS else values[1:] if name in OF_LAST_STEP else values
        assert [value for value in values if value is not None] == known, name
    assert logged(trainer, "advantage/live_fraction") == [1.0, 1.0]
    assert logged(trainer, "advantage/live_fraction_group_mean") == [0.0, 0.0]
    assert logged(trainer, "gradient_snr/num_prompts") == [16, 16]
    assert logged(trainer, "gradient_snr/noise_per_rollout") == logged(trainer, "gradient_snr/noise")
    assert logged(trainer, "baseline/prior_strength") == [16.0, 16.0]  # every strength is the same baseline


def test_the_noise_per_rollout_is_the_group_size_times_that_of_a_prompts_gradient(tmp_path):
    trainer = train(OBLRPOTrainer, OBLRPOConfig, tmp_path, **(ALONE | {"num_generations": 4, "max_steps": 1}))
    (noise,) = logged(trainer, "gradient_snr/noise")
    assert logged(trainer, "gradient_snr/noise_per_rollout") == [4 * noise]


def test_batch_scaling_divides_by_the_deviation_of_all_rewards(tmp_path):
    options = {"scale_rewards": "batch", "score_method": "exact", "max_steps": 1}
    (batch,) = train(Recording, OBLRPOConfig, tmp_path, **(ALONE | options)).batches
    expected = oracle_advantages(batch) / (nanstd(batch["rewards"]) + 1e-4)
    torch.testing.assert_close(batch["advantages"], expected, rtol=1e-4, atol=1e-6)


def test_micro_batches_and_steps_on_the_same_rollouts_change_no_advantage(tmp_path):
    def advantages(name, **options):
        trainer = train(Recording, OBLRPOConfig, tmp_path / name, **(ALONE | {"max_steps": 1} | options))
        return trainer.batches[0]["advantages"]

    whole = advantages("whole")
    variants = {
        "one by one": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 16},
        "two steps, twice": {"per_device_train_batch_size": 8, "steps_per_generation": 2, "num_iterations": 2},
    }
    for name, options in variants.items():
        torch.testing.assert_close(advantages(name, **options), whole, rtol=1e-4, atol=1e-5)


def none_but_the_first(completions, **kwargs):
    return [*digit_reward(completions[:1]), *[None] * (len(completions) - 1)]


def all_but_two(completions, **kwargs):
    return [None, *digit_reward(completions)[1:-1], None]


def test_unscorable_completions_leave_the_baselines_of_the_others(tmp_path):
    trainer = train(Recording, OBLRPOConfig, tmp_path, reward=all_but_two, score_method="exact", **ALONE)
    for batch in trainer.batches:
        expected = oracle_advantages(batch).nan_to_num(nan=0.0)
        assert expected[[0, -1]].tolist() == [0.0, 0.0]
        torch.testing.assert_close(batch["advantages"], expected, rtol=1e-4, atol=1e-6)
    assert logged(trainer, "gradient_snr/num_prompts") == [14, 14]
    assert logged(trainer, "advantage/live_fraction") == [1.0, 1.0]


def test_a_completion_that_is_the_only_scored_one_has_no_baseline_and_no_advantage(tmp_path):
    options = ALONE | {"max_steps": 1, "reward": none_but_the_first}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = train(Recording, OBLRPOConfig, tmp_path, **options)
    assert any("fewer than two prompts" in str(warning.message) for warning in caught)
    assert trainer.batches[0]["advantages"].tolist() == [0.0] * 16
    assert logged(trainer, "grad_norm") == [0.0]
    assert logged(trainer, "advantage/live_fraction") == [0.0]


@pytest.mark.parametrize("num_generations_eval", [None, 2, 4])
def test_evaluation_takes_groups_of_its_own(tmp_path, num_generations_eval):
    options = ALONE | {"num_generations_eval": num_generations_eval, "per_device_eval_batch_size": 8}
    trainer = construct(OBLRPOTrainer, OBLRPOConfig, tmp_path, **options)
    metrics = trainer.evaluate(trainer.train_dataset.select(range(4)))
    assert 0 <= metrics["eval_reward"] <= 1
    assert trainer.num_generations_eval == (num_generations_eval or 1)
    assert math.isfinite(metrics["eval_loss"])


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path):
    # Checkpoint 4 lies between two steps on the same rollouts, and in the second epoch: 48 of the 64 prompts make a batch.
    options = ALONE | {"steps_per_generation": 3, "max_steps": 7, "save_strategy": "steps", "save_steps": 4}
    options["lr_adaptation"] = "trust_region"
    whole = train(OBLRPOTrainer, OBLRPOConfig, tmp_path / "whole", **options)
    checkpoint = str(tmp_path / "whole" / "checkpoint-4")
    resumed = train(OBLRPOTrainer, OBLRPOConfig, tmp_path / "resumed", resume_from_checkpoint=checkpoint, **options)
    assert all(torch.equal(a, b) for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True))
    for name in set(METRICS) - {"score/pass_time"}:
        assert logged(resumed, name) == logged(whole, name), name
    assert algorithm_state(resumed) == algorithm_state(whole)


def test_the_start_line_and_the_model_card_say_one_completion(tmp_path, caplog):
    trainer = construct(OBLRPOTrainer, OBLRPOConfig, tmp_path, **ALONE)
    trainer.create_optimizer_and_scheduler(2)
    assert "16 prompts x 1 completion per optimizer step" in caplog.text
    trainer.create_model_card()
    assert "| prompts x completions per optimizer step | 16 x 1 |" in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize("num_generations", [1, 2])
def test_a_training_set_without_a_full_generation_batch_is_refused(tmp_path, num_generations):
    """TRL leaves it out, trains no step and exits well. There are 64 prompts."""
    size = {"num_generations": num_generations, "per_device_train_batch_size": 65 * num_generations}
    trainer = construct(OBLRPOTrainer, OBLRPOConfig, tmp_path, **size)
    with pytest.raises(
        ValueError, match=rf"64 prompts, but a generation batch takes 65 x {num_generations}.*Remedy: lower"
    ):
        trainer.train()


def test_trl_itself_still_refuses_one_completion_per_prompt(tmp_path):
    """Once it does not, the configuration needs no way around it."""
    with pytest.raises(ValueError, match="at least 2 generations"):
        GRPOConfig(str(tmp_path), num_generations=1, use_cpu=True, bf16=False)
