"""The configured baseline of a batch, and all that it learns from earlier ones."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from oblr_trl.baselines.formulas import (
    gradient_variance,
    gradient_weighted_baseline,
    group_mean_baseline,
    leave_one_out_baseline,
    length_weighted_baseline,
)
from oblr_trl.baselines.prior_strength import AutomaticPriorStrength
from oblr_trl.baselines.prompt_memory import PromptMemory
from oblr_trl.baselines.weights_choice import ALL, EQUAL, LM_HEAD, WeightsChoice


@dataclass
class GroupedBatch:
    """
    One generation batch, grouped by prompt and gathered over processes.

    Args:
        rewards (`torch.Tensor` of shape `(N, G)`): Rewards; `nan` where a completion could not be scored.
        lengths (`torch.Tensor` of shape `(N, G)`): Number of completion tokens in the loss.
        weights (`torch.Tensor` of shape `(N, G)`, *optional*): Squared score norms, or what stands in for them.
        sketches (`torch.Tensor` of shape `(N, G, k)`, *optional*): Score sketches, if the scoring pass ran.
        products (`torch.Tensor` of shape `(N, G, 4)`, *optional*): With the last update (see [`~scores.movement`]), if it is measured.
        token_weights (`torch.Tensor` of shape `(N, G)`, *optional*): Mean weight of a completion's tokens in its sketch.
        log_probs (`torch.Tensor` of shape `(N, G)`, *optional*): Log-probability of a completion, if the scoring pass ran.
        prompt_keys (`torch.Tensor` of shape `(N,)`, *optional*): Keys of the prompts, if there is a memory of them.
        head_weights (`torch.Tensor` of shape `(N, G)`, *optional*): Squared norms of the output projection's scores, where they are known.
    """

    rewards: Tensor
    lengths: Tensor
    weights: Tensor | None = None
    sketches: Tensor | None = None
    products: Tensor | None = None
    token_weights: Tensor | None = None
    log_probs: Tensor | None = None
    prompt_keys: Tensor | None = None
    head_weights: Tensor | None = None


class BaselineEstimator:
    """
    The configured baseline of a batch, the memory of prompts, and the choice of the strengths of both priors.

    Args:
        baseline (`str`): One of `"gradient_weighted"`, `"group_mean"`, `"leave_one_out"`, `"length_weighted"`.
        leave_one_out (`bool`): Whether weighted baselines keep a completion out of its own baseline.
        prior_strength (`float`, *optional*): Prior strength of the gradient-weighted baseline; automatic if not given.
        memory_size (`int`, *optional*, defaults to 0): Number of prompts that the gradient-weighted baseline remembers.
        chooses_weights (`bool`, *optional*, defaults to `False`): Whether cheaper weights may take the place of squared score norms.
    """

    def __init__(
        self,
        baseline: str,
        *,
        leave_one_out: bool,
        prior_strength: float | None,
        memory_size: int = 0,
        chooses_weights: bool = False,
    ) -> None:
        self.baseline = baseline
        self.leave_one_out = leave_one_out
        self.memory = PromptMemory(memory_size) if memory_size > 0 else None
        self.automatic: AutomaticPriorStrength | None = None
        if prior_strength is None:
            self.automatic = AutomaticPriorStrength()
        elif self.memory is not None:
            self.automatic = AutomaticPriorStrength(initial=prior_strength, grid=(prior_strength,))
        self._fixed_strength = prior_strength
        self.weights_choice = WeightsChoice()
        self._chooses_weights = chooses_weights

    @property
    def weights(self) -> str:
        """What the weights of the next batch shall be, one of [`~weights_choice.WEIGHTS`]."""
        if not self._chooses_weights:
            return ALL
        return self.weights_choice.value if self.baseline == "gradient_weighted" else EQUAL

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
    def memory_strength(self) -> float:
        """Strength of the memory of prompts for the next batch, in completions per remembered one; 0 without memory."""
        if self.memory is None:
            return 0.0
        assert self.automatic is not None
        return self.automatic.memory_strength

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
        if self.automatic is not None:
            return self.automatic.baseline(
                batch.rewards, batch.weights, self._recall(batch), leave_one_out=self.leave_one_out
            )
        return gradient_weighted_baseline(
            batch.rewards, batch.weights, leave_one_out=self.leave_one_out, prior_strength=self.prior_strength
        )

    def compare_weights(self, batch: GroupedBatch) -> str | None:
        """Let the choice of weights learn from a scored batch whose baseline has been taken; returns what to say of it where it changed."""
        if self.baseline != "gradient_weighted":
            return None
        assert batch.weights is not None
        before, rewards, norms = self.weights, batch.rewards.cpu(), batch.weights.cpu()  # as in `update`
        keys = None if batch.prompt_keys is None else batch.prompt_keys.cpu()
        known = GroupedBatch(rewards, batch.lengths.cpu(), prompt_keys=keys)
        scale = norms[~rewards.isnan()].double().mean().item()
        weights = {EQUAL: torch.ones_like(norms), LM_HEAD: batch.head_weights, ALL: norms}
        self.weights_choice.update(
            {
                name: gradient_variance(rewards, norms, self(replace(known, weights=these.cpu()))) / scale
                for name, these in weights.items()
                if these is not None and scale > 0
            }
        )
        if self.weights == before:
            return None
        gains = ", ".join(f"{gain:.2f} of {name}" for name, gain in self.weights_choice.gains.items())
        return (
            f"Weights of the baseline: from here on {self.weights!r}, not {before!r}. Those of all parameters leave, of the variance with other "
            f"weights: {gains}. score_scope='all' keeps them, and scores every completion."
        )

    def remembered_fraction(self, batch: GroupedBatch) -> float:
        """Share of the batch's completions whose prompt has been seen before; 0 without memory."""
        memory = self._recall(batch)
        return 0.0 if memory is None else (memory[:, 1] > 0).double().mean().item()

    def update(self, batch: GroupedBatch) -> None:
        """Learn from a batch whose baseline has been taken: first the strengths, then the memory that they were applied to."""
        if self.baseline != "gradient_weighted":
            return
        assert batch.weights is not None
        # Thousands of operations on N x G numbers, over the grid of strengths: on a GPU each would take as long as its launch.
        rewards, weights, memory = batch.rewards.cpu(), batch.weights.cpu(), self._recall(batch)
        if self.automatic is not None:
            self.automatic.update(rewards, weights, None if memory is None else memory.cpu())
        if self.memory is not None:
            assert batch.prompt_keys is not None
            self.memory.update(batch.prompt_keys.cpu(), rewards, weights)

    def state_dict(self) -> dict[str, Any] | None:
        """State of the choice of strengths, as plain numbers; that of the memory is its own."""
        return None if self.automatic is None else {"fixed": self._fixed_strength, **self.automatic.state_dict()}

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """Restore a state of [`state_dict`][BaselineEstimator.state_dict]. One of another configured prior strength is left
        alone: its variances are those of other strengths."""
        if self.automatic is not None and state is not None and state.get("fixed") == self._fixed_strength:
            self.automatic.load_state_dict(state)

    def _recall(self, batch: GroupedBatch) -> Tensor | None:
        if self.memory is None:
            return None
        assert batch.prompt_keys is not None
        return self.memory.recall(batch.prompt_keys)
