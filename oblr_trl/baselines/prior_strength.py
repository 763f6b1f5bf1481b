"""The strengths of a baseline's two priors, chosen from earlier batches by the variance that they would have left."""

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from oblr_trl.baselines.formulas import gradient_variance, gradient_weighted_baseline

# Powers of two between the paper's formula (0) and one baseline for the whole batch (infinity).
PRIOR_STRENGTH_GRID = (0.0, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, math.inf)
# Of the memory of prompts. Until the first prompt comes back all tie, and ties go to the first: a remembered completion counts
# as one of the batch.
MEMORY_STRENGTH_GRID = (1.0, 0.0, 0.5, 2.0, 4.0)
# Strengths whose variances differ by rounding alone, as with one completion per prompt and no memory, are equally good.
_TIE = 1e-9


class AutomaticPriorStrength:
    r"""
    Chooses the strengths \\( \kappa \\) and \\( m \\) of [`gradient_weighted_baseline`] from *earlier* batches.

    Keeps, for every pair of a small grid, an exponential moving average of [`gradient_variance`] (divided by the batch's mean
    weight, so that batches count alike while score norms drift) and returns the grid point of minimum variance, of several such
    one with the initial \\( \kappa \\). At
    \\( \kappa = \infty \\), where memory has no say, there is one \\( m \\). Call [`update`][AutomaticPriorStrength.update]
    *after* the batch's baseline was taken: strengths chosen on the batch they are applied to would depend on every completion
    and bias the gradient.

    Args:
        decay (`float`, *optional*, defaults to `0.9`):
            Decay of the moving average, in [0, 1): about `1 / (1 - decay)` batches are remembered.
        initial (`float`, *optional*, defaults to `16.0`):
            \\( \kappa \\) before the first batch has been seen; the better fixed one of `benchmarks.variance`.
        grid (`Sequence[float]`, *optional*):
            Candidates for \\( \kappa \\), ascending. A single one leaves the choice of \\( m \\).
    """

    def __init__(
        self, *, decay: float = 0.9, initial: float = 16.0, grid: Sequence[float] = PRIOR_STRENGTH_GRID
    ) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"`decay` must be in [0, 1), got {decay}.")
        self.decay = decay
        self.initial = initial
        self.grid = tuple(grid)
        self._pairs = [
            (strength, memory_strength)
            for strength in self.grid
            for memory_strength in (MEMORY_STRENGTH_GRID[:1] if math.isinf(strength) else MEMORY_STRENGTH_GRID)
        ]
        self._variances = [0.0] * len(self._pairs)
        self._seen = False

    @property
    def value(self) -> float:
        """Strength of the prior for the next batch, in completions."""
        return self._best[0]

    @property
    def memory_strength(self) -> float:
        """Strength of the memory of prompts for the next batch, in completions per remembered completion."""
        return self._best[1]

    @property
    def _best(self) -> tuple[float, float]:
        if not self._seen:
            return self.initial, MEMORY_STRENGTH_GRID[0]
        lowest = min(self._variances) * (1 + _TIE)
        tied = [pair for pair, variance in zip(self._pairs, self._variances, strict=True) if variance <= lowest]
        return min(tied, key=lambda pair: pair[0] != self.initial)

    def baseline(
        self, rewards: Tensor, weights: Tensor, memory: Tensor | None = None, *, leave_one_out: bool = True
    ) -> Tensor:
        """[`gradient_weighted_baseline`] at the strengths for the next batch. Where a strength of 0 leaves out all that is known of
        a completion, as of the only one of its group, it is 1 (a prior that the grid knows at 0 alone stays out)."""
        return self._baseline_at(self._best, rewards, weights, memory, leave_one_out=leave_one_out)

    def update(self, rewards: Tensor, weights: Tensor, memory: Tensor | None = None) -> None:
        """Score every pair of the grid on a batch whose baseline has been taken already; always leave-one-out, because
        a baseline that sees its own reward makes any prior look harmful. A batch that carries no information (fewer than two
        scored groups, no weight, or rewards that are all equal) changes nothing."""
        scored = ~rewards.isnan()
        if scored.any(dim=1).sum() < 2:  # without another group all strengths tie
            return
        scale = weights[scored].double().mean().item()
        if not scale > 0 or rewards[scored].min() == rewards[scored].max():
            return

        @functools.cache
        def variance(pair: tuple[float, float]) -> float:
            baselines = self._baseline_at(pair, rewards.double(), weights, memory, leave_one_out=True)
            return gradient_variance(rewards, weights, baselines)

        ties = memory is None or not memory.any()  # all memory strengths do, and count once
        pairs = [(strength, 0.0) for strength, _ in self._pairs] if ties else self._pairs
        variances = [variance(pair) / scale for pair in pairs]
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
        variances = [float(variance) for variance in state["variances"]]
        if len(variances) != len(self._pairs):
            raise ValueError(
                f"The saved prior-strength state has {len(variances)} grid points but this version uses "
                f"{len(self._pairs)}. Resume with the version of oblr_trl that wrote the checkpoint."
            )
        self._variances = variances
        self._seen = bool(state["seen"])

    def _baseline_at(
        self,
        pair: tuple[float, float],
        rewards: Tensor,
        weights: Tensor,
        memory: Tensor | None,
        *,
        leave_one_out: bool,
    ) -> Tensor:
        baseline = functools.partial(
            gradient_weighted_baseline, rewards, weights, leave_one_out=leave_one_out, memory=memory
        )
        baselines = baseline(prior_strength=pair[0], memory_strength=pair[1])
        if not baselines.isnan().any():
            return baselines
        known = baseline(prior_strength=min(1.0, max(self.grid)), memory_strength=1.0)
        return torch.where(baselines.isnan(), known, baselines)
