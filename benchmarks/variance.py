r"""Variance of the policy gradient under any baseline, from inner products of scores alone: no gradient is held.

Differs from [`~oblr_trl.baselines.gradient_variance`], which is the objective that b* minimises and looks at one completion
at a time: here the per-prompt gradients themselves are compared, so whatever a baseline does to correlations counts.

The estimator. A pool holds M completions of each of P prompts. A random *partition* divides them into K = M / G disjoint
groups of G, and batch a takes the a-th group of each of its N prompts. Disjoint groups are independent samples, so for any
baseline the sample variance of the gradients \\( g_{n,a} = \frac{1}{G} \sum_i (r_i - b_i) s_i \\) over a,

$$
V_n = \frac{1}{K - 1} \sum_a \| g_{n,a} - \bar g_n \|^2,
$$

is an unbiased estimate of the variance that fresh completions of prompt n would give (at fixed prompts: the
prior of a batch counts as noise through its completions). Sub-samples that overlap would not do: a pool's own scores do not
sum to zero, so each baseline would have another mean over one pool, though all share it over the population. All baselines
see the same partitions, and no completion occurs twice in the stream of batches that an automatic prior learns from.

Shapes: P prompts, M completions of each, K groups of G completions, N prompts per batch.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

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
        weights (`dict[str, torch.Tensor]`): Squared score norms `(P, M)` by their source, e.g. `"exact"` and `"sketch"`.
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
        baseline (`str`): As [`BaselineEstimator`] names it, or `"oracle"`: b* of the prompt's whole pool.
        weights (`str`): Source of the weights, a key of [`Pool`]'s, or `"equal"`.
        prior_strength (`float`, *optional*, defaults to `0.0`): Prior strength; `None` is the automatic one.
    """

    label: str
    baseline: str
    weights: str = "equal"
    prior_strength: float | None = 0.0


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
        `torch.Tensor` of shape `(P, K, G)`. The group mean's are scaled by G / (G - 1), which gives them the mean gradient of
        the others (and makes them RLOO's).
    """
    rewards = pool.rewards.unflatten(1, (-1, num_generations))  # (P, K, G)
    if method.baseline == "oracle":
        weights = pool.weights[method.weights]
        return rewards - ((weights * pool.rewards).sum(dim=1) / weights.sum(dim=1)).view(-1, 1, 1)
    lengths = pool.lengths.view_as(rewards)
    weights = (torch.ones_like(pool.rewards) if method.weights == "equal" else pool.weights[method.weights]).view_as(
        rewards
    )
    estimator = BaselineEstimator(method.baseline, leave_one_out=True, prior_strength=method.prior_strength)
    advantages = torch.empty_like(rewards)
    for group in range(rewards.size(1)):
        for prompts in torch.arange(rewards.size(0)).split(num_prompts):
            batch = GroupedBatch(rewards[prompts, group], lengths[prompts, group], weights[prompts, group])
            advantages[prompts, group] = batch.rewards - estimator(batch)
    if method.baseline == "group_mean":
        advantages *= num_generations / (num_generations - 1)
    return advantages


def mean_variances(
    pool: Pool,
    methods: Sequence[Method],
    *,
    num_generations: int,
    num_prompts: int,
    num_partitions: int,
    generator: torch.Generator,
    on_partition: Callable[[], object] = lambda: None,
) -> dict[str, float]:
    """
    Mean of \\( V_n \\) over prompts and random partitions, by the method's label.

    Args:
        pool ([`Pool`]): The completions.
        methods (`Sequence[Method]`): What to compare; all see the same partitions.
        num_generations (`int`): Group size G; must divide M, at least twice.
        num_prompts (`int`): Prompts per batch N; must divide P.
        num_partitions (`int`): Random partitions; each begins a new stream of batches.
        generator (`torch.Generator`): Source of the partitions.
        on_partition (`Callable`, *optional*): Called after every partition.
    """
    totals = dict.fromkeys([method.label for method in methods], 0.0)
    for _ in range(num_partitions):
        # The companions of a prompt in its batches change from partition to partition too.
        prompts = torch.randperm(pool.rewards.size(0), generator=generator)
        order = torch.rand(pool.rewards.shape, generator=generator).argsort(dim=1)
        shuffled = pool.take(prompts, order)
        for method in methods:
            advantages = stream_advantages(shuffled, method, num_generations=num_generations, num_prompts=num_prompts)
            grams = group_gradient_grams(shuffled.grams, advantages)
            totals[method.label] += within_prompt_variances(grams).mean().item() / num_partitions
        on_partition()
    return totals
