"""The rate differs by the SNR multiplier alone: so do the steps of one's own optimizer and schedule, and what callbacks read."""

import pytest
import torch
from transformers import TrainerCallback
from trl import GRPOTrainer

from oblr_trl import OBLRPOTrainer
from tests.drop_in.expected_advantages import assert_advantages
from tests.drop_in.scripts import G, both_trainers, run
from tests.recording import RecordingSGD
from tests.tiny_models import logged, tiny_model


class Watching(TrainerCallback):
    """Reads what a callback may: the state, the optimizer and the schedule, at the moment of each step."""

    def __init__(self):
        self.steps, self.rates, self.rewards = [], [], []

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, lr_scheduler=None, **kwargs):
        self.steps.append(state.global_step)
        self.rates.append((optimizer.param_groups[0]["lr"], lr_scheduler.get_last_lr()[0]))

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "reward" in logs:
            self.rewards.append((logs["reward"], logs["learning_rate"]))


@both_trainers
@pytest.mark.parametrize("own_schedule", [False, True], ids=["trainer's schedule", "own schedule"])
def test_an_optimizer_of_ones_own_steps_at_the_schedule_times_the_multiplier(tmp_path, trainer_class, own_schedule):
    model = tiny_model(num_layers=2)
    head, body = [model.lm_head.weight], [p for p in model.parameters() if p is not model.lm_head.weight]
    optimizer = RecordingSGD([{"params": head, "lr": 0.02}, {"params": body, "lr": 0.01}])
    shape = [1.0, 0.5, 0.25] if own_schedule else [1.0, 2 / 3, 1 / 3]
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step) if own_schedule else None
    watching = Watching()
    parameters = list(model.parameters())
    deltas = []

    class Deltas(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            self.before = [p.detach().clone() for p in parameters]

        def on_step_end(self, *args, **kwargs):
            deltas.append([p.detach() - b for p, b in zip(parameters, self.before, strict=True)])

    trainer = run(
        trainer_class,
        tmp_path,
        trainer={"model": model, "optimizers": (optimizer, schedule), "callbacks": [watching, Deltas]},
        max_steps=3,
        max_grad_norm=0.0,  # no clipping: the step is rate x gradient
        lr_scheduler_type="linear",
    )
    multipliers = logged(trainer, "lr_multiplier") or [1.0] * 3
    expected = [multiplier * share for multiplier, share in zip(multipliers, shape, strict=True)]
    assert optimizer.used == [pytest.approx([0.02 * x, 0.01 * x]) for x in expected]
    assert (trainer_class is GRPOTrainer) == (multipliers == [1.0] * 3)
    assert watching.steps == [0, 1, 2]
    assert watching.rates == [pytest.approx((0.02 * x, 0.02 * x)) for x in expected]
    assert [rate for _, rate in watching.rewards] == pytest.approx([0.02 * x for x in expected])
    assert [reward for reward, _ in watching.rewards] == logged(trainer, "reward")
    # What the rate did: the step is as long as rate x gradient, the head (tied, the first parameter) at twice the rate.
    for step, (delta, x) in enumerate(zip(deltas, expected, strict=True)):
        is_head = [p is model.lm_head.weight for p in parameters]
        gradients = [d / (x * (0.02 if h else 0.01)) for d, h in zip(delta, is_head, strict=True)]
        norm = torch.cat([g.flatten() for g in gradients]).norm().item()
        assert norm == pytest.approx(logged(trainer, "grad_norm")[step], rel=1e-2)


@both_trainers
def test_a_callback_may_read_the_base_rates_of_the_schedule(tmp_path, trainer_class):
    seen = []

    class BaseRates(TrainerCallback):
        def on_step_end(self, args, state, control, lr_scheduler=None, **kwargs):
            seen.append(lr_scheduler.base_lrs)

    run(trainer_class, tmp_path, trainer={"callbacks": [BaseRates()]}, max_steps=1)
    assert seen == [[1e-3, 1e-3]]  # with and without weight decay


def test_a_plateau_schedule_of_ones_own_is_refused_with_the_remedy(tmp_path):
    model = tiny_model(num_layers=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
    with pytest.raises(ValueError, match=r"ReduceLROnPlateau.*Remedy"):
        run(OBLRPOTrainer, tmp_path, trainer={"model": model, "optimizers": (optimizer, schedule)})


@both_trainers
def test_several_iterations_and_steps_share_a_generated_batch(tmp_path, trainer_class):
    """Two slices of each batch, two passes over it: eight steps, two batches."""
    trainer = run(
        trainer_class,
        tmp_path,
        per_device_train_batch_size=2 * G,
        steps_per_generation=2,
        num_iterations=2,
        max_steps=8,
        lr_scheduler_type="constant",
    )
    assert len(trainer.batches) == 2
    assert_advantages(trainer)
    multipliers = [1.0, 1.0]
    if trainer_class is OBLRPOTrainer:
        multipliers = [max(ratio, 0.05) for ratio in logged(trainer, "gradient_snr/rho")]  # once per batch
    assert logged(trainer, "learning_rate") == pytest.approx(
        [1e-3 * multiplier for multiplier in multipliers for _ in range(4)]
    )


def test_iterations_that_straddle_a_step_are_refused(tmp_path):
    """Batches of three micro-batches under steps of two: the second step would mix two batches' SNR."""
    with pytest.raises(ValueError, match="num_iterations"):
        run(OBLRPOTrainer, tmp_path, num_iterations=3, gradient_accumulation_steps=2, steps_per_generation=1)
