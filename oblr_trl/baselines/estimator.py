"""The configured baseline of a batch."""

from dataclasses import dataclass

from torch import Tensor

from oblr_trl.baselines.formulas import (
    gradient_weighted_baseline,
    group_mean_baseline,
    leave_one_out_baseline,
    length_weighted_baseline,
)
from oblr_trl.baselines.prior_strength import AutomaticPriorStrength


@dataclass
class GroupedBatch:
    """
    One generation batch, grouped by prompt and gathered over processes.

    Args:
        rewards (`torch.Tensor` of shape `(N, G)`): Rewards; `nan` where a completion could not be scored.
        lengths (`torch.Tensor` of shape `(N, G)`): Number of completion tokens in the loss.
        weights (`torch.Tensor` of shape `(N, G)`, *optional*): Squared score norms, if the scoring pass ran.
        sketches (`torch.Tensor` of shape `(N, G, k)`, *optional*): Score sketches, if the scoring pass ran.
        token_weights (`torch.Tensor` of shape `(N, G)`, *optional*): Mean weight of a completion's tokens in its sketch.
    """

    rewards: Tensor
    lengths: Tensor
    weights: Tensor | None = None
    sketches: Tensor | None = None
    token_weights: Tensor | None = None


class BaselineEstimator:
    """
    The configured baseline of a batch, and the state of the automatic prior strength.

    Args:
        baseline (`str`): One of `"gradient_weighted"`, `"group_mean"`, `"leave_one_out"`, `"length_weighted"`.
        leave_one_out (`bool`): Whether weighted baselines keep a completion out of its own baseline.
        prior_strength (`float`, *optional*): Prior strength of the gradient-weighted baseline; automatic if not given.
    """

    def __init__(self, baseline: str, *, leave_one_out: bool, prior_strength: float | None) -> None:
        self.baseline = baseline
        self.leave_one_out = leave_one_out
        self.automatic = AutomaticPriorStrength() if prior_strength is None else None
        self._fixed_strength = prior_strength

    @property
    def prior_strength(self) -> float:
        """Prior strength for the next batch, in completions; 0 for baselines without prior."""
        if self.baseline != "gradient_weighted":
            return 0.0
        if self.automatic is not None:
            return self.automatic.value
        assert self._fixed_strength is not None
        return self._fixed_strength

    @property
    def has_prior(self) -> bool:
        """Whether the other prompts of a batch have a say, at whatever strength."""
        return self.baseline == "gradient_weighted" and self._fixed_strength != 0

    def __call__(self, batch: GroupedBatch) -> Tensor:
        """The baseline of every completion, of shape `(N, G)`."""
        if self.baseline == "group_mean":
            return group_mean_baseline(batch.rewards)
        if self.baseline == "leave_one_out":
            return leave_one_out_baseline(batch.rewards)
        if self.baseline == "length_weighted":
            return length_weighted_baseline(batch.rewards, batch.lengths, leave_one_out=self.leave_one_out)
        assert batch.weights is not None, "the gradient-weighted baseline needs the scoring pass"
        return gradient_weighted_baseline(
            batch.rewards, batch.weights, leave_one_out=self.leave_one_out, prior_strength=self.prior_strength
        )

    def update(self, batch: GroupedBatch) -> None:
        """Let the automatic prior strength learn from a batch whose baseline has been taken."""
        if self.baseline == "gradient_weighted" and self.automatic is not None:
            assert batch.weights is not None
            self.automatic.update(batch.rewards, batch.weights)
