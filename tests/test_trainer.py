"""The trainer on the CPU, with the real TRL: equalities with GRPO and RLOO, the learning rate, invariances, metrics."""

import math
from types import SimpleNamespace

import pandas
import pytest
import torch
from trl import GRPOConfig, GRPOTrainer
from trl.trainer.utils import nanstd

from oblr_trl import (
    AutomaticPriorStrength,
    OBLRPOConfig,
    OBLRPOTrainer,
    gradient_weighted_baseline,
    leave_one_out_baseline,
)
from oblr_trl.gradient_snr import gradient_moments, per_prompt_gradients, rho
from oblr_trl.metrics import METRICS
from oblr_trl.scores.score_pass import ScorePass
from tests.recording import Recording, RecordingSGD, head_gradients, oracle_scores
from tests.tiny_models import OF_LAST_STEP, construct, digit_reward, logged, prompts, tiny_model, tiny_tokenizer, train

# rho of a step's own batch, in a unit that the reference shares: the head's parameters fit a sketch without projection.
HEAD = {"score_scope": "lm_head", "snr_ema_decay": 0.0, "snr_min_multiplier": 0.0}


@pytest.mark.parametrize("loss_type", ["dr_grpo", "dapo"])
def test_the_group_mean_without_snr_is_grpo_bit_for_bit(tmp_path, loss_type):
    options = {"loss_type": loss_type, "scale_rewards": "group", "max_steps": 5, "gradient_accumulation_steps": 2}
    options["per_device_train_batch_size"] = 16
    grpo = train(GRPOTrainer, GRPOConfig, tmp_path / "grpo", **options)
    ours = train(
        OBLRPOTrainer, OBLRPOConfig, tmp_path / "ours", baseline="group_mean", lr_adaptation="none", **options
    )
    assert len(logged(grpo, "loss")) == 5
    for name in ("loss", "grad_norm", "learning_rate", "reward"):
        assert logged(grpo, name) == logged(ours, name)
    assert all(torch.equal(a, b) for a, b in zip(grpo.model.parameters(), ours.model.parameters(), strict=True))


def test_leave_one_out_gives_the_advantages_of_rloo(tmp_path):
    trainer = train(Recording, OBLRPOConfig, tmp_path, baseline="leave_one_out", lr_adaptation="none")
    for batch in trainer.batches:
        rewards = batch["rewards"]
        # RLOO: the mean of the others is (8 mean - r) / 7
        expected = rewards - (8 * rewards.mean(dim=1, keepdim=True) - rewards) / 7
        torch.testing.assert_close(batch["advantages"].view_as(rewards), expected)


@pytest.mark.parametrize("scale_rewards", ["group", "batch"])
def test_reward_scaling_divides_by_the_standard_deviation_of_trl(tmp_path, scale_rewards):
    trainer = train(
        Recording, OBLRPOConfig, tmp_path, baseline="leave_one_out", scale_rewards=scale_rewards, max_steps=1
    )
    (batch,) = trainer.batches
    rewards = batch["rewards"]
    std = rewards.std(dim=1, keepdim=True) if scale_rewards == "group" else nanstd(rewards)
    expected = (rewards - leave_one_out_baseline(rewards)) / (std + 1e-4)
    torch.testing.assert_close(batch["advantages"].view_as(rewards), expected)


@pytest.mark.parametrize(
    "options",
    [{}, {"loss_type": "grpo"}, {"temperature": 0.5}, {"baseline_prior_strength": 0.0}],
    ids=["default", "length-normalised", "temperature", "no prior"],
)
def test_the_advantages_are_those_of_the_oracles_full_gradients(tmp_path, options):
    options = {"baseline_prior_strength": 2.0, "score_method": "exact"} | options
    trainer = train(Recording, OBLRPOConfig, tmp_path, **options)
    assert len(trainer.batches) == 3
    for batch in trainer.batches:
        mask = batch["completion_mask"].float()
        token_weights = mask / mask.sum(dim=1, keepdim=True) if options.get("loss_type") == "grpo" else mask
        scores = oracle_scores(batch, token_weights=token_weights, temperature=options.get("temperature", 1.0))
        expected = batch["rewards"] - gradient_weighted_baseline(
            batch["rewards"], scores.square().sum(dim=2), prior_strength=options["baseline_prior_strength"]
        )
        torch.testing.assert_close(batch["advantages"].view_as(expected), expected, rtol=1e-4, atol=1e-6)


