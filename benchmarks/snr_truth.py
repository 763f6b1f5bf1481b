r"""True signal, noise and rho from full gradients of all parameters: no sketch, no clamp, no batch.

The signal needs no sampling at all where only one completion of a problem earns a reward: \\( \nabla J = \sum_q p(q)\,
\nabla \pi(o^*_q | q) \\), summed over all problems, is the limit of infinitely many rollouts. Rollouts check it, and give
the noise: with K independent batches of N prompts and the advantages that the trainer's baseline gives in each,

$$
\|\nabla J\|^2 \approx \frac{1}{K (K - 1)} \sum_{b \ne c} \langle \hat g_b, \hat g_c \rangle, \qquad
\mathrm{tr}(H) \approx \overline{\|g_n\|^2} - \|\nabla J\|^2
$$

are unbiased. Prompts of one batch share the prior of the baseline, so N times the variance of \\( \hat g_b \\) need not be
tr(H): it is measured too.

Shapes: K batches of N prompts, G completions per prompt, D parameters.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.snr_rollouts import Rollouts


class BatchGradients(NamedTuple):
    """
    Exact gradients of many batches.

    Args:
        means (`torch.Tensor` of shape `(K, D)`): Mean gradient of every batch.
        squared_norms (`torch.Tensor` of shape `(K,)`): Mean over the batch's prompts of the squared norm of their gradients.
    """

    means: Tensor
    squared_norms: Tensor


@dataclass(frozen=True)
class Estimate:
    """A number and its standard error, by the jackknife over batches."""

    value: float
    standard_error: float


@dataclass(frozen=True)
class Truth:
    """
    What is true of one policy.

    Args:
        gradient (`torch.Tensor` of shape `(D,)`): The expected gradient.
        signal (`float`): Its squared norm.
        noise ([`Estimate`]): tr(H) of a prompt's gradient.
        rollout_signal ([`Estimate`]): The signal again, from the rollouts alone.
        rollout_projection ([`Estimate`]): Inner product of the rollouts' mean gradient and the expected one over the
            signal: 1 if the expected gradient is what the rollouts have on average.
        batch_noise_ratio ([`Estimate`]): N times the variance of a batch's mean gradient over tr(H); 1 if the prompts of a
            batch are independent.
    """

    gradient: Tensor
    signal: float
    noise: Estimate
    rollout_signal: Estimate
    rollout_projection: Estimate
    batch_noise_ratio: Estimate

    def rho(self, num_prompts: int, *, noise_factor: float = 1.0) -> Estimate:
        """rho of a step of `num_prompts` prompts whose noise is `noise_factor` times that of the truth's own batches."""
        noise = self.noise.value * noise_factor / num_prompts
        value = self.signal / (self.signal + noise)
        # d rho / d noise = -rho (1 - rho) / noise
        return Estimate(value, value * (1 - value) * self.noise.standard_error / self.noise.value)


def expected_gradient(
    model: Any, sequences: Sequence[tuple[Tensor, Tensor, Tensor]], shares: Sequence[Tensor]
) -> tuple[Tensor, float]:
    r"""
    Gradient of the expected reward \\( \sum_q p(q) \pi(o^*_q | q) \\), and that expectation.

    Args:
        model ([`~transformers.PreTrainedModel`]): The policy.
        sequences (`Sequence`): Chunks of `input_ids`, `attention_mask` and `completion_mask` of the rewarded sequences.
        shares (`Sequence[torch.Tensor]`): p(q) of each chunk's problems.
    """
    parameters = _trainable(model)
    gradient, reward = torch.zeros(sum(parameter.numel() for parameter in parameters), dtype=torch.float64), 0.0
    for chunk, share in zip(sequences, shares, strict=True):
        objective = (share * _sequence_logps(model, *chunk).exp()).sum()
        gradient += _flat_gradient(objective, parameters)
        reward += objective.item()
    return gradient, reward


