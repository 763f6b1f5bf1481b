"""The learning rate that the trainer applies: start, several batches or steps, callbacks, a second `train`, resuming."""

import logging
import math
import warnings

import pytest
import torch
from transformers import TrainerCallback

from oblr_trl import OBLRPOConfig, OBLRPOTrainer
from oblr_trl.gradient_snr import gradient_moments, per_prompt_gradients, rho
from tests.recording import Recording, RecordingSGD, head_gradients, oracle_scores
from tests.test_trainer import some_unscorable
from tests.tiny_models import digit_reward, logged, prompts, tiny_model, train

PAPER = {"snr_ema_decay": 0.0, "snr_min_multiplier": 0.0}
# Two generation batches of 4 prompts in every optimizer step.
POOLED = {"per_device_train_batch_size": 16, "gradient_accumulation_steps": 4, "steps_per_generation": 2}
# Two optimizer steps on every generation batch of 4 prompts.
SHARED = {"per_device_train_batch_size": 16, "steps_per_generation": 2}


def test_the_logged_multiplier_is_the_applied_one_where_a_step_has_several_batches(tmp_path):
    model = tiny_model(num_layers=2)
    optimizer = RecordingSGD(model.parameters(), lr=0.05)
    options = {"optimizers": (optimizer, None), "lr_scheduler_type": "constant", **POOLED}
    trainer = train(OBLRPOTrainer, OBLRPOConfig, tmp_path, model=model, **options)
    multipliers = logged(trainer, "lr_multiplier")
    assert optimizer.rates == pytest.approx([0.05 * multiplier for multiplier in multipliers], rel=1e-9)
    assert [max(ratio, 0.05) for ratio in logged(trainer, "gradient_snr/rho")] == multipliers
    assert logged(trainer, "gradient_snr/num_prompts") == [8, 8, 8]


@pytest.mark.parametrize("loss_type", ["dapo", "cispo", "vespo", "dr_grpo"])
def test_pooled_batches_count_as_the_loss_divides_them(tmp_path, loss_type):
    """`dapo`, `cispo` and `vespo` divide by the tokens of a generation batch, so that one of short completions counts more."""
    model = tiny_model("qwen3_untied", num_layers=2)
    optimizer = RecordingSGD(model.parameters(), lr=0.05)
    start = model.lm_head.weight.detach().clone()
    options = PAPER | POOLED | {"score_scope": "lm_head", "max_grad_norm": 0.0, "lr_scheduler_type": "constant"}
    options |= {"loss_type": loss_type, "optimizers": (optimizer, None), "max_steps": 1}
    trainer = train(Recording, OBLRPOConfig, tmp_path, model=model, **options)
    tokens = [batch["completion_mask"].sum().item() for batch in trainer.batches]
    assert tokens[0] != tokens[1]
    pooled = [head_gradients([batch], "qwen3_untied") for batch in trainer.batches]
    if loss_type != "dr_grpo":
        pooled = [gradients / count for gradients, count in zip(pooled, tokens, strict=True)]
    gradients = torch.cat(pooled)
    # That this is the gradient which was stepped along is seen from the step itself.
    step = (model.lm_head.weight.detach() - start).flatten()
    assert torch.cosine_similarity(step, gradients.mean(dim=0), dim=0) == pytest.approx(1.0, abs=1e-5)
    expected = rho(*gradient_moments(gradients), gradients.size(0))
    assert logged(trainer, "lr_multiplier") == pytest.approx([expected], rel=1e-4)


def test_a_rate_set_by_a_callback_is_applied_multiplied(tmp_path):
    class HalfWay(TrainerCallback):
        def on_step_begin(self, args, state, control, optimizer=None, **kwargs):
            if state.global_step == 1:
                for group in optimizer.param_groups:
                    group["lr"] = 0.7

    model = tiny_model(num_layers=2)
    optimizer = RecordingSGD(model.parameters(), lr=0.05)
    options = {"optimizers": (optimizer, None), "callbacks": [HalfWay()], "lr_scheduler_type": "constant"}
    trainer = train(OBLRPOTrainer, OBLRPOConfig, tmp_path, model=model, **options)
    multipliers = logged(trainer, "lr_multiplier")
    assert optimizer.rates == pytest.approx([lr * m for lr, m in zip((0.05, 0.7, 0.05), multipliers, strict=True)])


