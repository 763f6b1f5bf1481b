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
pairs of different groups estimates \\( \| E\, d_n \|^2 \\) without bias: with d = g - g of RLOO, whose gradient is unbiased, it
is the squared bias, and may come out negative where there is none. Overlapping samples would not do: a pool's own scores do not
sum to zero, so each baseline would have another mean over one pool, though all share it over the population. All baselines see
the same partitions, and no completion occurs twice in the stream of batches that an automatic prior learns from.

Shapes: P prompts, M completions of each, K groups of G completions, N prompts per batch.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from oblr_trl.advantages import BaselineEstimator, GroupedBatch


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


class Method(NamedTuple):
    """
    A baseline and where its weights come from.

    Args:
        label (`str`): Name in tables.
        baseline (`str`): As [`BaselineEstimator`] names it; or `"none"`; or `"oracle"`: b* of the prompt's whole pool.
        weights (`str`, *optional*, defaults to `"equal"`): Source of the weights, a key of [`Pool`]'s, or `"equal"`.
        prior_strength (`float`, *optional*, defaults to `0.0`): Prior strength; `None` is the automatic one.
        unbiased (`bool`, *optional*, defaults to `True`): Whether its mean gradient is the policy gradient.
    """

    label: str
    baseline: str
    weights: str = "equal"
    prior_strength: float | None = 0.0
    unbiased: bool = True


class Measurement(NamedTuple):
    r"""What a method does to every prompt's gradient, as means over partitions: the variance \\( V_n \\) `(P,)`, and the estimate of
    the squared norm of its difference from RLOO's mean gradient `(P,)`."""

    variance: Tensor
    squared_bias: Tensor


RLOO = Method("RLOO (mean of the others)", "leave_one_out")


def group_gradient_grams(grams: Tensor, advantages: Tensor) -> Tensor:
    r"""Inner products \\( \langle g_{n,a}, g_{n,b} \rangle \\) `(P, K, K)` of the gradients of each prompt's groups, from those of its
    scores `(P, M, M)`, completions in the order of the groups, and advantages `(P, K, G)`."""
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


def advantages_in_turn(
    batches: Iterable[GroupedBatch], baseline: str = "gradient_weighted", prior_strength: float | None = None
) -> Iterator[Tensor]:
    """Advantages of batches that the trainer takes one after another: an automatic prior strength of a batch (`None`) comes from
    the batches before it."""
    estimator = BaselineEstimator(baseline, leave_one_out=True, prior_strength=prior_strength)
    for batch in batches:
        yield batch.rewards - estimator(batch)


def stream_advantages(pool: Pool, method: Method, *, num_generations: int, num_prompts: int) -> Tensor:
    """
    Advantages r - b of a whole pool, taken batch by batch, first the first group of all prompts.

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
    weights = torch.ones_like(pool.rewards) if method.weights == "equal" else pool.weights[method.weights]
    if method.baseline == "oracle":
        return rewards - ((weights * pool.rewards).sum(dim=1) / weights.sum(dim=1)).view(-1, 1, 1)
    lengths, weights = pool.lengths.view_as(rewards), weights.view_as(rewards)
    batches = [
        GroupedBatch(rewards[rows, group], lengths[rows, group], weights[rows, group])
        for group in range(rewards.size(1))
        for rows in torch.arange(rewards.size(0)).split(num_prompts)
    ]
    advantages = torch.cat(list(advantages_in_turn(batches, method.baseline, method.prior_strength)))  # (K * P, G)
    return advantages.unflatten(0, (rewards.size(1), -1)).transpose(0, 1)


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
    Variance and bias of every method, by its label.

    Args:
        pool ([`Pool`]): The completions.
        methods (`Sequence[Method]`): What to compare; all see the same partitions.
        num_generations (`int`): Group size G; must divide M, at least twice.
        num_prompts (`int`): Prompts per batch N; must divide P.
        num_partitions (`int`): Random partitions; each begins a new stream of batches.
        generator (`torch.Generator`): Source of the partitions.
    """
    zeros = torch.zeros(pool.rewards.size(0), dtype=torch.float64)
    totals = {method.label: Measurement(zeros.clone(), zeros.clone()) for method in methods}
    stream = {"num_generations": num_generations, "num_prompts": num_prompts}
    for _ in range(num_partitions):
        # The companions of a prompt in its batches change from partition to partition too.
        prompts = torch.randperm(pool.rewards.size(0), generator=generator)
        shuffled = pool.take(prompts, torch.rand(pool.rewards.shape, generator=generator).argsort(dim=1))
        reference = stream_advantages(shuffled, RLOO, **stream)
        for method in methods:
            advantages = stream_advantages(shuffled, method, **stream)
            grams = group_gradient_grams(shuffled.grams, advantages)
            bias_grams = group_gradient_grams(shuffled.grams, advantages - reference)
            totals[method.label].variance[prompts] += within_prompt_variances(grams) / num_partitions
            totals[method.label].squared_bias[prompts] += squared_mean_norms(bias_grams) / num_partitions
    return totals


def right_over_wrong(pool: Pool) -> float:
    """Mean exact weight of completions with the full reward of 1 over that of the others: below 1, the best baseline lies below the
    mean reward."""
    right, exact = pool.rewards >= 1, pool.weights["exact"]
    return (exact[right].mean() / exact[~right].mean()).item()
