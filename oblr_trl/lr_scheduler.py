"""A learning-rate scheduler around the user's own one: scheduled rate x clamped rho of the batch at hand."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, ReduceLROnPlateau


class SNRScheduler(LRScheduler):
    r"""
    Multiplies the learning rate of any schedule by \\( \mathrm{clamp}(\rho, \text{min\_multiplier}, \text{max\_multiplier}) \\).

    \\( \eta_t = \eta_0(t)\, \rho_t \\) with \\( \rho_t = N\,\mathrm{SNR} / (1 + N\,\mathrm{SNR}) \\)
    ([OBLR-PO](https://huggingface.co/papers/2511.23310), Theorem 4, where the schedule \\( \eta_0 \\) is constant). The rate is
    written into the optimizer's parameter groups as soon as [`set_rho`][SNRScheduler.set_rho] is called, so call it before the
    backward pass of the step that shall use it. Before the first call, while \\( \rho \\) is unknown, the multiplier is
    `min_multiplier`; `min_multiplier=max_multiplier=1` is the wrapped schedule. Whatever an optimizer derives from the rate is
    multiplied with it, AdamW's decoupled weight decay (rate x decay) among it.

    A rate that somebody else writes into a parameter group (a callback in `on_step_begin`) takes the place of the scheduled one,
    as it does without this scheduler: until the next step, and multiplied. So write a scheduled rate, not a part of the one that
    is there.

    Args:
        scheduler ([`~torch.optim.lr_scheduler.LRScheduler`]):
            Schedule to wrap. It keeps seeing its own, unmultiplied rates, so recursive schedules work as well.
        min_multiplier (`float`, *optional*, defaults to `0.0`):
            Minimum multiplier, at least 0.
        max_multiplier (`float`, *optional*, defaults to `1.0`):
            Maximum multiplier, at least `min_multiplier`.
    """

    def __init__(self, scheduler: LRScheduler, *, min_multiplier: float = 0.0, max_multiplier: float = 1.0) -> None:
        # Deliberately not `LRScheduler.__init__`: it would take a step of its own.
        if not 0 <= min_multiplier <= max_multiplier:
            raise ValueError(
                f"The multipliers must satisfy 0 <= min_multiplier <= max_multiplier, got min_multiplier={min_multiplier}, "
                f"max_multiplier={max_multiplier}."
            )
        self.scheduler = scheduler
        self.optimizer = scheduler.optimizer
        self.min_multiplier = min_multiplier
        self.max_multiplier = max_multiplier
        self.multiplier = min_multiplier
        self.take_scheduled_lrs()

    @property
    def last_epoch(self) -> int:  # type: ignore[override]
        """Number of steps of the wrapped schedule."""
        return self.scheduler.last_epoch

    @property
    def base_lrs(self) -> list[float | Tensor]:  # type: ignore[override]
        """Initial rates of the wrapped schedule, for callbacks that read them."""
        return self.scheduler.base_lrs

    def set_rho(self, rho: float) -> float:
        """Set \\( \\rho \\) of the coming optimizer step, write the learning rates, and return the multiplier in use."""
        self.set_multiplier(min(max(rho, self.min_multiplier), self.max_multiplier))
        return self.multiplier

    def set_multiplier(self, multiplier: float) -> None:
        """Set the multiplier of the coming optimizer step, whatever computed it, and write the learning rates."""
        self.multiplier = multiplier
        self.multiply()

    @property
    def position(self) -> float:
        """Where the wrapped schedule stands, as a part of its initial rate: the largest of all parameter groups."""
        self._take_foreign_lrs()
        pairs = zip(self._scheduled_lrs, initial_lrs(self.scheduler), strict=True)
        return max((lr / initial for lr, initial in pairs if initial > 0), default=0.0)

    def multiply(self) -> None:
        """Multiply the rates that somebody else has written since, if any: once per step that has no new \\( \\rho \\)."""
        self._take_foreign_lrs()
        self._write_lrs()

    def step(self) -> None:  # type: ignore[override]
        """Advance the wrapped schedule by one optimizer step; the multiplier stays until the next batch sets it."""
        self._take_foreign_lrs()
        _write(self.optimizer, self._scheduled_lrs)
        self.scheduler.step()
        self.take_scheduled_lrs()

    def take_scheduled_lrs(self) -> None:
        """Multiply the rates that the wrapped schedule has just written."""
        self._scheduled_lrs = _lrs(self.optimizer)
        self._write_lrs()

    def get_last_lr(self) -> list[float | Tensor]:
        """Learning rates in use, one per parameter group."""
        return list(_lrs(self.optimizer))

    def get_lr(self) -> list[float | Tensor]:
        """Learning rates in use, one per parameter group."""
        return self.get_last_lr()

    def state_dict(self) -> dict[str, Any]:
        """State as plain numbers: it is loaded with `weights_only=True`."""
        return {
            "scheduler": self.scheduler.state_dict(),
            "multiplier": float(self.multiplier),
            "scheduled_lrs": list(self._scheduled_lrs),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """
        Restore a state of [`state_dict`][SNRScheduler.state_dict] and write its learning rates.

        Raises:
            `ValueError`: If the state was saved by a run without SNR learning rate, or with other parameter groups.
        """
        if "scheduler" not in state_dict or "multiplier" not in state_dict:
            raise ValueError(
                "The checkpoint's scheduler state was saved without the SNR learning rate. Resume with "
                "`lr_adaptation='none'`, or start a new run from the checkpoint's weights."
            )
        if len(state_dict["scheduled_lrs"]) != len(self.optimizer.param_groups):
            raise ValueError(
                f"The checkpoint's scheduler state has {len(state_dict['scheduled_lrs'])} parameter groups, the optimizer "
                f"has {len(self.optimizer.param_groups)}. Resume with the optimizer that wrote the checkpoint."
            )
        self.scheduler.load_state_dict(state_dict["scheduler"])
        self.multiplier = state_dict["multiplier"]
        self._scheduled_lrs = list(state_dict["scheduled_lrs"])
        self._write_lrs()

    def _take_foreign_lrs(self) -> None:
        now = _lrs(self.optimizer)
        changes = zip(now, self._written_lrs, self._scheduled_lrs, strict=True)
        self._scheduled_lrs = [scheduled if lr == written else lr for lr, written, scheduled in changes]

    def _write_lrs(self) -> None:
        _write(self.optimizer, [lr * self.multiplier for lr in self._scheduled_lrs])
        self._written_lrs = _lrs(self.optimizer)


def check_steerable(optimizer: Optimizer) -> None:
    """Raise a `ValueError` for an optimizer that does not step by the rates of its parameter groups."""
    if not all("lr" in group and not group.get("relative_step") for group in optimizer.param_groups):
        raise ValueError(
            "The SNR learning rate needs an optimizer that steps by the `lr` of its parameter groups; this one has none, or "
            "ignores it (Adafactor with `relative_step=True`). Remedy: pass another one in `optimizers` (Adafactor with "
            "`relative_step=False`), or set lr_adaptation='none'."
        )


def check_wrappable(scheduler: Any) -> None:
    """Raise a `ValueError` for what is no schedule of steps."""
    # torch counts `ReduceLROnPlateau` among its schedulers, but it is stepped with a metric.
    if not isinstance(scheduler, LRScheduler) or isinstance(scheduler, ReduceLROnPlateau):
        raise ValueError(
            f"The SNR learning rate cannot wrap a `{type(scheduler).__name__}`. Remedy: remove the scheduler from "
            "`optimizers` or from the DeepSpeed configuration and set `lr_scheduler_type`, or set lr_adaptation='none'."
        )


def initial_lrs(scheduler: Any) -> list[float]:
    """Rates that a schedule, wrapped or not, starts from, one per parameter group."""
    inner = scheduler.scheduler if isinstance(scheduler, SNRScheduler) else scheduler
    if isinstance(inner, LambdaLR):
        return [float(lr) for lr in inner.base_lrs]
    # Not every schedule notes them down as torch's do (ReduceLROnPlateau, those of DeepSpeed), and a checkpoint's rate is a later one.
    return [float(group.setdefault("initial_lr", float(group["lr"]))) for group in inner.optimizer.param_groups]


def restore_initial_lrs(scheduler: Any, wanted: Sequence[float]) -> list[float]:
    """
    Let a schedule whose state was loaded, at the step where it is, continue from this run's initial rates instead of the saved ones.

    Args:
        scheduler ([`~torch.optim.lr_scheduler.LRScheduler`]): The schedule, wrapped or not.
        wanted (`Sequence[float]`): Initial rates of this run, one per parameter group.

    Returns:
        `list[float]`: The initial rates that the state came with.

    Raises:
        `ValueError`: If they differ and the schedule is not a function of the step, as those of `lr_scheduler_type` are.
    """
    inner = scheduler.scheduler if isinstance(scheduler, SNRScheduler) else scheduler
    loaded = initial_lrs(scheduler)
    if loaded == list(wanted):
        return loaded
    if not isinstance(inner, LambdaLR):
        raise ValueError(
            f"The checkpoint was written with initial learning rates {loaded}, this run has {list(wanted)}, and a "
            f"`{type(inner).__name__}` cannot continue from others. Remedy: keep the rate, use one of `lr_scheduler_type`, or start "
            "a new run from the checkpoint's weights."
        )
    inner.base_lrs = list(wanted)
    for group, lr in zip(inner.optimizer.param_groups, wanted, strict=True):
        group["initial_lr"] = lr
    multipliers = [function(inner.last_epoch) for function in inner.lr_lambdas]
    inner._last_lr = [lr * multiplier for lr, multiplier in zip(wanted, multipliers, strict=True)]
    _write(inner.optimizer, inner._last_lr)
    if isinstance(scheduler, SNRScheduler):
        scheduler.take_scheduled_lrs()
    return loaded


def _lrs(optimizer: Optimizer) -> list[float]:
    return [float(group["lr"]) for group in optimizer.param_groups]


def _write(optimizer: Optimizer, lrs: Sequence[Any]) -> None:
    for group, lr in zip(optimizer.param_groups, lrs, strict=True):
        if isinstance(
            group["lr"], Tensor
        ):  # capturable optimizers read the rate from a tensor that must stay the same
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr
