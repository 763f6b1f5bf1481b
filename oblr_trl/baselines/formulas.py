"""Baselines of GRPO, RLOO, OPO and OBLR-PO: what is subtracted from a reward before it weighs a policy score.

Shapes: N prompts (groups), G completions per prompt. Rewards, weights and baselines are `(N, G)`. A reward of `nan` marks
an unscorable completion; it leaves every sum. All sums run in float64 and over *the other* completions directly (never
as total minus own), so that a leave-one-out baseline does not depend on its own completion even by rounding.
"""

import math

import torch
from torch import Tensor

BASELINES = ("gradient_weighted", "group_mean", "leave_one_out", "length_weighted")


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
    check_shapes(rewards)
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
    rewards: Tensor,
    weights: Tensor,
    *,
    leave_one_out: bool = True,
    prior_strength: float = 0.0,
    memory: Tensor | None = None,
    memory_strength: float = 1.0,
) -> Tensor:
    r"""
    Variance-minimising baseline of OBLR-PO, with a prior from the other prompts of the batch and one from the prompt's past:

    $$
    b_{n,i} = \frac{\sum_{j \ne i} w_{n,j} r_{n,j} + \kappa\, \overline{w r}_{(-n)} + m\, \overline{w}_{(-n)} S_n(w r)}
                   {\sum_{j \ne i} w_{n,j} + \kappa\, \overline{w}_{(-n)} + m\, \overline{w}_{(-n)} S_n(w)}
    $$

    where \\( w = \|\nabla_\theta \log \pi(o)\|^2 \\) and the bars are means over the completions of all *other* groups.
    `prior_strength=0` is the plug-in estimate of \\( b^* = E[w r] / E[w] \\)
    ([OBLR-PO](https://huggingface.co/papers/2511.23310), Theorem 7). The prior, which is ours, counts as
    \\( \kappa \\) more completions: with few completions per prompt the plug-in is noisier than a plain mean, because w is
    heavy-tailed. \\( S_n \\), also ours, are the sums of a [`~prompt_memory.PromptMemory`] over earlier visits of the prompt, in
    units of a mean weight: each remembered completion counts as \\( m \\) of the batch. Neither the priors nor the leave-one-out
    sum see completion i, so the gradient stays unbiased.

    Equal weights without priors give [`leave_one_out_baseline`]; `prior_strength=math.inf` gives one baseline per group,
    taken from the other groups alone: memory has no say. Where all weights vanish, the plain mean of the other rewards is used.
    In a batch of one group there is no prior, nor a mean weight that memory could be measured in.

    Args:
        rewards (`torch.Tensor` of shape `(num_groups, num_generations)`):
            Rewards; `nan` where a completion could not be scored.
        weights (`torch.Tensor` of shape `(num_groups, num_generations)`):
            Non-negative weights, in any unit. Ignored where the reward is `nan`.
        leave_one_out (`bool`, *optional*, defaults to `True`):
            Whether a completion is kept out of its own baseline. `False` biases the gradient.
        prior_strength (`float`, *optional*, defaults to `0.0`):
            \\( \kappa \\), in completions; from 0 to `math.inf`.
        memory (`torch.Tensor` of shape `(num_groups, 2)`, *optional*):
            \\( S_n(w r) \\) and \\( S_n(w) \\) of each prompt; zeros where it was never seen.
        memory_strength (`float`, *optional*, defaults to `1.0`):
            \\( m \\), in completions per remembered completion; at least 0 and finite.

    Returns:
        `torch.Tensor` of shape `(num_groups, num_generations)`: The baseline, in the dtype of `rewards`; `nan` where no
        other completion was scored and there is neither prior nor memory.

    Raises:
        `ValueError`: If shapes differ, if a strength is negative or `nan`, or if a weight of a scored completion is
        negative or not finite.
    """
    check_shapes(rewards, weights)
    if not prior_strength >= 0:
        raise ValueError(f"`prior_strength` must be at least 0 (it counts completions), got {prior_strength}.")
    if not 0 <= memory_strength < math.inf:
        raise ValueError(
            f"`memory_strength` must be at least 0 and finite (it multiplies completions), got {memory_strength}."
        )
    if memory is not None and memory.shape != (len(rewards), 2):
        raise ValueError(f"`memory` must have two sums per group, {(len(rewards), 2)}, got {tuple(memory.shape)}.")
    scorable = ~rewards.isnan()
    w = torch.where(scorable, weights, 0.0).double()  # (N, G)
    r = torch.where(scorable, rewards, 0.0).double()  # (N, G)
    if not bool((w.isfinite() & (w >= 0)).all()):
        raise ValueError(
            "`weights` must be finite and non-negative wherever the reward is not nan. A nan or infinite weight means that "
            "the model's log-probabilities of that completion are not finite; look for overflow in the model."
        )
    sum_over = sum_of_others if leave_one_out else _sum_of_all
    weight, weighted_reward = sum_over(w), sum_over(w * r)  # (N, G)

    num_others = sum_of_others(scorable.double().sum(dim=1), dim=0).clamp(min=1).unsqueeze(1)  # (N, 1)
    prior_weight = sum_of_others(w.sum(dim=1), dim=0).unsqueeze(1) / num_others
    prior_weighted_reward = sum_of_others((w * r).sum(dim=1), dim=0).unsqueeze(1) / num_others
    if math.isinf(prior_strength):
        has_prior = prior_weight > 0
        weight = torch.where(has_prior, prior_weight, weight)
        weighted_reward = torch.where(has_prior, prior_weighted_reward, weighted_reward)
    else:
        weight = weight + prior_strength * prior_weight
        weighted_reward = weighted_reward + prior_strength * prior_weighted_reward
        if memory is not None:
            remembered = memory_strength * prior_weight * memory  # (N, 2)
            weight = weight + remembered[:, 1:]
            weighted_reward = weighted_reward + remembered[:, :1]

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
    check_shapes(rewards, weights, baselines)
    valid = ~(rewards.isnan() | baselines.isnan())
    contributions = weights.double() * (rewards.double() - baselines.double()).square()
    return contributions[valid].mean().item()


def check_shapes(rewards: Tensor, *others: Tensor) -> None:
    """Raise a `ValueError` unless `rewards` has one row per group and all tensors have its shape."""
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


def sum_of_others(x: Tensor, dim: int = 1) -> Tensor:
    """Sum of all entries along `dim` but the own one, without the cancellation of "total minus own"."""
    values = x.cpu()  # a cumulative sum on a GPU is not deterministic: `full_determinism` refuses it
    zero = torch.zeros_like(values.narrow(dim, 0, 1))
    before = torch.cat([zero, values.narrow(dim, 0, x.size(dim) - 1)], dim).cumsum(dim)
    after = torch.cat([zero, values.flip(dim).narrow(dim, 0, x.size(dim) - 1)], dim).cumsum(dim).flip(dim)
    return (before + after).to(x.device)
