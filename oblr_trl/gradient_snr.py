"""Signal and noise of the policy gradient, from per-prompt gradients of one batch, and the learning-rate multiplier rho.

Shapes: N prompts, k coordinates of a gradient (or of a sketch that preserves inner products). Plain numbers come out.
"""

import copy
import math
from typing import NamedTuple

import torch
from torch import Tensor

# Fewer prompts per step make rho mostly noise: with 64 its typical error is already 25 % (`benchmarks.snr`).
MIN_PROMPTS = 16


class GradientMoments(NamedTuple):
    r"""
    What one batch says about the gradient.

    Args:
        signal (`float`):
            Unbiased estimate of \\( \|\nabla J\|^2 \\). May be negative.
        noise (`float`):
            Unbiased estimate of tr(H), the trace of the covariance of a per-prompt gradient.
    """

    signal: float
    noise: float


def gradient_moments(per_prompt_gradients: Tensor) -> GradientMoments:
    r"""
    Unbiased estimates of \\( \|\nabla J\|^2 \\) and tr(H) from the per-prompt gradients \\( g_n \\) of one batch:

    $$
    \text{noise} = \frac{1}{N-1} \sum_n \|g_n - \hat g\|^2, \qquad \text{signal} = \|\hat g\|^2 - \text{noise} / N
    $$

    (the quantities of [OBLR-PO](https://huggingface.co/papers/2511.23310), Theorem 4; the estimators are ours). Identical
    gradients give noise 0. With sketches in place of gradients both stay unbiased over the draw of the projections.

    Args:
        per_prompt_gradients (`torch.Tensor` of shape `(num_prompts, k)`):
            One row per prompt: the mean over its completions of advantage x score.

    Returns:
        [`GradientMoments`]: Both `nan` for fewer than two prompts.
    """
    gradients = per_prompt_gradients.double()
    num_prompts = gradients.size(0)
    if num_prompts < 2:
        return GradientMoments(math.nan, math.nan)
    mean = gradients.mean(dim=0)
    noise = (gradients - mean).square().sum().item() / (num_prompts - 1)
    return GradientMoments(mean.square().sum().item() - noise / num_prompts, noise)


def rho(signal: float, noise: float, num_prompts: float) -> float:
    r"""
    Learning-rate multiplier \\( \rho = N\,\mathrm{SNR} / (1 + N\,\mathrm{SNR}) \\) with
    \\( \mathrm{SNR} = \|\nabla J\|^2 / \mathrm{tr}(H) \\).

    Computed as signal / (signal + noise / N) with a negative signal read as 0
    ([OBLR-PO](https://huggingface.co/papers/2511.23310), Theorem 4). No noise gives 1, no signal gives 0.

    Args:
        signal (`float`):
            Estimate of the squared norm of the expected gradient.
        noise (`float`):
            Estimate of the trace of the covariance of a per-prompt gradient.
        num_prompts (`float`):
            Prompts that one optimizer step averages.

    Returns:
        `float`: \\( \rho \\) in [0, 1]; `nan` if both are zero or unknown.
    """
    signal = max(signal, 0.0) if not math.isnan(signal) else signal
    total = signal + noise / num_prompts
    return signal / total if total > 0 else math.nan


