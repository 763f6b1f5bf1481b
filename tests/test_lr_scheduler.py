import io
import math

import pytest
import torch
from torch.optim.lr_scheduler import CosineAnnealingLR, ExponentialLR, LambdaLR, LRScheduler
from transformers.optimization import Adafactor

from oblr_trl.lr_scheduler import SNRScheduler, check_steerable, initial_lrs, restore_initial_lrs

SCHEDULES = {
    "lambda": lambda optimizer: LambdaLR(optimizer, lambda step: 1 / (1 + step)),
    "exponential": lambda optimizer: ExponentialLR(optimizer, 0.9),
    "cosine": lambda optimizer: CosineAnnealingLR(optimizer, T_max=7),
}


def optimizer(lrs=(0.1, 0.02)):
    return torch.optim.SGD([{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": lr} for lr in lrs])


def rates(opt):
    return [group["lr"] for group in opt.param_groups]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_rate_is_the_schedule_times_the_clamped_ratio_of_the_same_step(schedule):
    plain_optimizer, wrapped_optimizer = optimizer(), optimizer()
    plain = SCHEDULES[schedule](plain_optimizer)
    wrapped = SNRScheduler(SCHEDULES[schedule](wrapped_optimizer), min_multiplier=0.05, max_multiplier=0.9)
    assert isinstance(wrapped, LRScheduler)
    for ratio, multiplier in ((0.5, 0.5), (0.0, 0.05), (1.0, 0.9), (0.3, 0.3), (0.07, 0.07)):
        assert wrapped.set_rho(ratio) == multiplier
        assert rates(wrapped_optimizer) == pytest.approx([multiplier * lr for lr in rates(plain_optimizer)])
        assert wrapped.get_last_lr() == rates(wrapped_optimizer)
        for opt, scheduler in ((plain_optimizer, plain), (wrapped_optimizer, wrapped)):
            opt.step()
            scheduler.step()
        assert wrapped.last_epoch == plain.last_epoch


def test_while_the_ratio_is_unknown_the_multiplier_is_the_minimum():
    opt = optimizer()
    scheduler = SNRScheduler(SCHEDULES["lambda"](opt), min_multiplier=0.05)
    assert scheduler.multiplier == 0.05
    assert rates(opt) == pytest.approx([0.005, 0.001])
    opt.step()
    scheduler.step()
    assert rates(opt) == pytest.approx([0.0025, 0.0005])


def test_a_unit_multiplier_is_the_wrapped_schedule():
    opt = optimizer()
    scheduler = SNRScheduler(SCHEDULES["lambda"](opt), min_multiplier=1.0)
    assert rates(opt) == [0.1, 0.02]
    opt.step()
    scheduler.step()
    assert rates(opt) == pytest.approx([0.05, 0.01])


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_resumed_scheduler_equals_an_uninterrupted_one(schedule):
    def run(opt, scheduler, ratios):
        out = []
        for ratio in ratios:
            scheduler.set_rho(ratio)
            out.append(rates(opt))
            opt.step()
            scheduler.step()
        return out

    ratios = [0.9, 0.2, 0.5, 0.1, 0.7]
    whole_optimizer = optimizer()
    whole = run(whole_optimizer, SNRScheduler(SCHEDULES[schedule](whole_optimizer)), ratios)
    first_optimizer = optimizer()
    first = SNRScheduler(SCHEDULES[schedule](first_optimizer))
    run(first_optimizer, first, ratios[:2])
    buffer = io.BytesIO()
    torch.save({"optimizer": first_optimizer.state_dict(), "scheduler": first.state_dict()}, buffer)
    buffer.seek(0)
    state = torch.load(buffer, weights_only=True)  # as transformers.Trainer loads it
    second_optimizer = optimizer()
    second = SNRScheduler(SCHEDULES[schedule](second_optimizer))
    second_optimizer.load_state_dict(state["optimizer"])
    second.load_state_dict(state["scheduler"])
    assert second.multiplier == 0.2
    assert rates(second_optimizer) == rates(first_optimizer)
    assert run(second_optimizer, second, ratios[2:]) == whole[2:]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_rate_of_somebody_else_takes_the_place_of_the_scheduled_one(schedule):
    """Until the schedule's next step, or, where that continues from the rate that is there, from then on."""
    plain_optimizer, wrapped_optimizer = optimizer(), optimizer()
    plain = SCHEDULES[schedule](plain_optimizer)
    wrapped = SNRScheduler(SCHEDULES[schedule](wrapped_optimizer), min_multiplier=0.05)
    for step, ratio in enumerate((0.5, 0.4, 0.3, 0.2)):
        for opt in (plain_optimizer, wrapped_optimizer):
            if step == 1:  # as a callback does in `on_step_begin`
                opt.param_groups[1]["lr"] = 0.7
        wrapped.set_rho(ratio)
        wrapped.set_rho(ratio)  # a second batch of the step does not multiply it again
        assert rates(wrapped_optimizer) == pytest.approx([ratio * lr for lr in rates(plain_optimizer)])
        for opt, scheduler in ((plain_optimizer, plain), (wrapped_optimizer, wrapped)):
            if step == 2:  # too late for this step's multiplier
                opt.param_groups[0]["lr"] = 0.6
            opt.step()
            scheduler.step()
    assert rates(wrapped_optimizer) == pytest.approx([0.2 * lr for lr in rates(plain_optimizer)])


@pytest.mark.parametrize(
    "wrap", [lambda scheduler: scheduler, lambda scheduler: SNRScheduler(scheduler, min_multiplier=0.5)]
)
def test_a_restored_schedule_goes_on_from_other_initial_rates(wrap):
    opt = optimizer()
    saved = wrap(SCHEDULES["lambda"](opt))
    for _ in range(2):
        opt.step()
        saved.step()
    other = optimizer((0.3, 0.04))
    restored = wrap(SCHEDULES["lambda"](other))
    wanted = initial_lrs(restored)
    other.load_state_dict(opt.state_dict())
    restored.load_state_dict(saved.state_dict())
    assert restore_initial_lrs(restored, wanted) == [0.1, 0.02]
    multiplier = 0.5 if isinstance(restored, SNRScheduler) else 1.0
    assert rates(other) == pytest.approx([multiplier * 0.3 / 3, multiplier * 0.04 / 3])  # 1 / (1 + 2 steps)
    assert initial_lrs(restored) == wanted
    assert [group["initial_lr"] for group in other.param_groups] == wanted
    other.step()
    restored.step()
    assert rates(other) == pytest.approx([multiplier * 0.3 / 4, multiplier * 0.04 / 4])
    assert restore_initial_lrs(restored, wanted) == wanted


def test_a_schedule_that_depends_on_its_past_cannot_go_on_from_another_rate():
    opt, other = optimizer(), optimizer((0.3, 0.02))
    saved, restored = (SNRScheduler(SCHEDULES["exponential"](o)) for o in (opt, other))
    wanted = initial_lrs(restored)
    other.load_state_dict(opt.state_dict())
    restored.load_state_dict(saved.state_dict())
    assert restore_initial_lrs(restored, [0.1, 0.02]) == [0.1, 0.02]
    with pytest.raises(ValueError, match=r"\[0.1, 0.02\], this run has \[0.3, 0.02\], and a `ExponentialLR`"):
        restore_initial_lrs(restored, wanted)


def test_an_optimizer_that_ignores_its_rate_is_refused():
    parameters = [torch.nn.Parameter(torch.zeros(1))]
    check_steerable(Adafactor(parameters, lr=1e-3, relative_step=False))
    with pytest.raises(ValueError, match="relative_step=False"):
        check_steerable(Adafactor(parameters, relative_step=True))


def test_restoring_the_scheduler_alone_writes_its_rates():
    first_optimizer, second_optimizer = optimizer(), optimizer()
    first, second = (
        SNRScheduler(SCHEDULES["lambda"](o), min_multiplier=0.05) for o in (first_optimizer, second_optimizer)
    )
    first.set_rho(0.4)
    first_optimizer.step()
    first.step()
    second.load_state_dict(first.state_dict())
    assert (
        rates(second_optimizer) == rates(first_optimizer) == pytest.approx([0.02, 0.004])
    )  # 0.4 / (1 + 1) of 0.1, 0.02
    second.set_rho(0.4)  # the restored rates are its own, not somebody else's
    assert rates(second_optimizer) == rates(first_optimizer)


def test_tensor_rates_are_written_in_place():
    parameter = torch.nn.Parameter(torch.zeros(1))
    opt = torch.optim.Adam([parameter], lr=torch.tensor(0.1), capturable=False, foreach=False)
    scheduler = SNRScheduler(LambdaLR(opt, lambda step: 1.0))
    tensor = opt.param_groups[0]["lr"]
    scheduler.set_rho(0.25)
    assert opt.param_groups[0]["lr"] is tensor
    assert tensor.item() == pytest.approx(0.025)


def test_foreign_states_and_bad_multipliers_are_refused():
    opt = optimizer()
    scheduler = SNRScheduler(SCHEDULES["lambda"](opt))
    with pytest.raises(ValueError, match="without the SNR learning rate"):
        scheduler.load_state_dict(LambdaLR(optimizer(), lambda step: 1.0).state_dict())
    other = optimizer((0.1,))
    with pytest.raises(ValueError, match="parameter groups"):
        scheduler.load_state_dict(SNRScheduler(SCHEDULES["lambda"](other)).state_dict())
    with pytest.raises(ValueError, match="0 <= min_multiplier <= max_multiplier"):
        SNRScheduler(SCHEDULES["lambda"](optimizer()), min_multiplier=0.5, max_multiplier=0.1)


def test_the_position_is_that_of_a_rate_which_somebody_else_has_written():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.4)
    scheduler = SNRScheduler(torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0), max_multiplier=math.inf)
    scheduler.set_multiplier(3.0)
    assert scheduler.position == 1.0
    optimizer.param_groups[0]["lr"] = 0.1
    assert scheduler.position == pytest.approx(0.25)
