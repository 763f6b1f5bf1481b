r"""Division of r - b by a standard deviation of rewards, as TRL's `scale_rewards="group"`, for baselines with a prior.

There b is not the mean of the group's rewards, and TRL's deviation of (nearly) equal rewards, which is about 0, would divide a
difference that is not. Here the deviation has the baseline's own prior, and leaves the completion out, as the baseline does.
"""

import math

import torch
from torch import Tensor

from oblr_trl.baselines.formulas import check_shapes, sum_of_others

# Added to a standard deviation of rewards, as in TRL; it keeps groups of equal rewards from dividing by zero.
SCALE_EPSILON = 1e-4


def leave_one_out_deviation(rewards: Tensor, *, prior_strength: float) -> Tensor:
    r"""
    Standard deviation of the group's *other* rewards, together with pseudo-completions of the other prompts:

    $$
    \sigma_{n,i}^2 = \overline{r^2} - \overline{r}^2, \qquad \overline{r^k} =
        \frac{\sum_{j \ne i} r_{n,j}^k + \kappa\, \overline{r^k}_{(-n)}}{G - 1 + \kappa}
    $$

    Without Bessel's correction. At least one pseudo-completion counts, so that a group of equal rewards has a deviation,
    unless all rewards of the batch are equal. `prior_strength=math.inf`, or one completion per prompt, gives the deviation over
    the completions of the other prompts. Where no other prompt was scored there is no prior: TRL's deviation of the group.

    What it does to the gradient: neither \\( \sigma_i \\) nor \\( b_i \\) depend on completion i, so that

    $$
    E\left[\frac{r_i - b_i}{\sigma_i} s_i\right]
        = E\left[\frac{1}{\sigma_i}\right] E[r_i s_i] - E\left[\frac{b_i}{\sigma_i}\right] E[s_i] = c_n \nabla J_n,
    \qquad c_n = E\left[\frac{1}{\sigma_i}\right]
    $$

    Unbiased up to a weight per prompt, larger for those that are nearly always or nearly never solved. GRPO has that weight
    too; its own deviation sees completion i, which adds a bias.

    Args:
        rewards (`torch.Tensor` of shape `(num_groups, num_generations)`):
            Rewards; `nan` where a completion could not be scored.
        prior_strength (`float`):
            Strength of the baseline's prior, \\( \kappa \\), in completions; below 1 it is 1.

    Returns:
        `torch.Tensor` of shape `(num_groups, num_generations)`: The deviation, in reward units and in the dtype of `rewards`.
    """
    check_shapes(rewards)
    scorable = ~rewards.isnan()
    r = torch.where(scorable, rewards, 0.0).double()  # (N, G)
    counts = scorable.double().sum(dim=1)  # (N,)

    # Two passes, about the mean: a difference of second moments would be lost where rewards are large.
    means = r.sum(dim=1) / counts.clamp(min=1)
    squares = torch.where(scorable, r - means.unsqueeze(1), 0.0).square().sum(dim=1)
    num_outside = sum_of_others(counts, dim=0)
    outside_mean = sum_of_others(r.sum(dim=1), dim=0) / num_outside.clamp(min=1)
    of_groups = (
        squares + counts * (means - outside_mean.unsqueeze(1)).square()
    )  # (N, N): of each group, about the mean of others
    outside_variance = of_groups.fill_diagonal_(0.0).sum(dim=1) / num_outside.clamp(min=1)

    if math.isinf(prior_strength):
        variance = outside_variance.unsqueeze(1).expand_as(r)
    else:
        strength = max(prior_strength, 1.0)
        num_others = sum_of_others(scorable.double()) + strength
        mean = (sum_of_others(r) + strength * outside_mean.unsqueeze(1)) / num_others
        others = scorable.unsqueeze(1) & ~torch.eye(r.size(1), dtype=torch.bool, device=r.device)  # (N, G, G)
        inside = torch.where(others, r.unsqueeze(1) - mean.unsqueeze(2), 0.0).square().sum(dim=2)
        outside = outside_variance.unsqueeze(1) + (outside_mean.unsqueeze(1) - mean).square()
        variance = (inside + strength * outside) / num_others
    own = (squares / (counts - 1).clamp(min=0)).unsqueeze(1)  # nan of a single reward, as in TRL
    return torch.where(num_outside.unsqueeze(1) > 0, variance, own).sqrt().to(rewards.dtype)


def scaled_advantages(rewards: Tensor, baselines: Tensor, *, prior_strength: float) -> Tensor:
    r"""
    \\( (r - b) / (\sigma + 10^{-4}) \\) with [`leave_one_out_deviation`], within \\( \pm \sqrt{K} \\) for K scored completions.

    The bound is what a reward can be away from the mean of K that it is one of, in their deviations. It matters where all
    other rewards are equal, as for the first right answer of a batch: they say nothing of how large a difference is, and 1e-4 would
    make it 10,000. Only where it takes effect is the gradient not \\( c_n \nabla J_n \\).

    Args:
        rewards (`torch.Tensor` of shape `(num_groups, num_generations)`):
            Rewards; `nan` where a completion could not be scored.
        baselines (`torch.Tensor` of shape `(num_groups, num_generations)`):
            Baselines, which do not depend on their own completion.
        prior_strength (`float`):
            As for [`leave_one_out_deviation`].

    Returns:
        `torch.Tensor` of shape `(num_groups, num_generations)`: The advantages; `nan` where reward or baseline are.
    """
    check_shapes(rewards, baselines)
    deviations = leave_one_out_deviation(rewards, prior_strength=prior_strength)
    bound = math.sqrt(max((~rewards.isnan()).sum().item(), 1))
    return ((rewards - baselines) / (deviations + SCALE_EPSILON)).clamp(-bound, bound)
