"""The prior strength of the gradient-weighted baseline, chosen from earlier batches by the variance that it would have left."""

import math
from collections.abc import Sequence

from torch import Tensor

from oblr_trl.baselines.formulas import gradient_variance, gradient_weighted_baseline

# Powers of two between the paper's formula (0) and one baseline for the whole batch (infinity).
PRIOR_STRENGTH_GRID = (0.0, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, math.inf)


class AutomaticPriorStrength:
    r"""
    Chooses the prior strength \\( \kappa \\) of [`gradient_weighted_baseline`] from *earlier* batches.

    Keeps, for every \\( \kappa \\) of a small grid, an exponential moving average of [`gradient_variance`] (divided by the
    batch's mean weight, so that batches count alike while score norms drift) and returns the grid point of minimum variance.
    Call [`update`][AutomaticPriorStrength.update] *after* the batch's baseline was taken: a strength chosen on the batch it
    is applied to would depend on every completion and bias the gradient.

    Args:
        decay (`float`, *optional*, defaults to `0.9`):
            Decay of the moving average, in [0, 1): about `1 / (1 - decay)` batches are remembered.
        initial (`float`, *optional*, defaults to `16.0`):
            Strength used before the first batch has been seen; the better fixed one of `benchmarks.variance`.
        grid (`Sequence[float]`, *optional*):
            Candidate strengths, ascending.
    """

    def __init__(
        self, *, decay: float = 0.9, initial: float = 16.0, grid: Sequence[float] = PRIOR_STRENGTH_GRID
    ) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"`decay` must be in [0, 1), got {decay}.")
        self.decay = decay
        self.initial = initial
        self.grid = tuple(grid)
        self._variances = [0.0] * len(self.grid)
        self._seen = False

    @property
    def value(self) -> float:
        """Strength for the next batch, in completions."""
        if not self._seen:
            return self.initial
        return self.grid[min(range(len(self.grid)), key=self._variances.__getitem__)]

    def update(self, rewards: Tensor, weights: Tensor) -> None:
        """Score every strength of the grid on a batch whose baseline has been taken already; always leave-one-out, because
        a baseline that sees its own reward makes any prior look harmful. A batch that carries no information (fewer than two
        scored groups, no weight, or rewards that are all equal) changes nothing."""
        scored = ~rewards.isnan()
        if scored.any(dim=1).sum() < 2:  # without another group all strengths tie
            return
        scale = weights[scored].double().mean().item()
        if not scale > 0 or rewards[scored].min() == rewards[scored].max():
            return
        variances = []
        for strength in self.grid:
            baselines = gradient_weighted_baseline(rewards.double(), weights, prior_strength=strength)
            variances.append(gradient_variance(rewards, weights, baselines) / scale)
        if any(math.isnan(variance) for variance in variances):
            return
        # All grid points share their history, so the bias of starting at zero cannot change which grid point is best.
        self._variances = [
            self.decay * old + (1 - self.decay) * new for old, new in zip(self._variances, variances, strict=True)
        ]
        self._seen = True

    def state_dict(self) -> dict[str, list[float] | bool]:
        """State as plain numbers."""
        return {"variances": list(self._variances), "seen": self._seen}

    def load_state_dict(self, state: dict) -> None:
        """Restore a state of [`state_dict`][AutomaticPriorStrength.state_dict].

        Raises:
            `ValueError`: If the state belongs to another grid.
        """
        if len(state["variances"]) != len(self.grid):
            raise ValueError(
                f"The saved prior-strength state has {len(state['variances'])} grid points but this version uses "
                f"{len(self.grid)}. Resume with the version of oblr_trl that wrote the checkpoint."
            )
        self._variances = [float(variance) for variance in state["variances"]]
        self._seen = bool(state["seen"])