class GradientSNR:
    r"""
    Smooths signal and noise separately and forms the ratio afterwards.

    The signal of a single batch is often negative, so a mean of ratios would be biased; a ratio of means is not clamped
    before it is smoothed. `signal` and `noise` are bias-corrected: after t batches the weights of all
    batches sum to one.

    Args:
        decay (`float`, *optional*, defaults to `0.0`):
            Decay of both moving averages, in [0, 1). `0.0` uses the current batch alone, as the paper does.
    """

    def __init__(self, *, decay: float = 0.0) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"`decay` must be in [0, 1), got {decay}.")
        self.decay = decay
        self._signal = 0.0
        self._noise = 0.0
        self._weight = 0.0

    @property
    def signal(self) -> float:
        """Smoothed signal; `nan` before the first batch."""
        return self._signal / self._weight if self._weight else math.nan

    @property
    def noise(self) -> float:
        """Smoothed noise; `nan` before the first batch."""
        return self._noise / self._weight if self._weight else math.nan

    def rho(self, num_prompts: float) -> float:
        """
        [`rho`] of a signal that starts from 0 and is not bias-corrected, hence small while batches are few: the estimate of the first ones is
        mostly chance, and a rate that follows it loses the policy where AdamW moves furthest. `nan` before the first batch.
        """
        return rho(self._signal, self.noise, num_prompts)

    def update(self, moments: GradientMoments) -> None:
        """Take in one batch. One without information changes nothing: fewer than two prompts (`nan`), or advantages that are
        all zero, as equal rewards make them."""
        if math.isnan(moments.signal) or math.isnan(moments.noise) or moments == (0.0, 0.0):
            return
        self._signal = self.decay * self._signal + (1 - self.decay) * moments.signal
        self._noise = self.decay * self._noise + (1 - self.decay) * moments.noise
        self._weight = self.decay * self._weight + (1 - self.decay)

    def state_dict(self) -> dict[str, float]:
        """State as plain numbers."""
        return {"signal": self._signal, "noise": self._noise, "weight": self._weight}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Restore a state of [`state_dict`][GradientSNR.state_dict]."""
        self._signal, self._noise, self._weight = (float(state[key]) for key in ("signal", "noise", "weight"))


class StepGradientSNR:
    """
    [`GradientSNR`] of optimizer steps, whose prompts may come in several generation batches.

    The batches of one step are pooled and enter the moving averages once. With one batch per step this is
    [`GradientSNR.update`].

    Args:
        averages ([`GradientSNR`]): Moving averages of the steps before; the attribute includes the step at hand.
    """

    def __init__(self, averages: GradientSNR) -> None:
        self.averages = averages
        self.restart()

    def restart(self) -> None:
        """Begin anew: the next batch belongs to another step, whatever its number."""
        self._step: int | None = None
        self._gradients: list[Tensor] = []
        self._earlier_steps = self.averages
        self.num_prompts = 0.0  # that have entered the step so far

    @property
    def num_batches(self) -> int:
        """Generation batches that have entered the step so far."""
        return len(self._gradients)

    def add(
        self, per_prompt_gradients: Tensor, *, step: int, sampling_variance: float = 0.0, share: float = 1.0
    ) -> float:
        r"""
        Take in a generation batch and return \\( \rho \\) of the optimizer step `step`.

        Args:
            per_prompt_gradients (`torch.Tensor` of shape `(num_prompts, k)`):
                Gradients of the batch's prompts, in the unit that the loss gives them.
            step (`int`):
                Index of the optimizer step at hand.
            sampling_variance (`float`, *optional*, defaults to `0.0`):
                [`sampling_variance`] where several optimizer steps share the generation batch. It counts as noise, so that
                `noise / N` is the variance of one step's gradient.
            share (`float`, *optional*, defaults to `1.0`):
                Part of the batch's prompts that these are. Signal and noise are estimated from them, N counts all.

        Returns:
            `float`: \\( \rho \\) in [0, 1]; `nan` while there is no estimate, and for fewer than two prompts.
        """
        if step != self._step:
            self.restart()
            self._step = step
        self._gradients.append(per_prompt_gradients)
        self.num_prompts += per_prompt_gradients.size(0) / share
        signal, noise = gradient_moments(torch.cat(self._gradients))
        self.averages = copy.copy(self._earlier_steps)
        self.averages.update(GradientMoments(signal, noise + self.num_prompts * sampling_variance))
        return self.averages.rho(self.num_prompts) if self.num_prompts > 1 else math.nan


def sampling_variance(sketches: Tensor, advantages: Tensor, num_steps: float) -> float:
    r"""
    What drawing the completions of one optimizer step from a generation batch adds to the variance of the step's gradient.

    A batch of n completions is shuffled and cut into S steps, so that a step averages n / S of the \\( y_i = A_i z_i \\), drawn
    without replacement, over all prompts:

    $$
    \mathrm{tr\,Var}(\hat g_\text{step}) = \frac{\mathrm{tr}\,H}{N} + \frac{S - 1}{n}\,\sigma^2, \qquad
    \sigma^2 = \frac{1}{n - 1} \sum_i \|y_i - \bar y\|^2
    $$

    the second term of which is returned (law of total variance; the first is that of the whole batch's gradient). One step per
    batch adds nothing. Several processes shuffle their own rows only, which makes the term smaller by the spread of their means.

    Args:
        sketches (`torch.Tensor` of shape `(num_groups, num_generations, k)`):
            Score sketches.
        advantages (`torch.Tensor` of shape `(num_groups, num_generations)`):
            Advantages; `nan` where a completion was not scored.
        num_steps (`float`):
            S, the optimizer steps that share the batch, at least 1.

    Returns:
        `float`: The added variance, in units of a squared gradient; 0 for fewer than two scored completions.
    """
    scorable = ~advantages.isnan()
    n = int(scorable.sum())
    if num_steps <= 1 or n < 2:
        return 0.0
    gradients = (advantages[scorable].unsqueeze(1) * sketches[scorable]).double()  # (n, k)
    return (num_steps - 1) / n * gradients.var(dim=0).sum().item()


def per_prompt_gradients(sketches: Tensor, advantages: Tensor) -> Tensor:
    r"""
    Per-prompt gradients \\( g_n = \frac{1}{|\{i\}|} \sum_i A_{n,i} z_{n,i} \\), over the scored completions of each prompt.

    Args:
        sketches (`torch.Tensor` of shape `(num_groups, num_generations, k)`):
            Score sketches.
        advantages (`torch.Tensor` of shape `(num_groups, num_generations)`):
            Advantages; `nan` where a completion was not scored. Prompts without any scored completion are dropped; prompts
            whose advantages are all zero are real samples and stay.

    Returns:
        `torch.Tensor` of shape `(num_scored_groups, k)`: One gradient per prompt.
    """
    scorable = ~advantages.isnan()
    kept = scorable.any(dim=1)
    weights = advantages.nan_to_num(nan=0.0)[kept] / scorable[kept].sum(dim=1, keepdim=True)
    return torch.einsum("ng,ngk->nk", weights.to(sketches.dtype), sketches[kept])
