"""Baselines of GRPO, RLOO, OPO and OBLR-PO: what is subtracted from a reward before it weighs a policy score.

Shapes: N prompts (groups), G completions per prompt. Rewards, weights and baselines are `(N, G)`. A reward of `nan` marks
an unscorable completion; it leaves every sum. All sums run in float64 and over *the other* completions directly (never
as total minus own), so that a leave-one-out baseline does not depend on its own completion even by rounding.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

BASELINES = ("gradient_weighted", "group_mean", "leave_one_out", "length_weighted")

# Powers of two between the paper's formula (0) and one baseline for the whole batch (infinity).
PRIOR_STRENGTH_GRID = (0.0, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, math.inf)


def group_mean_baseline(rewards: Tensor) -> Tensor:
    r"""
    Mean reward of the completion's own group, as in GRPO: \\( b_n = \frac{1}{G} \sum_j r_{n,j} \\).

    The mean contains the completion's own reward, so the gradient estimate is biased: it is (G - 1) / G times the one of
    [`leave_one_out_baseline`] ([DeepSeekMath](https://huggingface.co/papers/2402.03300), Sec. 4.1).

    Args:
        rewards (`torch.Tensor` of shape `(num_groups, num_generations)`):
            Rewards; `nan` where a completion could not be scored.

    Returns:
        `torch.Tensor` of shape `(num_groups, num_generations)`: The baseline; `nan` where a group has no reward at all.
    """
    _check_shapes(rewards)
    return rewards.nanmean(dim=1, keepdim=True).expand_as(rewards)


def leave_one_out_baseline(rewards: Tensor) -> Tensor:
    r"""
    Mean reward of the *other* completions of the group, as in RLOO: \\( b_{n,i} = \frac{1}{G-1} \sum_{j \ne i} r_{n,j} \\).

    Unbiased ([Back to Basics](https://huggingface.co/papers/2402.14740), eq. 4). The advantages are G / (G - 1) times
    those of [`group_mean_baseline`].

    Args:
        rewards (`torch.Tensor` of shape `(num_groups, num_generations)`):
            Rewards; `nan` where a completion could not be scored.

    Returns:
        `torch.Tensor` of shape `(num_groups, num_generations)`: The baseline; `nan` where no other completion was scored.
    """
    return gradient_weighted_baseline(rewards, torch.ones_like(rewards))


def length_weighted_baseline(rewards: Tensor, lengths: Tensor, *, leave_one_out: bool = True) -> Tensor:
    r"""
    Length-weighted mean reward, as in OPO: \\( b_n = \sum_j l_j r_j / \sum_j l_j \\).

    The gradient-weighted baseline under the assumption that a score's squared norm grows with the number of tokens
    ([OPO](https://huggingface.co/papers/2505.23585), eq. 7, where `leave_one_out=False`). Equal lengths give
    [`leave_one_out_baseline`] (or [`group_mean_baseline`] with `leave_one_out=False`).

    Args:
        rewards (`torch.Tensor` of shape `(num_groups, num_generations)`):
            Rewards; `nan` where a completion could not be scored.
        lengths (`torch.Tensor` of shape `(num_groups, num_generations)`):
            Number of completion tokens that enter the loss.
        leave_one_out (`bool`, *optional*, defaults to `True`):
            Whether a completion is kept out of its own baseline.

    Returns:
        `torch.Tensor` of shape `(num_groups, num_generations)`: The baseline.
    """
    return gradient_weighted_baseline(rewards, lengths.to(rewards.dtype), leave_one_out=leave_one_out)


def gradient_weighted_baseline(
    rewards: Tensor, weights: Tensor, *, leave_one_out: bool = True, prior_strength: float = 0.0
) -> Tensor:
    r"""
    Variance-minimising baseline of OBLR-PO, with a prior from the other prompts of the batch:

    $$
    b_{n,i} = \frac{\sum_{j \ne i} w_{n,j} r_{n,j} + \kappa\, \overline{w r}_{(-n)}}
                   {\sum_{j \ne i} w_{n,j} + \kappa\, \overline{w}_{(-n)}}
    $$

    where \\( w = \|\nabla_\theta \log \pi(o)\|^2 \\) and the bars are means over the completions of all *other* groups.
    `prior_strength=0` is the plug-in estimate of \\( b^* = E[w r] / E[w] \\)
    ([OBLR-PO](https://huggingface.co/papers/2511.23310), Theorem 7). The prior, which is ours, counts as
    \\( \kappa \\) more completions: with few completions per prompt the plug-in is noisier than a plain mean, because w is
    heavy-tailed. Neither the prior nor the leave-one-out sum sees completion i, so the gradient stays unbiased.

    Equal weights without prior give [`leave_one_out_baseline`]; `prior_strength=math.inf` gives one baseline per group,
    taken from the other groups alone. Where all weights vanish, the plain mean of the other rewards is used. In a batch of
    one group there is no prior.

    Args:
        rewards (`torch.Tensor` of shape `(num_groups, num_generations)`):
            Rewards; `nan` where a completion could not be scored.
        weights (`torch.Tensor` of shape `(num_groups, num_generations)`):
            Non-negative weights, in any unit. Ignored where the reward is `nan`.
        leave_one_out (`bool`, *optional*, defaults to `True`):
            Whether a completion is kept out of its own baseline. `False` biases the gradient.
        prior_strength (`float`, *optional*, defaults to `0.0`):
            \\( \kappa \\), in completions; from 0 to `math.inf`.

    Returns:
        `torch.Tensor` of shape `(num_groups, num_generations)`: The baseline, in the dtype of `rewards`; `nan` where no
        other completion was scored and there is no prior.

    Raises:
        `ValueError`: If shapes differ, if `prior_strength` is negative or `nan`, or if a weight of a scored completion is
        negative or not finite.
    """
    _check_shapes(rewards, weights)
    if not prior_strength >= 0:
        raise ValueError(f"`prior_strength` must be at least 0 (it counts completions), got {prior_strength}.")
    scorable = ~rewards.isnan()
    w = torch.where(scorable, weights, 0.0).double()  # (N, G)
    r = torch.where(scorable, rewards, 0.0).double()  # (N, G)
    if not bool((w.isfinite() & (w >= 0)).all()):
        raise ValueError(
            "`weights` must be finite and non-negative wherever the reward is not nan. A nan or infinite weight means that "
            "the model's log-probabilities of that completion are not finite; look for overflow in the model."
        )
    sum_over = _sum_of_others if leave_one_out else _sum_of_all
    weight, weighted_reward = sum_over(w), sum_over(w * r)  # (N, G)

    num_others = _sum_of_others(scorable.double().sum(dim=1), dim=0).clamp(min=1).unsqueeze(1)  # (N, 1)
    prior_weight = _sum_of_others(w.sum(dim=1), dim=0).unsqueeze(1) / num_others
    prior_weighted_reward = _sum_of_others((w * r).sum(dim=1), dim=0).unsqueeze(1) / num_others
    if math.isinf(prior_strength):
        has_prior = prior_weight > 0
        weight = torch.where(has_prior, prior_weight, weight)
        weighted_reward = torch.where(has_prior, prior_weighted_reward, weighted_reward)
    else:
        weight = weight + prior_strength * prior_weight
        weighted_reward = weighted_reward + prior_strength * prior_weighted_reward

    plain_mean = sum_over(r) / sum_over(scorable.double())  # nan where nothing else was scored
    return torch.where(weight > 0, weighted_reward / weight, plain_mean).to(rewards.dtype)


def gradient_variance(rewards: Tensor, weights: Tensor, baselines: Tensor) -> float:
    r"""
    Mean of \\( w_i (r_i - b_i)^2 \\): the second moment of one completion's gradient, the objective that b* minimises.

    For any baseline that does not depend on its own completion this is an unbiased estimate, up to the constant
    \\( \|\nabla J\|^2 \\), of the variance which that baseline leaves ([OBLR-PO](https://huggingface.co/papers/2511.23310),
    Theorem 7). It therefore compares baselines on one batch, at no extra cost.

    Args:
        rewards (`torch.Tensor` of shape `(num_groups, num_generations)`):
            Rewards; `nan` where a completion could not be scored.
        weights (`torch.Tensor` of shape `(num_groups, num_generations)`):
            Squared score norms.
        baselines (`torch.Tensor` of shape `(num_groups, num_generations)`):
            Baselines; completions whose baseline is `nan` are left out.

    Returns:
        `float`: The mean over the scored completions, in units of reward² x weight; `nan` if there is none.
    """
    _check_shapes(rewards, weights, baselines)
    valid = ~(rewards.isnan() | baselines.isnan())
    contributions = weights.double() * (rewards.double() - baselines.double()).square()
    return contributions[valid].mean().item()


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


def _check_shapes(rewards: Tensor, *others: Tensor) -> None:
    if rewards.dim() != 2:
        raise ValueError(
            f"`rewards` must have shape (num_groups, num_generations), got {tuple(rewards.shape)}. Reshape a flat batch "
            "with `.view(-1, num_generations)`."
        )
    for other in others:
        if other.shape != rewards.shape:
            raise ValueError(f"Expected the shape of `rewards`, {tuple(rewards.shape)}, got {tuple(other.shape)}.")


def _sum_of_all(x: Tensor) -> Tensor:
    return x.sum(dim=1, keepdim=True).expand_as(x)


def _sum_of_others(x: Tensor, dim: int = 1) -> Tensor:
    """Sum of all entries along `dim` but the own one, without the cancellation of "total minus own"."""
    zero = torch.zeros_like(x.narrow(dim, 0, 1))
    before = torch.cat([zero, x.narrow(dim, 0, x.size(dim) - 1)], dim).cumsum(dim)
    after = torch.cat([zero, x.flip(dim).narrow(dim, 0, x.size(dim) - 1)], dim).cumsum(dim).flip(dim)
    return before + after
