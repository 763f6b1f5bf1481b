"""A learning-rate scheduler around the user's own one: scheduled rate x clamped rho of the batch at hand."""

from typing import Any

from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler


class SNRScheduler(LRScheduler):
    r"""
    Multiplies the learning rate of any schedule by \\( \mathrm{clamp}(\rho, \text{min\_factor}, \text{max\_factor}) \\).

    \\( \eta_t = \eta_0(t)\, \rho_t \\) with \\( \rho_t = N\,\mathrm{SNR} / (1 + N\,\mathrm{SNR}) \\)
    ([OBLR-PO](https://huggingface.co/papers/2511.23310), Theorem 4, where the schedule \\( \eta_0 \\) is constant). The
    rate is written into the optimizer's parameter groups as soon as [`set_ratio`][SNRScheduler.set_ratio] is called, so
    call it before the backward pass of the step that shall use it. Before the first call the factor is `max_factor`;
    `min_factor=max_factor=1` is the wrapped schedule.

    Args:
        scheduler ([`~torch.optim.lr_scheduler.LRScheduler`]):
            Schedule to wrap. It keeps seeing its own, unmultiplied rates, so recursive schedules work as well.
        min_factor (`float`, *optional*, defaults to `0.0`):
            Least factor, at least 0.
        max_factor (`float`, *optional*, defaults to `1.0`):
            Greatest factor, at least `min_factor`.
    """

    def __init__(self, scheduler: LRScheduler, *, min_factor: float = 0.0, max_factor: float = 1.0) -> None:
        # Deliberately not `LRScheduler.__init__`: it would take a step of its own.
        if not 0 <= min_factor <= max_factor:
            raise ValueError(
                f"The factors must satisfy 0 <= min_factor <= max_factor, got min_factor={min_factor}, "
                f"max_factor={max_factor}."
            )
        self.scheduler = scheduler
        self.optimizer = scheduler.optimizer
        self.min_factor = min_factor
        self.max_factor = max_factor
        self.multiplier = max_factor
        self._scheduled_lrs = [float(lr) for lr in self.get_last_lr()]
        self._write_lrs()

    @property
    def last_epoch(self) -> int:  # type: ignore[override]
        """Number of steps of the wrapped schedule."""
        return self.scheduler.last_epoch

    @property
    def base_lrs(self) -> list[float | Tensor]:  # type: ignore[override]
        """Initial rates of the wrapped schedule, for callbacks that read them."""
        return self.scheduler.base_lrs

    def set_ratio(self, ratio: float) -> float:
        """Set \\( \\rho \\) of the coming optimizer step, write the learning rates, and return the factor in use."""
        self.multiplier = min(max(ratio, self.min_factor), self.max_factor)
        self._write_lrs()
        return self.multiplier

    def step(self, epoch: int | None = None) -> None:
        """Advance the wrapped schedule by one optimizer step; the factor stays until the next batch sets it."""
        self._write_lrs(multiplier=1.0)
        if epoch is None:
            self.scheduler.step()
        else:
            self.scheduler.step(epoch)
        self._scheduled_lrs = [float(lr) for lr in self.get_last_lr()]
        self._write_lrs()

    def get_last_lr(self) -> list[float | Tensor]:
        """Learning rates in use, one per parameter group."""
        return [float(group["lr"]) for group in self.optimizer.param_groups]

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

    def _write_lrs(self, multiplier: float | None = None) -> None:
        factor = self.multiplier if multiplier is None else multiplier
        for group, lr in zip(self.optimizer.param_groups, self._scheduled_lrs, strict=True):
            if isinstance(
                group["lr"], Tensor
            ):  # capturable optimizers read the rate from a tensor that must stay the same
                group["lr"].fill_(lr * factor)
            else:
                group["lr"] = lr * factor
