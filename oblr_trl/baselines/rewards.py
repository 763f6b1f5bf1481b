"""The reward whose baseline is taken, from several reward functions: their sum, or the sum of what each is in its own deviations.

Shapes: N prompts, G completions per prompt, F reward functions. `nan` marks what a function could not score.
"""

import math

from torch import Tensor

from oblr_trl.baselines.reward_scale import SCALE_EPSILON


def summed_rewards(rewards_per_func: Tensor, weights: Tensor) -> Tensor:
    r"""
    Weighted sum of the rewards of all functions, \\( r_i = \sum_f \lambda_f r_{f,i} \\), over the functions that scored the completion.

    Args:
        rewards_per_func (`torch.Tensor` of shape `(N, G, F)`): Rewards.
        weights (`torch.Tensor` of shape `(F,)`): \\( \lambda_f \\).

    Returns:
        `torch.Tensor` of shape `(N, G)`: `nan` where no function scored the completion.
    """
    rewards = (rewards_per_func * weights).nansum(dim=2)
    return rewards.masked_fill(rewards_per_func.isnan().all(dim=2), math.nan)


def normalized_rewards(rewards_per_func: Tensor, weights: Tensor, *, by_group: bool) -> Tensor:
    r"""
    Weighted sum of normalised rewards (`multi_objective_aggregation="normalize_then_sum"`, GDPO):

    $$
    u_i = \sum_f \lambda_f \frac{r_{f,i} - \bar r_f}{\sigma_f + 10^{-4}}
    $$

    A baseline is linear in the rewards, so that the one of this sum is the sum of those of its terms, and the mean has no say: any
    baseline moves with it. What remains is the choice of \\( \sigma_f \\). `by_group=True` takes mean and deviation of the
    completion's own group, as TRL does: with the mean of the others as baseline the advantages are G / (G - 1) times TRL's. Under a
    prior, rewards of different prompts are averaged and need one unit, so `by_group=False` takes those of the whole batch; in a
    batch of one group both are the same. Either deviation contains the completion itself, the former as one of G and the latter as one
    of N G, which biases the gradient as TRL's own reward scaling does.

    Args:
        rewards_per_func (`torch.Tensor` of shape `(N, G, F)`): Rewards.
        weights (`torch.Tensor` of shape `(F,)`): \\( \lambda_f \\).
        by_group (`bool`): Whether to normalise over a group instead of the batch.

    Returns:
        `torch.Tensor` of shape `(N, G)`, in the dtype of the rewards: `nan` where no function scored the completion.
    """
    r = rewards_per_func.double()  # in which the mean of equal rewards is exact, and what the division enlarges is 0
    dim = (1,) if by_group else (0, 1)
    deviations = r - r.nanmean(dim=dim, keepdim=True)
    degrees = (~r.isnan()).sum(dim=dim, keepdim=True) - 1
    std = (deviations.square().nansum(dim=dim, keepdim=True) / degrees.clamp(min=1)).sqrt()
    return summed_rewards(deviations / (std + SCALE_EPSILON), weights.double()).to(rewards_per_func.dtype)