def test_a_second_train_in_the_middle_of_a_rollout_keeps_its_multiplier(tmp_path):
    trainer = train(Recording, OBLRPOConfig, tmp_path, max_steps=1, lr_scheduler_type="constant", **PAPER, **SHARED)
    (multiplier,) = logged(trainer, "lr_multiplier")
    assert 0 < multiplier < 1
    trainer.train()
    assert len(trainer.batches) == 1  # the second half of the first call's rollouts
    assert logged(trainer, "learning_rate") == pytest.approx([1e-3 * multiplier])


def test_while_no_two_prompts_can_be_scored_the_multiplier_is_the_minimum(tmp_path):
    def first_group(completions, **kwargs):
        return [reward if i < 8 else None for i, reward in enumerate(digit_reward(completions))]

    with pytest.warns(UserWarning, match="fewer than two prompts of a step could be scored"):
        trainer = train(Recording, OBLRPOConfig, tmp_path, reward=first_group)
    assert all((batch["advantages"] != 0).any() for batch in trainer.batches)
    assert logged(trainer, "lr_multiplier") == [0.05] * 3
    assert logged(trainer, "gradient_snr/num_prompts") == [1] * 3


def test_the_start_line_says_what_will_happen(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger="oblr_trl"):
        train(OBLRPOTrainer, OBLRPOConfig, tmp_path / "snr", max_steps=1)
        train(OBLRPOTrainer, OBLRPOConfig, tmp_path / "none", max_steps=1, lr_adaptation="none")
    snr, none = (record.message for record in caplog.records if "per optimizer step" in record.message)
    assert "4 prompts x 8 completions per optimizer step" in snr
    assert "(from 0.001) x rho, 0.05 to 1 times it and 0.05 while rho is unknown" in snr
    assert none.endswith("(from 0.001) alone, as in GRPOTrainer.")


@pytest.mark.parametrize("lr_adaptation", ["snr", "none"])
def test_a_changed_learning_rate_holds_from_the_checkpoint_on(tmp_path, caplog, lr_adaptation):
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "lr_adaptation": lr_adaptation}
    whole = train(OBLRPOTrainer, OBLRPOConfig, tmp_path / "whole", **options)
    checkpoint = str(tmp_path / "whole" / "checkpoint-2")
    with caplog.at_level(logging.WARNING, logger="oblr_trl"):
        changed = options | {"learning_rate": 1e-4, "resume_from_checkpoint": checkpoint}
        resumed = train(OBLRPOTrainer, OBLRPOConfig, tmp_path / "resumed", **changed)
    before, after = logged(whole, "learning_rate"), logged(resumed, "learning_rate")
    assert after[:2] == before[:2]
    # Step 3 has the same batch at the same weights, hence the same multiplier: a tenth of the rate at the same place of the schedule.
    assert after[2] == pytest.approx(before[2] / 10)
    assert after[3] < after[2]
    assert "initial learning rates [0.0001, 0.0001], not the checkpoint's [0.001, 0.001]" in caplog.text


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("score_scope", {"score_scope": "lm_head"}),
        ("loss_type", {"loss_type": "grpo"}),
        ("scale_rewards", {"scale_rewards": "batch"}),
        ("temperature", {"temperature": 0.7}),
        ("num_generations", {"num_generations": 4}),
        ("baseline_leave_one_out", {"baseline_leave_one_out": False}),
    ],
)
def test_averages_in_another_unit_are_not_resumed(tmp_path_factory, name, options):
    folder = tmp_path_factory.getbasetemp() / "averages"
    saving = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    if not folder.exists():
        train(OBLRPOTrainer, OBLRPOConfig, folder, **saving)
    resume = saving | options | {"resume_from_checkpoint": str(folder / "checkpoint-1")}
    with pytest.raises(ValueError, match=f"written with {name}="):
        train(OBLRPOTrainer, OBLRPOConfig, folder.with_name("other"), **resume)


