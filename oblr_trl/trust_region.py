r"""The learning rate that moves the policy by KL = delta x SNR x H per generation batch, whatever the optimizer and its rate: H is the
entropy of a completion, the SNR that of the step, c^2 or a part of rho.

[OBLR-PO](https://huggingface.co/papers/2511.23310), Theorem 4, has the learning rate rho / L with a smoothness L that nobody knows. Here
everything in it is measured: a step \\( \Delta\theta = \eta d \\) changes the log-probability of a completion with score s by
\\( z = \langle s, \Delta\theta \rangle \\), gains and moves the policy by

$$
\eta a = E[A z], \qquad \mathrm{KL} = \tfrac12 E[z^2] = \tfrac12\, \eta^2\, d^\top F d, \qquad F = E[s s^\top], \quad A = r - b
$$

so that the rate which moves it by any other KL is known. Progress, \\( \eta a - \lambda \mathrm{KL}(\eta) \\), is largest where

$$
\mathrm{KL} = \frac{a^2}{2 \lambda^2\, d^\top F d} = \frac{E[A^2]}{2 \lambda^2}\, c^2, \qquad c = \frac{E[A z]}{\sqrt{E[A^2]\, E[z^2]}}
$$

with the SNR of the step, \\( c^2 \\), the part of the advantages' variance that it explains. The price of a nat is
\\( \lambda = \sqrt{E[A^2] / (2 \delta H)} \\): KL is \\( \delta c^2 H \\).

c is measured where a step ends, and is smaller there than where it began, by as much as the step overshoots: steps that are good for the
policy can end at c = 0. Where it begins, c^2 is in proportion to rho, the part of the gradient's square that is no noise. The larger of c^2 and
rho / 20 is taken.

Everything here is plain arithmetic on numbers and sketches.
"""

import math
from typing import Any, NamedTuple

from torch import Tensor

# What the rate may change by from one generation batch to the next. Up it goes half of the way, in orders of magnitude.
_PART_OF_WAY = 0.5
_MIN_GROWTH, _MAX_GROWTH = 1.3, 10.0
_MAX_SHRINKAGE = 5.0
# Of the average of KL / rate^2: about five batches. It falls while a policy learns, and a longer memory falls behind.
_DECAY = 0.8
# Completions after which that average is believed. Of a sure policy rare completions make most of the KL, and the first few hundred may
# have none of them: of n completions it is taken for 1 + 300 / n times as large.
_DOUBT = 300
_TINY = 1e-300  # keeps the curvature of no update finite
# c^2 where a step begins, as a part of rho: what the tiny policies of the studies bear.
_PART_OF_RHO = 0.05
# Of the root of the SNR, also where the minimum is 0: from less the rate would need many batches to come back.
_LEAST = 0.002
# Completions that c is averaged over. At first it is taken for 0.1, as if a hundred completions had said so.
_MEMORY = 1280
_PRIOR, _PRIOR_COMPLETIONS = 0.1, 100
_STATE = (
    "rate",
    "_scale",
    "_taken",
    "_unit_rate",
    "_position",
    "_curvature",
    "_weight",
    "_num_moved",
    "correlation",
    "_num_completions",
    "_step",
)


def kl_of_update(products: Tensor) -> float:
    r"""
    How far an update moved the policy, from completions that it has not been computed from:

    $$
    \mathrm{KL} = \tfrac12\, E\big[(\log\pi_\text{new}(o) - \log\pi_\text{old}(o))^2\big]
                \approx \tfrac1{2n} \sum_i \langle s_i, \Delta\theta \rangle^2
    $$

    to second order in the update, in nats per completion. The completions must be those of the batch *after* the update, sampled from
    the policy that it made: on the batch that it was computed from, every completion's own push is in the sum, which is up to
    a hundred times the movement of others. The square of an estimate would contain its variance; products of two that share no
    projection do not. What they lack is chance: two halves of one orthonormal basis are orthogonal, so that of each parameter about
    \\( \|s\|^2 \|\Delta\theta\|^2 / (RC) \\) is missing, what a random update would move the policy by.

    Args:
        products (`torch.Tensor` of shape `(n, 4)`):
            Estimates of the inner products (see [`~scores.movement`]), of scores of the plain sum over tokens.

    Returns:
        `float`: Unbiased but for that, and therefore negative at times; `nan` without completions.
    """
    first, second, third, fourth = products.double().unbind(dim=1)
    return 0.25 * (first * fourth + second * third).mean().item()