def test_the_prior_strength_learns_from_each_batch_after_its_baseline_was_taken(tmp_path):
    trainer = train(Recording, OBLRPOConfig, tmp_path, score_method="exact")
    automatic = AutomaticPriorStrength()
    for batch, strength in zip(trainer.batches, logged(trainer, "baseline/prior_strength"), strict=True):
        assert strength == automatic.value
        automatic.update(batch["rewards"], oracle_scores(batch).square().sum(dim=2))
    learned = trainer._baseline_estimator.automatic.state_dict()
    assert learned["seen"]
    assert learned["variances"] == pytest.approx(automatic.state_dict()["variances"], rel=1e-3)


def test_the_rate_inside_the_optimizers_step_is_the_schedule_times_rho_of_that_steps_batch(tmp_path):
    model = tiny_model(num_layers=2)
    optimizer = RecordingSGD(model.parameters(), lr=0.05)
    batch = {"per_device_train_batch_size": 16, "gradient_accumulation_steps": 4, "max_steps": 5}
    options = HEAD | batch | {"optimizers": (optimizer, None), "lr_scheduler_type": "linear"}
    trainer = train(Recording, OBLRPOConfig, tmp_path, model=model, **options)
    expected = []
    for step, batch in enumerate(trainer.batches):
        gradients = head_gradients([batch])
        expected.append(0.05 * (1 - step / 5) * rho(*gradient_moments(gradients), len(gradients)))
    assert optimizer.rates == pytest.approx(expected, rel=1e-4)
    assert len({round(rate, 9) for rate in optimizer.rates}) == 5  # it moves
    assert logged(trainer, "learning_rate") == pytest.approx(optimizer.rates)


@pytest.mark.parametrize("num_iterations", [1, 2], ids=["a pass of its own", "in place of another forward pass"])
def test_the_scoring_pass_takes_as_many_completions_at_once_as_it_is_told(tmp_path, monkeypatch, num_iterations):
    sizes, score = [], ScorePass.__call__

    def recorded(self, model_inputs, *args):
        sizes.append(len(model_inputs["input_ids"]))
        return score(self, model_inputs, *args)

    monkeypatch.setattr(ScorePass, "__call__", recorded)
    options = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 4, "num_iterations": num_iterations}
    train(Recording, OBLRPOConfig, tmp_path, **options, per_device_score_batch_size=12, max_steps=1)
    assert sizes == [12, 12, 8]