@pytest.mark.parametrize(
    "baseline",
    [{"baseline": "leave_one_out"}, {"baseline_prior_strength": 16.0, "baseline_memory_size": 0}],
    ids=["leave_one_out", "fixed_prior"],
)
def test_without_averages_the_loss_may_change_on_resume(tmp_path, baseline):
    plain = {"lr_adaptation": "none", "save_strategy": "steps", "save_steps": 1, **baseline}
    train(OBLRPOTrainer, OBLRPOConfig, tmp_path, max_steps=1, **plain)
    checkpoint = str(tmp_path / "checkpoint-1")
    changed = plain | {"loss_type": "dapo", "temperature": 0.9}
    resumed = train(
        OBLRPOTrainer, OBLRPOConfig, tmp_path / "b", max_steps=2, **changed, resume_from_checkpoint=checkpoint
    )
    assert resumed.state.global_step == 2


def test_a_memory_in_another_unit_is_not_resumed(tmp_path):
    plain = {"lr_adaptation": "none", "baseline_prior_strength": 16.0, "save_strategy": "steps", "save_steps": 1}
    train(OBLRPOTrainer, OBLRPOConfig, tmp_path, max_steps=1, **plain)
    changed = plain | {"reward_weights": [100.0], "resume_from_checkpoint": str(tmp_path / "checkpoint-1")}
    with pytest.raises(ValueError, match="written with reward_weights=None"):
        train(OBLRPOTrainer, OBLRPOConfig, tmp_path / "b", max_steps=2, **changed)


def test_the_snr_of_the_group_mean_leaves_missing_rewards_out(tmp_path):
    def reward(completions, **kwargs):
        return some_unscorable(completions)

    trainer = train(
        Recording, OBLRPOConfig, tmp_path, reward=reward, baseline="group_mean", score_scope="lm_head", **PAPER
    )
    for batch, noise in zip(trainer.batches, logged(trainer, "gradient_snr/noise"), strict=True):
        rewards = batch["rewards"]
        advantages = batch["advantages"].view_as(rewards).masked_fill(rewards.isnan(), math.nan)
        gradients = per_prompt_gradients(oracle_scores(batch, scope="lm_head"), advantages)
        assert gradients.size(0) == 3  # the group without any reward is no prompt
        assert noise == pytest.approx(gradient_moments(gradients).noise, rel=1e-3)


def test_equal_rewards_tell_the_snr_of_the_group_mean_nothing(tmp_path):
    """In float32 the mean of eight 0.01 is not 0.01."""
    assert torch.full((8,), 0.01).mean() != 0.01
    trainer = train(
        OBLRPOTrainer,
        OBLRPOConfig,
        tmp_path,
        reward=lambda completions, **kwargs: [None] + [0.01] * (len(completions) - 1),
        baseline="group_mean",
    )
    assert logged(trainer, "lr_multiplier") == [0.05] * 3
    assert trainer._gradient_snr.averages.state_dict()["weight"] == 0


class OnSecondProcess(OBLRPOTrainer):
    """Writes advantages as the second of two processes would."""

    def _write_advantages(self, output, advantages):
        half = {"advantages": output["advantages"][16:]}
        self.accelerator.state._shared_state["process_index"] = 1
        try:
            super()._write_advantages(half, advantages)
        finally:
            self.accelerator.state._shared_state["process_index"] = 0
        self.written, self.all_advantages = half["advantages"], advantages
        super()._write_advantages(output, advantages)


def test_every_process_keeps_its_own_slice_of_the_advantages(tmp_path):
    trainer = train(OnSecondProcess, OBLRPOConfig, tmp_path, max_steps=1)
    assert torch.equal(trainer.written, trainer.all_advantages[16:])
    assert not torch.equal(trainer.written, trainer.all_advantages[:16])


@pytest.mark.parametrize("options", [SHARED, {"num_iterations": 2}], ids=str)
def test_a_rate_set_by_a_callback_is_multiplied_also_in_a_step_on_old_rollouts(tmp_path, options):
    class Everywhere(TrainerCallback):
        def on_step_begin(self, args, state, control, optimizer=None, **kwargs):
            for group in optimizer.param_groups:
                group["lr"] = 0.7

    model = tiny_model(num_layers=2)
    optimizer = RecordingSGD(model.parameters(), lr=0.05)
    options = options | {"optimizers": (optimizer, None), "callbacks": [Everywhere()], "max_steps": 4}
    trainer = train(OBLRPOTrainer, OBLRPOConfig, tmp_path, model=model, **options)
    first, second = logged(trainer, "lr_multiplier")  # one per generation batch of two steps
    assert optimizer.rates == pytest.approx([0.7 * first, 0.7 * first, 0.7 * second, 0.7 * second])


