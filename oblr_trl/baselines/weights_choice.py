"""Which weights a baseline is made of: those of all parameters' scores, or cheaper ones that leave about as little variance."""

from collections.abc import Mapping
from typing import Any

# Cheapest first: no score at all, that of the output projection (a forward pass), that of all parameters.
EQUAL, LM_HEAD, ALL = "equal", "lm_head", "all"
WEIGHTS = (EQUAL, LM_HEAD, ALL)
# Variance that is given up for the time of scoring every completion: a training step is 1.1 to 1.6 times as long with it, and no more
# progress than a tenth comes from a tenth less variance.
TOLERANCE = 0.1


class WeightsChoice:
    """
    Chooses from *earlier* batches the cheapest weights whose baseline leaves at most 1 + `TOLERANCE` times the variance of the best, and keeps
    them until it is 1 + 2 `TOLERANCE` times as much.

    Keeps an exponential moving average of [`gradient_variance`] (in units of a batch's mean weight) under each kind of weights, all at
    the strengths of the baseline in use. Call [`update`][WeightsChoice.update] *after* the batch's baseline was taken: a choice that depends
    on the batch would bias the gradient.

    Args:
        decay (`float`, *optional*, defaults to `0.9`): Decay of the moving averages, in [0, 1).
        warm_up (`int`, *optional*, defaults to `10`): Batches with information before anything but `"all"` is chosen.
    """

    def __init__(self, *, decay: float = 0.9, warm_up: int = 10) -> None:
        self.decay = decay
        self.warm_up = warm_up
        self.value = ALL  # of the next batch: one of `WEIGHTS`
        self._variances: dict[str, float] = {}
        self._num_batches = 0

    @property
    def gains(self) -> dict[str, float]:
        """Variance with the weights of all parameters over that with cheaper ones, by their name: below 1 is a gain."""
        return {
            name: self._variances[ALL] / variance
            for name, variance in self._variances.items()
            if name != ALL and variance > 0
        }

    def update(self, variances: Mapping[str, float]) -> None:
        """Take in what every kind of weights would have left on a batch, `"all"` among them. A batch without information (no variance, one
        that is 0 or not a number) changes nothing."""
        if not variances or not all(variance > 0 for variance in variances.values()):
            return
        # All share their history, so the bias of starting at zero cannot change which one is best; one that is new starts with it.
        old = {name: self._variances.get(name, self._variances.get(ALL, 0.0)) for name in variances}
        self._variances = {
            name: self.decay * old[name] + (1 - self.decay) * variance for name, variance in variances.items()
        }
        self._num_batches += 1
        if self._num_batches >= self.warm_up:
            self.value = self._cheapest()

    def _cheapest(self) -> str:
        least = min(self._variances.values())
        tolerances = {name: TOLERANCE * (2 if name == self.value else 1) for name in WEIGHTS}
        return next(
            name
            for name in WEIGHTS
            if name in self._variances and self._variances[name] <= (1 + tolerances[name]) * least
        )

    def state_dict(self) -> dict[str, Any]:
        """State as plain numbers, and a name."""
        return {"value": self.value, "num_batches": self._num_batches, "variances": dict(self._variances)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a state of [`state_dict`][WeightsChoice.state_dict]."""
        self.value = state["value"]
        self._num_batches = int(state["num_batches"])
        self._variances = {name: float(variance) for name, variance in state["variances"].items()}