def exact_batch_gradients(
    model: Any,
    rollouts: Rollouts,
    advantages: Tensor,
    *,
    num_prompts: int,
    on_prompt: Callable[[], object] = lambda: None,
) -> BatchGradients:
    r"""
    Full gradients \\( g_n = \frac{1}{G} \sum_i A_{n,i} s_i \\), by one backward per prompt.

    Args:
        model ([`~transformers.PreTrainedModel`]): The policy.
        rollouts ([`Rollouts`]): Its rollouts.
        advantages (`torch.Tensor` of shape `(P, G)`): Advantages, batch after batch.
        num_prompts (`int`): Prompts per batch, N; must divide P.
        on_prompt (`Callable`, *optional*): Called after every prompt.
    """
    parameters = _trainable(model)
    num_batches = advantages.size(0) // num_prompts
    means = torch.zeros(num_batches, sum(parameter.numel() for parameter in parameters), dtype=parameters[0].dtype)
    squared_norms = torch.zeros(num_batches, dtype=torch.float64)
    for prompt in range(num_batches * num_prompts):
        rows, places = rollouts.sequences[prompt].unique(return_inverse=True)
        weights = torch.zeros(rows.numel(), dtype=means.dtype).index_add_(
            0, places, advantages[prompt].to(means.dtype)
        )
        objective = (weights * _sequence_logps(model, *rollouts.trimmed(rows))).sum() / advantages.size(1)
        gradient = _flat_gradient(objective, parameters)
        means[prompt // num_prompts] += gradient / num_prompts
        squared_norms[prompt // num_prompts] += gradient.double().square().sum() / num_prompts
        on_prompt()
    return BatchGradients(means, squared_norms)


def _trainable(model: Any) -> list[Tensor]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _flat_gradient(objective: Tensor, parameters: list[Tensor]) -> Tensor:
    return torch.cat([part.flatten() for part in torch.autograd.grad(objective, parameters)])


def _sequence_logps(model: Any, input_ids: Tensor, attention_mask: Tensor, completion_mask: Tensor) -> Tensor:
    num_tokens = completion_mask.size(1)
    logits = model(
        input_ids=input_ids, attention_mask=attention_mask, use_cache=False, logits_to_keep=num_tokens + 1
    ).logits
    logps = logits[:, :-1].log_softmax(dim=-1).gather(-1, input_ids[:, -num_tokens:].unsqueeze(-1)).squeeze(-1)
    return (logps * completion_mask).sum(dim=1)


def gradient_truth(gradients: BatchGradients, expected: Tensor, *, num_prompts: int) -> Truth:
    """
    Truth and standard errors.

    Args:
        gradients ([`BatchGradients`]): Exact gradients of at least three batches.
        expected (`torch.Tensor` of shape `(D,)`): The expected gradient.
        num_prompts (`int`): Prompts per batch.
    """
    num_batches = gradients.means.size(0)
    assert num_batches >= 3, "a jackknife of pairs needs three batches"
    expected = expected.double()
    signal = expected.square().sum().item()
    total = gradients.means.sum(dim=0, dtype=torch.float64)
    dots = torch.stack([row.double() @ total for row in gradients.means])
    squares = torch.stack([row.double().square().sum() for row in gradients.means])
    projections = torch.stack([row.double() @ expected for row in gradients.means]) / signal

    def statistics(count: int, square: Tensor, squares: Tensor, norms: Tensor, projections: Tensor) -> Tensor:
        """Noise, signal of the rollouts, projection and ratio, from sums over `count` batches."""
        noise = norms / count - signal
        batch_noise = num_prompts * (squares / count - signal)
        pairs = (square - squares) / (count * (count - 1))
        return torch.stack([noise, pairs, projections / count, batch_noise / noise], dim=-1)

    sums = (squares, gradients.squared_norms, projections)
    square = total @ total
    whole = statistics(num_batches, square, *(values.sum() for values in sums))
    without = statistics(num_batches - 1, square - 2 * dots + squares, *(values.sum() - values for values in sums))
    estimates = [Estimate(whole[i].item(), jackknife_error(without[:, i])) for i in range(4)]
    return Truth(expected.float(), signal, *estimates)


def jackknife_error(leave_one_out: Tensor) -> float:
    """Standard error of a statistic from its values without each of the parts."""
    count = leave_one_out.size(0)
    return math.sqrt((count - 1) / count * (leave_one_out - leave_one_out.mean()).square().sum().item())