def test_accumulation_checkpointing_and_generation_steps_change_nothing(tmp_path):
    def run(name, **options):
        trainer = train(Recording, OBLRPOConfig, tmp_path / name, **options)
        return (
            [batch["advantages"] for batch in trainer.batches],
            logged(trainer, "gradient_snr/rho"),
            logged(trainer, "learning_rate"),
        )

    reference = run("whole", per_device_train_batch_size=32)
    variants = {
        "accumulated": {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 4},
        "one by one": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 32},
        "without checkpointing": {"gradient_checkpointing": False},
        "scored three at a time": {"per_device_score_batch_size": 3, "per_device_train_batch_size": 32},
        "scored in one chunk": {"per_device_score_batch_size": 64, "per_device_train_batch_size": 4}
        | {"gradient_accumulation_steps": 8},
    }
    for name, options in variants.items():
        advantages, ratios, rates = run(name, **options)
        for a, b in zip(advantages, reference[0], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        assert ratios == pytest.approx(reference[1], rel=1e-4)
        assert rates == pytest.approx(reference[2], rel=1e-4)


def test_several_steps_per_generation_keep_the_multiplier_and_share_the_prompts(tmp_path):
    batch = {"per_device_train_batch_size": 16, "steps_per_generation": 2, "max_steps": 4}
    trainer = train(Recording, OBLRPOConfig, tmp_path, lr_scheduler_type="constant", **HEAD, **batch)
    assert len(trainer.batches) == 2
    rates = logged(trainer, "learning_rate")
    assert rates[0] == rates[1]
    assert rates[2] == rates[3] != rates[0]
    signal, noise = gradient_moments(head_gradients(trainer.batches[:1]))
    # Each step draws 16 of 32 completions: variance tr(H) / 4 of the batch's gradient + sigma^2 (1 / 16 - 1 / 32) of the draw.
    advantages = trainer.batches[0]["advantages"].unsqueeze(1)
    rows = advantages * oracle_scores(trainer.batches[0], scope="lm_head").flatten(0, 1)
    drawn = (rows - rows.mean(dim=0)).square().sum().item() / 31 * (1 / 16 - 1 / 32)
    assert rates[0] == pytest.approx(1e-3 * signal / (signal + noise / 4 + drawn), rel=1e-4)


def test_every_metric_is_logged_and_finite(tmp_path):
    trainer = train(OBLRPOTrainer, OBLRPOConfig, tmp_path, lr_adaptation="trust_region")
    for name in METRICS:
        values = logged(trainer, name)
        assert len(values) == 3, name
        if name in OF_LAST_STEP:
            assert values.pop(0) is None
        assert all(value is not None and not math.isnan(value) for value in values), name
    assert not [name for row in trainer.state.log_history for name in row if name.startswith("eval")]


def test_evaluation_does_no_scoring_pass(tmp_path, monkeypatch):
    trainer = train(OBLRPOTrainer, OBLRPOConfig, tmp_path, max_steps=1, per_device_eval_batch_size=8)
    calls = []
    monkeypatch.setattr(trainer, "_score_pass", lambda *args: calls.append(args))
    before = trainer._gradient_snr.averages.state_dict(), trainer._baseline_estimator.automatic.state_dict()
    metrics = trainer.evaluate(trainer.train_dataset.select(range(4)))
    assert "eval_reward" in metrics
    assert not calls
    assert (trainer._gradient_snr.averages.state_dict(), trainer._baseline_estimator.automatic.state_dict()) == before


def test_an_interrupted_generation_leaves_no_scoring_pass_behind(tmp_path):
    """With vLLM, or several steps on a batch, the parent's forward for the old log-probabilities is the scoring pass."""

    class Interrupted(OBLRPOTrainer):
        def _generate(self, prompts):
            raise KeyboardInterrupt

    trainer = construct(Interrupted, OBLRPOConfig, tmp_path, steps_per_generation=2, per_device_train_batch_size=16)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    ids = torch.ones(2, 6, dtype=torch.long, device=trainer.accelerator.device)
    logps, *_ = trainer._get_per_token_logps_and_entropies(trainer.model, ids, ids, 4)
    assert logps.requires_grad


def test_the_completions_table_shows_the_advantages_that_were_trained_on(tmp_path):
    trainer = train(Recording, OBLRPOConfig, tmp_path, max_steps=2, log_completions=True)
    for step, batch in enumerate(trainer.batches, start=1):
        table = pandas.read_parquet(tmp_path / "completions" / f"completions_{step:05d}.parquet")
        assert table["advantage"].tolist() == pytest.approx(batch["advantages"].tolist())
        assert table["digit_reward"].tolist() == pytest.approx(batch["rewards"].flatten().tolist())


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path):
    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "lr_scheduler_type": "cosine"}
    whole = train(OBLRPOTrainer, OBLRPOConfig, tmp_path / "whole", **options)
    checkpoint = tmp_path / "whole" / "checkpoint-3"
    resumed = train(
        OBLRPOTrainer, OBLRPOConfig, tmp_path / "resumed", **options, resume_from_checkpoint=str(checkpoint)
    )
    for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b)
    for name in METRICS:
        if name != "score/pass_time":
            assert logged(resumed, name) == logged(whole, name), name
    assert resumed._gradient_snr.averages.state_dict() == whole._gradient_snr.averages.state_dict()


