r"""Variance of the policy gradient under any baseline, from inner products of scores alone: no gradient is held.

Differs from [`~oblr_trl.baselines.gradient_variance`], which is the objective that b* minimises and looks at one
completion at a time: here the per-prompt gradients themselves are compared, so whatever a baseline does to
correlations counts.

The estimator. A pool holds M completions of each of P prompts. A random *partition* divides them into K = M / G
disjoint groups of G, and batch a takes the a-th group of each of its N prompts. Disjoint groups are independent
samples, so for any baseline the sample variance of the gradients \\( g_{n,a} = \frac{1}{G} \sum_i (r_i - b_i) s_i \\)
over a,

$$
V_n = \frac{1}{K - 1} \sum_a \| g_{n,a} - \bar g_n \|^2,
$$

is an unbiased estimate of the variance that fresh completions of prompt n would give (at fixed prompts: the prior of a
batch counts as noise through its completions). Overlapping samples would not do: a pool's own scores do not sum to
zero, so each baseline would have another mean over one pool, though all share it over the population. All baselines
see the same partitions, and no completion occurs twice in the stream of batches that an automatic prior learns from.

Shapes: P prompts, M completions of each, K groups of G completions, N prompts per batch.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from oblr_trl.baselines import BaselineEstimator, GroupedBatch


@dataclass
class Pool:
    """Completions, their rewards and figures of their scores."""

    rewards: Tensor  # (P, M)
    lengths: Tensor  # (P, M), in tokens
    grams: Tensor  # (P, M, M), inner products of the scores of each prompt's completions
    weights: dict[str, Tensor]  # squared score norms (P, M) by their source, e.g. "exact" and "all"

    def take(self, prompts: Tensor, order: Tensor) -> "Pool":
        """The pool rearranged: `prompts` permutes the prompts, `order` (P, M) the completions of each."""
        prompts = prompts.unsqueeze(1)  # (P, 1)
        return Pool(
            self.rewards[prompts, order],
            self.lengths[prompts, order],
            self.grams[prompts.unsqueeze(2), order.unsqueeze(2), order.unsqueeze(1)],
            {name: weights[prompts, order] for name, weights in self.weights.items()},
        )


class Method(NamedTuple):
    """A baseline and the source of its weights."""

    label: str
    baseline: str  # as `BaselineEstimator` names it; or "none"; or "oracle", b* of the prompt's whole pool
    weights: str = "equal"  # or a key of `Pool.weights`
    prior_strength: float | None = 0.0  # `None` is the automatic one
    unbiased: bool = True  # whether its mean gradient is the policy gradient


RLOO = Method("RLOO (mean of the others)", "leave_one_out")


def group_gradient_grams(grams: Tensor, advantages: Tensor) -> Tensor:
    r"""Inner products \\( \langle g_{n,a}, g_{n,b} \rangle \\) `(P, K, K)` of the gradients of each prompt's groups,
    from those of its scores `(P, M, M)`, completions in the order of the groups, and advantages `(P, K, G)`."""
    num_prompts, num_groups, group_size = advantages.shape
    blocks = grams.view(num_prompts, num_groups, group_size, num_groups, group_size)
    return torch.einsum("pag,pagbh,pbh->pab", advantages, blocks, advantages) / group_size**2


def within_prompt_variances(gradient_grams: Tensor) -> Tensor:
    r"""\\( V_n \\) `(P,)`, the sample variance of each prompt's K group gradients with Gram matrices `(P, K, K)`."""
    num_groups = gradient_grams.size(1)
    squares = gradient_grams.diagonal(dim1=1, dim2=2).sum(dim=1)
    return (squares - gradient_grams.sum(dim=(1, 2)) / num_groups) / (num_groups - 1)


def advantages_in_turn(
    batches: Iterable[GroupedBatch], baseline: str = "gradient_weighted", prior_strength: float | None = None
) -> Iterator[Tensor]:
    """Advantages of batches that the trainer takes one after another: an automatic prior strength of a batch (`None`)
    comes from the batches before it."""
    estimator = BaselineEstimator(baseline, leave_one_out=True, prior_strength=prior_strength)
    for batch in batches:
        yield batch.rewards - estimator(batch)
        estimator.update(batch)


def stream_advantages(pool: Pool, method: Method, *, num_generations: int, num_prompts: int) -> Tensor:
    """Advantages r - b of a whole pool `(P, K, G)`, in batches of `num_prompts`; first come all first groups."""
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
) -> dict[str, Tensor]:
    """Variance of every prompt's gradient `(P,)` under every method, by its label: the mean over random partitions,
    which all methods share and each of which begins a new stream of batches."""
    variances = {method.label: torch.zeros(pool.rewards.size(0), dtype=torch.float64) for method in methods}
    for _ in range(num_partitions):
        # The companions of a prompt in its batches change from partition to partition too.
        prompts = torch.randperm(pool.rewards.size(0), generator=generator)
        shuffled = pool.take(prompts, torch.rand(pool.rewards.shape, generator=generator).argsort(dim=1))
        for method in methods:
            advantages = stream_advantages(shuffled, method, num_generations=num_generations, num_prompts=num_prompts)
            grams = group_gradient_grams(shuffled.grams, advantages)
            variances[method.label][prompts] += within_prompt_variances(grams) / num_partitions
    return variances


def right_over_wrong(pool: Pool) -> float:
    """Mean exact weight of completions with the full reward of 1 over that of the others: below 1, the best baseline
    lies below the mean reward."""
    right, exact = pool.rewards >= 1, pool.weights["exact"]
    return (exact[right].mean() / exact[~right].mean()).item()