class Movement(NamedTuple):
    r"""
    What the steps since the last generation batch did.

    Args:
        kl (`float`): [`kl_of_update`], in nats per completion.
        curvature (`float`): Curvature of the policy along the update, \\( 2\, \mathrm{KL} / \|\Delta\theta\|^2 \\).
        predicted_gain (`float`): First-order change of the mean reward by one step, \\( \langle \hat g, \Delta\theta \rangle \\), with the
            gradient of the batch after the steps.
    """

    kl: float = math.nan
    curvature: float = math.nan
    predicted_gain: float = math.nan


class TrustRegion:
    r"""
    Finds the learning rate that moves the policy by \\( \delta \max(c^2, \rho / 20) H \\).

    The state is two moving averages. One is of \\( k = \mathrm{KL} / (\eta p)^2 \\), \\( \eta \\) being the rate and p where the schedule stood, as a
    part of its initial rate. The wanted rate is \\( \sqrt{\delta / k} \sqrt{\max(c^2, \rho / 20) H} \\): with a constant schedule the
    policy moves by its target, with any other by \\( p^2 \\) times that. What is taken is at least a fifth of what was taken before and, on the way
    up, the geometric mean of both, 1.3 to 10 times as much (all but H, which is followed at once); and k is taken for larger while few
    completions have told it. The other average is of c, over about 1280 completions, a larger batch having more to say. Without information
    (nothing moved, a KL that is not finite, advantages of 0, no entropy) what is known stays.

    Args:
        kl (`float`): delta, the KL at c = 1 as a part of the entropy H.
        min_correlation (`float`, *optional*, defaults to `0.05`):
            Minimum of c, or of the root of rho / 20: the rate falls where steps gain nothing, and does not vanish.
        max_correlation (`float`, *optional*, defaults to `1.0`): Maximum of the same.
    """

    def __init__(self, kl: float, *, min_correlation: float = 0.05, max_correlation: float = 1.0) -> None:
        self.kl = kl
        self.min_correlation = min_correlation
        self.max_correlation = max_correlation
        self.restart()

    def restart(self) -> None:
        """Search anew, with another optimizer state or another schedule."""
        self.rate = math.nan  # of the step at hand; unknown before the first batch
        self._scale = math.nan  # the same at H = 1
        self._taken = math.nan  # the same, of the steps that were observed last
        self._unit_rate = math.nan  # the wanted rate at c^2 H = 1
        self._position = math.nan  # of the schedule, at the step at hand
        self._curvature = 0.0
        self._weight = 0.0
        self._num_moved = 0  # completions that say so
        self.correlation = _PRIOR  # c, of which the target takes no less than the minimum
        self._num_completions = float(_PRIOR_COMPLETIONS)  # that say so
        # Of the last batch: the sketch of the parameters that generated it, the step that it was for, and the steps before it.
        self._parameters: Tensor | None = None
        self._step = -1
        self._num_steps = 0

    def start(self, squared_norm: float, num_parameters: int, *, num_steps: float = 1) -> None:
        r"""
        Begin where no first batch can move the policy by more than its target: the entries of an update are at most the rate (Adam, Lion,
        Muon, SGD with clipped gradients), so that by Cauchy and Schwarz \\( \langle s, \Delta\theta \rangle^2 \le \eta^2 P \|s\|^2 \\).

        Args:
            squared_norm (`float`): Mean squared norm of a score, above 0.
            num_parameters (`int`): P.
            num_steps (`float`, *optional*, defaults to `1`): Optimizer steps on a generation batch.
        """
        self.rate = self._unit_rate = math.sqrt(2 * self.kl / (num_parameters * squared_norm)) / num_steps

    def target(self, rho: float, entropy: float, position: float = 1.0) -> float:
        """
        KL of a step, in nats per completion.

        Args:
            rho (`float`): SNR multiplier of the step's gradient, in [0, 1]; `nan` where nothing is known of it.
            entropy (`float`): H, of the completions that the step is made from, in nats.
            position (`float`, *optional*, defaults to `1.0`): Where the schedule stands, as a part of its initial rate.
        """
        correlation = max(self.correlation, 0.0 if math.isnan(rho) else math.sqrt(_PART_OF_RHO * rho))
        correlation = min(max(correlation, self.min_correlation, _LEAST), self.max_correlation)
        return self.kl * correlation**2 * entropy * position**2

    def update_since(self, parameters: Tensor, *, step: int) -> Tensor | None:
        """
        What the parameters have moved by since the batch of an earlier step.

        Args:
            parameters (`torch.Tensor` of shape `(n,)`): Sketch of those that generated the batch at hand.
            step (`int`): Number of the optimizer step that the batch is for; several batches may be for one.

        Returns:
            `torch.Tensor` of shape `(n,)`: `None` for the first batch, and for a second one of a step.
        """
        before, self._parameters = self._parameters, parameters
        self._num_steps, self._step = step - self._step, step
        return None if before is None or not self._num_steps else parameters - before.to(parameters.device)

    def observe(self, update: Tensor, products: Tensor, advantages: Tensor, *, position: float) -> Movement:
        """
        Take in how far an update has moved the policy.

        Args:
            update (`torch.Tensor` of shape `(n,)`): The last result of [`update_since`][TrustRegion.update_since].
            products (`torch.Tensor` of shape `(n, 4)`): As for [`kl_of_update`].
            advantages (`torch.Tensor` of shape `(n,)`): r - b; `nan` where a completion was not scored.
            position (`float`): Where the schedule stands, as a part of its initial rate.

        Returns:
            [`Movement`]: All `nan` without completions.
        """
        if not len(products):
            return Movement()
        num_steps, kl = self._num_steps, kl_of_update(products)
        gain = (advantages * products.double().mean(dim=1)).nanmean().item()
        # The mean over the steps, on a schedule that is about linear between two batches.
        mean_position = self._position + (num_steps - 1) / (2 * num_steps) * (position - self._position)
        rate = self.rate * mean_position
        # A step that was skipped moved nothing and says nothing.
        if bool(update.any()) and math.isfinite(kl) and rate > 0:
            self._taken = self._scale
            self._num_moved += len(products)
            self._curvature = _DECAY * self._curvature + (1 - _DECAY) * kl / rate**2
            self._weight = _DECAY * self._weight + (1 - _DECAY)
            average = max(self._curvature / self._weight, 0.0)  # that of few completions may be negative
            self._correlate(gain, math.sqrt(2 * average) * rate, advantages)
            if average > 0:
                self._unit_rate = math.sqrt(self.kl / (average * (1 + _DOUBT / self._num_moved)))
        return Movement(kl, 2 * kl / max(update.square().sum().item(), _TINY), gain / num_steps)

    def next_rate(self, rho: float, entropy: float, position: float) -> float:
        """
        Rate of the coming step for a schedule at its initial rate, the same for any number of calls before it is taken.

        Args:
            rho (`float`): As for [`target`][TrustRegion.target].
            entropy (`float`): H, of the completions that the step is made from, in nats; `nan` if there are none.
            position (`float`): Where the schedule stands, as a part of its initial rate.

        Returns:
            `float`: `nan` before [`start`][TrustRegion.start].
        """
        self._position = position
        if not math.isnan(entropy):
            wanted = self._unit_rate * math.sqrt(self.target(rho, 1.0) / self.kl)
            self._scale = wanted if math.isnan(self._taken) else self._approach(wanted)
            self.rate = self._scale * math.sqrt(entropy)
        return self.rate

    def _approach(self, wanted: float) -> float:
        """How far what was taken may go on its way to what is wanted."""
        growth = min(max((wanted / self._taken) ** _PART_OF_WAY, _MIN_GROWTH), _MAX_GROWTH)
        return min(max(wanted, self._taken / _MAX_SHRINKAGE), self._taken * growth)

    def _correlate(self, gain: float, deviation: float, advantages: Tensor) -> None:
        """Take in c of a batch, whose z have the root mean square `deviation`, by the average of k: that of one batch may be negative."""
        scored = advantages[~advantages.isnan()].double()
        scale = deviation * scored.square().mean().sqrt().item() if len(scored) else 0.0
        if not scale > 0:
            return
        correlation = min(max(gain / scale, -1.0), 1.0)
        kept = self._num_completions * math.exp(-len(scored) / _MEMORY)
        self._num_completions = kept + len(scored)
        self.correlation += (correlation - self.correlation) * len(scored) / self._num_completions

    def state_dict(self) -> dict[str, Any]:
        """State as plain numbers, without the sketch of the parameters."""
        return {name: getattr(self, name) for name in _STATE}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state of [`state_dict`][TrustRegion.state_dict]; c begins anew where an older one does not have it."""
        for name in _STATE:
            setattr(self, name, state.get(name, getattr(self, name)))

    @property
    def parameters(self) -> Tensor | None:
        """Sketch of the parameters that generated the last batch, the part of the state that is long."""
        return self._parameters

    @parameters.setter
    def parameters(self, sketch: Tensor | None) -> None:
        self._parameters = sketch