def test_foreign_checkpoints_are_refused(tmp_path):
    options = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    plain = {"baseline": "leave_one_out", "lr_adaptation": "none"}
    train(OBLRPOTrainer, OBLRPOConfig, tmp_path / "rloo", **plain, **options)
    checkpoint = str(tmp_path / "rloo" / "checkpoint-1")
    changed = plain | {"baseline": "gradient_weighted"}
    with pytest.raises(ValueError, match="written with baseline='leave_one_out'"):
        train(OBLRPOTrainer, OBLRPOConfig, tmp_path / "b", **changed, **options, resume_from_checkpoint=checkpoint)
    changed = plain | {"lr_adaptation": "trust_region"}
    with pytest.raises(ValueError, match="written with lr_adaptation='none' but this run has 'trust_region'"):
        train(OBLRPOTrainer, OBLRPOConfig, tmp_path / "c", **changed, **options, resume_from_checkpoint=checkpoint)


def some_unscorable(completions, **kwargs):
    """None for every fifth completion and for the whole second group."""
    return [None if i % 5 == 0 or 8 <= i < 16 else reward for i, reward in enumerate(digit_reward(completions))]


@pytest.mark.parametrize("missing", [None, math.nan])
def test_unscorable_completions_are_left_out_and_get_no_advantage(tmp_path, missing):
    def reward(completions, **kwargs):
        return [missing if value is None else value for value in some_unscorable(completions)]

    options = {"score_method": "exact", "baseline_prior_strength": 1.0, "score_scope": "lm_head", "snr_ema_decay": 0.0}
    trainer = train(Recording, OBLRPOConfig, tmp_path, reward=reward, **options)
    moments = zip(logged(trainer, "gradient_snr/signal"), logged(trainer, "gradient_snr/noise"), strict=True)
    for batch, logged_moments in zip(trainer.batches, moments, strict=True):
        rewards = batch["rewards"]
        advantages = batch["advantages"].view_as(rewards)
        assert (advantages[rewards.isnan()] == 0).all()
        assert rewards.isnan().sum() == 7 - 2 + 8  # every fifth of 32, of which 2 lie in the dead group of 8
        scores = oracle_scores(batch, scope="lm_head")
        expected = rewards - gradient_weighted_baseline(rewards, scores.square().sum(dim=2), prior_strength=1.0)
        torch.testing.assert_close(advantages[~rewards.isnan()], expected[~rewards.isnan()], rtol=1e-4, atol=1e-6)
        gradients = per_prompt_gradients(scores, expected)
        assert gradients.size(0) == 3  # the dead group is no prompt
        assert logged_moments == pytest.approx(tuple(gradient_moments(gradients)), rel=1e-3)


def test_equal_rewards_are_real_samples(tmp_path):
    """With a prior, a group of equal rewards still has advantages; without one it counts as a zero gradient."""

    def by_prompt(prompts, **kwargs):
        return [float(prompt[0]) for prompt in prompts]

    with_prior = train(Recording, OBLRPOConfig, tmp_path / "prior", reward=by_prompt, max_steps=1)
    assert (with_prior.batches[0]["advantages"] != 0).any()
    without = train(
        Recording, OBLRPOConfig, tmp_path / "none", reward=by_prompt, baseline_prior_strength=0.0, max_steps=2
    )
    assert without.batches[0]["advantages"].abs().max() < 1e-6
    # no signal and no noise: nothing is known, and the multiplier stays where it starts
    assert logged(without, "gradient_snr/rho") == [None, None]
    assert logged(without, "lr_multiplier") == [0.05, 0.05]


def test_all_completions_unscorable_is_a_step_without_gradient(tmp_path):
    with pytest.warns(UserWarning, match="fewer than two prompts of a step could be scored"):
        trainer = train(
            Recording, OBLRPOConfig, tmp_path, reward=lambda completions, **kwargs: [None] * len(completions)
        )
    assert all((batch["advantages"] == 0).all() for batch in trainer.batches)
    assert logged(trainer, "gradient_snr/rho") == [None] * 3
    assert logged(trainer, "lr_multiplier") == [0.05] * 3


