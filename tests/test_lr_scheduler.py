import io

import pytest
import torch
from torch.optim.lr_scheduler import CosineAnnealingLR, ExponentialLR, LambdaLR, LRScheduler

from oblr_trl.lr_scheduler import SNRScheduler

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
    wrapped = SNRScheduler(SCHEDULES[schedule](wrapped_optimizer), min_factor=0.05, max_factor=0.9)
    assert isinstance(wrapped, LRScheduler)
    for ratio, factor in ((0.5, 0.5), (0.0, 0.05), (1.0, 0.9), (0.3, 0.3), (0.07, 0.07)):
        assert wrapped.set_ratio(ratio) == factor
        assert rates(wrapped_optimizer) == pytest.approx([factor * lr for lr in rates(plain_optimizer)])
        assert wrapped.get_last_lr() == rates(wrapped_optimizer)
        for opt, scheduler in ((plain_optimizer, plain), (wrapped_optimizer, wrapped)):
            opt.step()
            scheduler.step()
        assert wrapped.last_epoch == plain.last_epoch


def test_without_a_ratio_a_unit_factor_is_the_wrapped_schedule():
    opt = optimizer()
    scheduler = SNRScheduler(SCHEDULES["lambda"](opt))
    assert rates(opt) == [0.1, 0.02]
    opt.step()
    scheduler.step()
    assert rates(opt) == pytest.approx([0.05, 0.01])


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_resumed_scheduler_equals_an_uninterrupted_one(schedule):
    def run(opt, scheduler, ratios):
        out = []
        for ratio in ratios:
            scheduler.set_ratio(ratio)
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


def test_tensor_rates_are_written_in_place():
    parameter = torch.nn.Parameter(torch.zeros(1))
    opt = torch.optim.Adam([parameter], lr=torch.tensor(0.1), capturable=False, foreach=False)
    scheduler = SNRScheduler(LambdaLR(opt, lambda step: 1.0))
    tensor = opt.param_groups[0]["lr"]
    scheduler.set_ratio(0.25)
    assert opt.param_groups[0]["lr"] is tensor
    assert tensor.item() == pytest.approx(0.025)


def test_foreign_states_and_bad_factors_are_refused():
    opt = optimizer()
    scheduler = SNRScheduler(SCHEDULES["lambda"](opt))
    with pytest.raises(ValueError, match="without the SNR learning rate"):
        scheduler.load_state_dict(LambdaLR(optimizer(), lambda step: 1.0).state_dict())
    other = optimizer((0.1,))
    with pytest.raises(ValueError, match="parameter groups"):
        scheduler.load_state_dict(SNRScheduler(SCHEDULES["lambda"](other)).state_dict())
    with pytest.raises(ValueError, match="0 <= min_factor <= max_factor"):
        SNRScheduler(SCHEDULES["lambda"](optimizer()), min_factor=0.5, max_factor=0.1)
