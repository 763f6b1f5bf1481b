r"""Variance and bias of the policy gradient under any baseline, from inner products of scores alone: no gradient is held.

Differs from [`~oblr_trl.baselines.gradient_variance`], which is the objective that b* minimises and looks at one completion
at a time: here the per-prompt gradients themselves are compared, so whatever a baseline does to correlations counts.

The estimator. A pool holds M completions of each of P prompts. A random *partition* divides them into K = M / G disjoint
groups of G, and batch a takes the a-th group of each of its N prompts. Disjoint groups are independent samples, so for any
baseline the sample variance of the gradients \\( g_{n,a} = \frac{1}{G} \sum_i (r_i - b_i) s_i \\) over a,

$$
V_n = \frac{1}{K - 1} \sum_a \| g_{n,a} - \bar g_n \|^2,
$$

is an unbiased estimate of the variance that fresh completions of prompt n would give (at fixed prompts: the
prior of a batch counts as noise through its completions). Likewise the mean of \\( \langle d_{n,a}, d_{n,b} \rangle \\) over
pairs of different groups estimates \\( \| E\, d_n \|^2 \\) without bias: with d = g it is the signal, with d = g - g of RLOO,
whose gradient is unbiased, it is the squared bias, and may come out negative where there is none. Sub-samples that overlap
would not do: a pool's own scores do not sum to zero, so each baseline would have another mean over one pool, though all share
it over the population. All baselines see the same partitions, and no completion occurs twice in the stream of batches that an
automatic prior learns from.

Shapes: P prompts, M completions of each, K groups of G completions, N prompts per batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from oblr_trl.baselines import BaselineEstimator, GroupedBatch


@dataclass
class Pool:
    """
    Completions, their rewards and what is needed of their scores.

    Args:
        rewards (`torch.Tensor` of shape `(P, M)`): Rewards.
        lengths (`torch.Tensor` of shape `(P, M)`): Completion tokens.
        grams (`torch.Tensor` of shape `(P, M, M)`): Inner products of the scores of each prompt's completions.
        weights (`dict[str, torch.Tensor]`): Squared score norms `(P, M)` by their source, e.g. `"exact"` and `"all"`.
    """

    rewards: Tensor
    lengths: Tensor
    grams: Tensor
    weights: dict[str, Tensor]

    def take(self, prompts: Tensor, order: Tensor) -> "Pool":
        """The pool rearranged: `prompts` is a permutation of the prompts, `order` (P, M) one of the completions of each."""
        prompts = prompts.unsqueeze(1)  # (P, 1)
        return Pool(
            self.rewards[prompts, order],
            self.lengths[prompts, order],
            self.grams[prompts.unsqueeze(2), order.unsqueeze(2), order.unsqueeze(1)],
            {name: weights[prompts, order] for name, weights in self.weights.items()},
        )


@dataclass(frozen=True)
class Method:
    """
    A baseline and where its weights come from.

    Args:
        label (`str`): Name in tables.
        baseline (`str`): As [`BaselineEstimator`] names it; or `"none"`; or `"rescaled_group_mean"`, whose advantages are
            scaled by G / (G - 1), which gives them the mean gradient of the others (and makes them RLOO's); or `"oracle"`:
            b* of the prompt's whole pool.
        weights (`str`, *optional*, defaults to `"equal"`): Source of the weights, a key of [`Pool`]'s, or `"equal"`.
        prior_strength (`float`, *optional*, defaults to `0.0`): Prior strength; `None` is the automatic one.
        unbiased (`bool`, *optional*, defaults to `True`): Whether its mean gradient is the policy gradient.
    """

    label: str
    baseline: str
    weights: str = "equal"
    prior_strength: float | None = 0.0
    unbiased: bool = True


@dataclass
class Measurement:
    """
    What a method does to every prompt's gradient, as means over partitions.

    Args:
        variance (`torch.Tensor` of shape `(P,)`): \\( V_n \\).
        squared_signal (`torch.Tensor` of shape `(P,)`): Estimate of the squared norm of the prompt's mean gradient.
        squared_bias (`torch.Tensor` of shape `(P,)`): Estimate of the squared norm of its difference from RLOO's.
        objective (`float`): Mean of w (r - b)^2 with exact w, in units of the mean weight.
    """

    variance: Tensor
    squared_signal: Tensor
    squared_bias: Tensor
    objective: float = 0.0


RLOO = Method("RLOO (mean of the others)", "leave_one_out")


def group_gradient_grams(grams: Tensor, advantages: Tensor) -> Tensor:
    r"""
    Inner products \\( \langle g_{n,a}, g_{n,b} \rangle \\) of the gradients of one prompt's groups.

    Args:
        grams (`torch.Tensor` of shape `(P, M, M)`): Inner products of scores, completions in the order of the groups.
        advantages (`torch.Tensor` of shape `(P, K, G)`): r - b, with K G = M.

    Returns:
        `torch.Tensor` of shape `(P, K, K)`.
    """
    num_prompts, num_groups, group_size = advantages.shape
    blocks = grams.view(num_prompts, num_groups, group_size, num_groups, group_size)
    return torch.einsum("pag,pagbh,pbh->pab", advantages, blocks, advantages) / group_size**2


def within_prompt_variances(gradient_grams: Tensor) -> Tensor:
    r"""\\( V_n \\), the sample variance of each prompt's K group gradients, `(P,)`, from their Gram matrices `(P, K, K)`."""
    num_groups = gradient_grams.size(1)
    squares = gradient_grams.diagonal(dim1=1, dim2=2).sum(dim=1)
    return (squares - gradient_grams.sum(dim=(1, 2)) / num_groups) / (num_groups - 1)


def squared_mean_norms(gradient_grams: Tensor) -> Tensor:
    r"""Unbiased estimate of \\( \| E\, g_n \|^2 \\), `(P,)`: the mean inner product of different groups, from `(P, K, K)`."""
    num_groups = gradient_grams.size(1)
    squares = gradient_grams.diagonal(dim1=1, dim2=2).sum(dim=1)
    return (gradient_grams.sum(dim=(1, 2)) - squares) / (num_groups * (num_groups - 1))


def stream_advantages(pool: Pool, method: Method, *, num_generations: int, num_prompts: int) -> Tensor:
    """
    Advantages r - b of a whole pool, taken batch by batch as the trainer takes them; the automatic prior strength of a batch
    comes from the batches before it.

    Args:
        pool ([`Pool`]): Completions in the order of the groups.
        method ([`Method`]): The baseline.
        num_generations (`int`): Group size G; must divide M.
        num_prompts (`int`): Prompts per batch N; must divide P.

    Returns:
        `torch.Tensor` of shape `(P, K, G)`.
    """
    rewards = pool.rewards.unflatten(1, (-1, num_generations))  # (P, K, G)
    if method.baseline == "none":
        return rewards
    if method.baseline == "oracle":
        weights = pool.weights[method.weights]
        return rewards - ((weights * pool.rewards).sum(dim=1) / weights.sum(dim=1)).view(-1, 1, 1)
    lengths = pool.lengths.view_as(rewards)
    weights = (torch.ones_like(pool.rewards) if method.weights == "equal" else pool.weights[method.weights]).view_as(
        rewards
    )
    estimator = BaselineEstimator(
        method.baseline.removeprefix("rescaled_"), leave_one_out=True, prior_strength=method.prior_strength
    )
    advantages = torch.empty_like(rewards)
    for group in range(rewards.size(1)):
        for prompts in torch.arange(rewards.size(0)).split(num_prompts):
            batch = GroupedBatch(rewards[prompts, group], lengths[prompts, group], weights[prompts, group])
            advantages[prompts, group] = batch.rewards - estimator(batch)
            estimator.update(batch)
    if method.baseline == "rescaled_group_mean":
        advantages *= num_generations / (num_generations - 1)
    return advantages


def measure_methods(
    pool: Pool,
    methods: Sequence[Method],
    *,
    num_generations: int,
    num_prompts: int,
    num_partitions: int,
    generator: torch.Generator,
) -> dict[str, Measurement]:
    """
    Variance, signal and bias of every method, by its label.

    Args:
        pool ([`Pool`]): The completions, with the exact weights.
        methods (`Sequence[Method]`): What to compare; all see the same partitions.
        num_generations (`int`): Group size G; must divide M, at least twice.
        num_prompts (`int`): Prompts per batch N; must divide P.
        num_partitions (`int`): Random partitions; each begins a new stream of batches.
        generator (`torch.Generator`): Source of the partitions.
    """
    zeros = torch.zeros(pool.rewards.size(0), dtype=torch.float64)
    totals = {method.label: Measurement(zeros.clone(), zeros.clone(), zeros.clone()) for method in methods}
    for _ in range(num_partitions):
        # The companions of a prompt in its batches change from partition to partition too.
        prompts = torch.randperm(pool.rewards.size(0), generator=generator)
        order = torch.rand(pool.rewards.shape, generator=generator).argsort(dim=1)
        shuffled = pool.take(prompts, order)
        weights = shuffled.weights["exact"] / shuffled.weights["exact"].mean()
        stream = {"num_generations": num_generations, "num_prompts": num_prompts}
        reference = stream_advantages(shuffled, RLOO, **stream)
        for method in methods:
            advantages = stream_advantages(shuffled, method, **stream)
            grams = group_gradient_grams(shuffled.grams, advantages)
            bias_grams = group_gradient_grams(shuffled.grams, advantages - reference)
            total = totals[method.label]
            total.variance[prompts] += within_prompt_variances(grams) / num_partitions
            total.squared_signal[prompts] += squared_mean_norms(grams) / num_partitions
            total.squared_bias[prompts] += squared_mean_norms(bias_grams) / num_partitions
            total.objective += (weights * advantages.flatten(1).square()).mean().item() / num_partitions
    return totals


def describe_weights(pool: Pool) -> dict[str, dict[str, float]]:
    """
    What every source's weights say, and why a baseline gains.

    Returns:
        `dict`: By source, `right_over_wrong`, the mean weight of completions with the full reward of 1 over that of the others
        (below 1 the best baseline lies below the mean reward); and `log_slope`, by how much the logarithm of the weight grows
        with that of the exact one within prompts (1 for weights that are proportional; near 0 they tell nothing apart).
    """
    right = pool.rewards >= 1
    used = pool.weights["exact"] > 0

    def centred_logarithm(weights: Tensor) -> Tensor:
        logarithms = torch.where(used, weights.clamp(min=torch.finfo(weights.dtype).tiny).log(), torch.nan)
        return (logarithms - logarithms.nanmean(dim=1, keepdim=True)).nan_to_num(nan=0.0)

    exact = centred_logarithm(pool.weights["exact"])
    return {
        source: {
            "right_over_wrong": (weights[right].mean() / weights[~right].mean()).item(),
            "log_slope": ((exact * centred_logarithm(weights)).sum() / exact.square().sum()).item(),
        }
        for source, weights in pool.weights.items()
    }


def equivalent_group_size(variance: float, group_sizes: Sequence[int], variances: Sequence[float]) -> float:
    """
    Group size at which a reference has `variance`, from its variances at `group_sizes` (ascending): interpolated linearly in
    logarithms, and beyond the ends extrapolated with the slope of the last two points.

    Raises:
        `ValueError`: For fewer than two group sizes, or a variance that is not positive.
    """
    if len(group_sizes) < 2 or not all(value > 0 for value in (variance, *variances)):
        raise ValueError(
            f"`variances` {list(variances)} at `group_sizes` {list(group_sizes)}, compared with {variance}: two sizes and "
            "positive variances are needed. Add a group size, or choose prompts whose rewards differ."
        )
    x = torch.tensor(group_sizes, dtype=torch.float64).log()
    y = torch.tensor(variances, dtype=torch.float64).log()
    target = torch.tensor(variance, dtype=torch.float64).log()
    # The variance falls with the group size: the segment begins at the last point that is not below the target.
    start = int((y >= target).sum().clamp(1, len(x) - 1)) - 1
    slope = (y[start + 1] - y[start]) / (x[start + 1] - x[start])
    return (x[start] + (target - y[start]) / slope).exp().item()