def test_truncated_completions_that_are_masked_have_no_score(tmp_path):
    trainer = train(
        Recording, OBLRPOConfig, tmp_path, mask_truncated_completions=True, max_completion_length=2, max_steps=2
    )
    for batch in trainer.batches:
        assert (batch["completion_mask"].sum(dim=1) == 0).any()
        assert batch["advantages"].isfinite().all()


def test_infinite_rewards_and_wrong_numbers_of_rewards_are_refused(tmp_path):
    def infinite(completions, **kwargs):
        return [math.inf] + [0.0] * (len(completions) - 1)

    with pytest.raises(ValueError, match=r"\['infinite'\] returned an infinite reward"):
        train(OBLRPOTrainer, OBLRPOConfig, tmp_path, reward=infinite)
    with pytest.raises(ValueError, match="returned 1 rewards, but 32 were expected"):
        train(OBLRPOTrainer, OBLRPOConfig, tmp_path, reward=lambda completions, **kwargs: [0.0])


def test_reward_functions_are_summed_with_their_weights(tmp_path):
    def one(completions, **kwargs):
        return [1.0 if i % 2 else None for i in range(len(completions))]

    options = {"reward_weights": [2.0, 0.5], "baseline": "leave_one_out", "max_steps": 1}
    trainer = train(Recording, OBLRPOConfig, tmp_path, reward=[digit_reward, one], **options)
    rewards = (2 * trainer.last_rewards[:, 0] + 0.5 * trainer.last_rewards[:, 1].nan_to_num()).view(-1, 8)
    expected = rewards - leave_one_out_baseline(rewards)
    torch.testing.assert_close(trainer.batches[0]["advantages"].view_as(rewards), expected)


def test_a_grpo_config_is_refused_with_the_remedy(tmp_path):
    with pytest.raises(ValueError, match="must be an `OBLRPOConfig`, got a `GRPOConfig`"):
        train(OBLRPOTrainer, GRPOConfig, tmp_path)


def test_layers_without_a_rule_fail_before_any_work(tmp_path):
    model = tiny_model(num_layers=2)
    model.model.layers[0].mlp.up_proj = torch.nn.Bilinear(2, 2, 2)
    with pytest.raises(ValueError, match=r"No score rule covers .*Bilinear"):
        train(OBLRPOTrainer, OBLRPOConfig, tmp_path, model=model, score_scope="all")


def test_arguments_may_be_positional_as_in_trl(tmp_path):
    args = OBLRPOConfig(str(tmp_path), per_device_train_batch_size=32, use_cpu=True, bf16=False, report_to="none")
    trainer = OBLRPOTrainer(tiny_model(), digit_reward, args, prompts(), processing_class=tiny_tokenizer())
    assert len(trainer.train_dataset) == 64


def test_fsdp_1_is_refused_with_the_remedy(tmp_path, monkeypatch):
    class UnderFSDP(OBLRPOTrainer):
        def create_accelerator_and_postprocess(self):
            super().create_accelerator_and_postprocess()
            self.is_fsdp_enabled = True
            monkeypatch.setattr(self.accelerator.state, "fsdp_plugin", SimpleNamespace(fsdp_version=1), raising=False)

    with pytest.raises(ValueError, match=r"which FSDP 1 flattens\. Remedy: set fsdp_version: 2"):
        train(UnderFSDP, OBLRPOConfig, tmp_path)


def test_a_scheduler_that_cannot_be_wrapped_is_refused_with_the_remedy(tmp_path):
    class EngineScheduler:
        """As DeepSpeed's own, not one of torch."""

    model = tiny_model(num_layers=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"cannot wrap a `EngineScheduler`\. Remedy: remove the scheduler"):
        train(OBLRPOTrainer, OBLRPOConfig, tmp_path, model=model, optimizers=(optimizer, EngineScheduler()))