@pytest.mark.parametrize("schedule", ["reduce_lr_on_plateau", "greedy"])
def test_a_schedule_of_the_evaluations_is_resumed_after_it_changed_the_rate(tmp_path, schedule):
    class Evaluated(OBLRPOTrainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, eval_dataset=prompts().select(range(2)), **kwargs)

    options = {
        "lr_adaptation": "none",
        "baseline": "group_mean",
        "lr_scheduler_type": schedule,
        # Never better by so much: the rate falls with every evaluation but the first.
        "lr_scheduler_kwargs": {"patience": 0, "factor": 0.5, "mode": "max", "threshold": 1e9},
        "eval_strategy": "steps",
        "eval_steps": 1,
        "per_device_eval_batch_size": 8,
        "metric_for_best_model": "reward",
        "max_steps": 4,
        "save_strategy": "steps",
        "save_steps": 1,
    }
    if schedule == "greedy":
        options["lr_scheduler_kwargs"] |= {"min_lr": 1e-6, "threshold_mode": "abs"}
    whole = train(Evaluated, OBLRPOConfig, tmp_path / "whole", **options)
    checkpoint = str(tmp_path / "whole" / "checkpoint-3")
    resumed = train(Evaluated, OBLRPOConfig, tmp_path / "a", **options, resume_from_checkpoint=checkpoint)
    rates = logged(whole, "learning_rate")
    assert rates[3] < rates[0]
    assert logged(resumed, "learning_rate") == rates
    changed = options | {"learning_rate": 1e-4, "resume_from_checkpoint": checkpoint}
    with pytest.raises(ValueError, match="initial learning rates"):
        train(Evaluated, OBLRPOConfig, tmp_path / "b", **changed)


def test_metrics_may_be_logged_in_the_middle_of_a_step(tmp_path):
    class Logging(OBLRPOTrainer):
        def _prepare_inputs(self, generation_batch):
            inputs = super()._prepare_inputs(generation_batch)
            self.log({})  # as a callback in `on_substep_end` may; it empties the metrics
            return inputs

    trainer = train(Logging, OBLRPOConfig, tmp_path, max_steps=1, **POOLED)
    assert logged(trainer, "gradient_snr/num_prompts") == [4, 8]


def test_a_second_train_does_not_pool_its_first_batch_with_that_of_the_first(tmp_path):
    """Both are batches of step 0."""
    trainer = train(OBLRPOTrainer, OBLRPOConfig, tmp_path, max_steps=1)
    assert logged(trainer, "gradient_snr/num_prompts") == [4]
    trainer.train()
    assert logged(trainer, "gradient_snr/num_prompts") == [4]


def test_one_scored_prompt_in_the_first_batch_of_a_step_is_not_warned_of(tmp_path):
    """What counts is the step: its second batch of 4 prompts is scored in full."""
    calls = []

    def reward(completions, **kwargs):
        calls.append(len(completions))
        return [value if i < 8 or len(calls) > 1 else None for i, value in enumerate(digit_reward(completions))]

    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="The completions of fewer than two prompts")
        trainer = train(OBLRPOTrainer, OBLRPOConfig, tmp_path, reward=reward, max_steps=1, **POOLED)
    assert calls == [32, 32]
    assert logged(trainer, "gradient_snr/num_prompts") == [5]


def test_an_optimizer_without_rates_is_refused(tmp_path):
    class Rateless(torch.optim.Optimizer):
        def __init__(self, parameters):
            super().__init__(parameters, {})

    model = tiny_model(num_layers=1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(
        ValueError, match=r"needs an optimizer that steps by the `lr` of its parameter groups.*lr_adaptation='none'"
    ):
        train(OBLRPOTrainer, OBLRPOConfig, tmp_path, model=model, optimizers=(Rateless(model.parameters()), None))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
