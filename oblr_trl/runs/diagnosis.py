"""Known failures that a run's log shows, on what evidence, and what to do: one set of rules for training and for afterwards.

[`DiagnosisCallback`] applies the rules while a run trains, `oblr_trl.scripts.diagnose` to the log that it left. Each rule is a
section of `docs/troubleshooting.md`. No finding means that none of these failures was seen, not that all is well.
"""

import logging
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from statistics import mean, median, stdev
from typing import Any, NamedTuple

import numpy as np
from transformers import TrainerCallback

from oblr_trl import metrics
from oblr_trl.gradient_snr import MIN_PROMPTS
from oblr_trl.runs.logs import logged_values

logger = logging.getLogger(__name__)

REWARD_STD = "reward_std"
# Fewer values of a metric are an anecdote.
MIN_VALUES = 4
# In the first ten batches the estimated signal is chance or held back: a small rho then means nothing.
MIN_SETTLED_VALUES = 11
# Learning runs have had 0.04 to 0.4; below this the estimated signal is not told from zero.
MIN_RHO = 0.02
MIN_CORRELATION = 0.01
# A collapse takes the reward down from its best by this many of its standard deviations over completions.
MAX_FALL_STDS = 0.5
# And by this many standard deviations of such an average over batches: of few prompts each, healthy ones fall by up to 6.
MAX_FALL_ERRORS = 6
# A policy that is lost at once, too early for a best to fall from, never comes back to this share of where it started, although
# that was so many standard deviations above: one batch is noisy, all of the later half is not.
MAX_SHARE_LEFT, MAX_LOST_STDS, MAX_ACCURACY_STD = 0.5, 0.25, 0.5
# Equal rewards differ by less, in float32.
ROUNDING = 1e-6
# Over the run's median; healthy runs have stayed below 4, but at shifts well within the rewards' deviation.
MAX_PEAK = 3.0

# Mean KL over mean target; the search itself stays within 3 on average.
MAX_KL_RATIO = 10.0
# Realised over predicted gain, of at least so many logged values. First-order predictions are too high by the curvature.
MIN_GAIN_SHARE, MIN_GAINS = 0.1, 20

# Where the policy collapsed or all rewards are equal, all but these are consequences.
CAUSES = ("Policy collapse", "Constant rewards", "Too few prompts per step")

Rows = Sequence[Mapping[str, Any]]
# The metric that shows a failure and what was logged of it; of several the first counts.
Evidence = Iterator[tuple[str, str]]
Rule = Callable[[Rows], Evidence]
# Name, remedy and rule of each failure, in the order in which they are told.
RULES: list[tuple[str, str, Rule]] = []


class Finding(NamedTuple):
    """
    A failure that the log shows: its `name`, a heading of `docs/troubleshooting.md`, the `metric` that shows it, as `evidence`
    what was logged of that, and the `remedy` to try first.
    """

    name: str
    metric: str
    evidence: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.name}\n  {self.metric}: {self.evidence}\n  remedy: {self.remedy}\n"


def diagnose(rows: Rows) -> list[Finding]:
    """
    Look for the failures of `docs/troubleshooting.md` in a log: `trainer.state.log_history`, or the `rows` of a
    [`~runs.logs.RunLog`]. A metric that was logged fewer than 4 times is passed over. Where the policy collapsed or all rewards
    are equal, other symptoms are consequences and left out.
    """
    findings = [Finding(name, *found, remedy) for name, remedy, rule in RULES if (found := next(rule(rows), None))]
    failed = any(finding.metric in (metrics.REWARD, *metrics.EVALUATIONS) for finding in findings)
    return [finding for finding in findings if finding.name in CAUSES or not failed]


def format_findings(findings: Sequence[Finding]) -> str:
    """The findings as text, one paragraph each."""
    if not findings:
        return "No known failure signature. That is no proof of health: compare the reward with a control.\n"
    return "\n".join(map(str, findings))


class DiagnosisCallback(TrainerCallback):
    """Warns of each failure that [`diagnose`] finds once, when the log first shows it, and prints all at the end."""

    def __init__(self) -> None:
        self._warned: set[str] = set()

    def on_log(self, args, state, control, **kwargs):
        if not state.is_world_process_zero:
            return
        for finding in diagnose(state.log_history):
            if finding.name not in self._warned:
                self._warned.add(finding.name)
                logger.warning("Step %d: %s", state.global_step, finding)

    def on_train_end(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            sys.stdout.write(f"\nDiagnosis of {args.output_dir}\n\n{format_findings(diagnose(state.log_history))}\n")


def _rule(name: str, remedy: str) -> Callable[[Rule], Rule]:
    def add(rule: Rule) -> Rule:
        RULES.append((name, remedy, rule))
        return rule

    return add


def _values(rows: Rows, metric: str, at_least: int = MIN_VALUES) -> list[float]:
    values = list(logged_values(rows, metric).values())
    return values if len(values) >= at_least else []


def _recent(rows: Rows, metric: str, at_least: int = MIN_VALUES) -> list[float]:
    """The later half of the values, because a run's beginning proves nothing."""
    values = _values(rows, metric, at_least)
    return values[len(values) // 2 :]


@_rule(
    "Policy collapse",
    "steps are too large: divide `trust_region_kl` (without a trust region: `learning_rate`) by 10, resume from before the fall",
)
def _collapse(rows: Rows) -> Evidence:
    rate = f"at learning rates of up to {max(_values(rows, metrics.LEARNING_RATE, 1), default=math.nan):.2g}"
    # An evaluation is of many prompts, so that one is enough.
    for metric, few in ((metrics.EVAL_ACCURACY, 1), (metrics.EVAL_REWARD, 1), (metrics.REWARD, MIN_VALUES - 1)):
        values = _values(rows, metric, few + 1) or [0.0]
        first, rest = values[0], values[-max(few, len(values) // 2) :]
        lowest, std = min(0.0, *values), max(_values(rows, f"{metric}_std", 1), default=MAX_ACCURACY_STD)
        if max(rest) - lowest < MAX_SHARE_LEFT * (first - lowest) and first - max(rest) > MAX_LOST_STDS * std:
            yield metric, f"{first:.3g} at first, later at most {max(rest):.3g} (last {len(rest)} logged), {rate}"
    rewards, std = _values(rows, metrics.REWARD), max(_values(rows, REWARD_STD), default=0.0)
    if not rewards or not std:
        return
    window = max(3, len(rewards) // 10)
    means = np.convolve(rewards, np.ones(window) / window, mode="valid")
    best, last = means.max(), means[-1]
    # Of independent normal values two neighbours differ by 2 / sqrt(pi) standard deviations on average.
    error = float(np.abs(np.diff(rewards)).mean()) * math.sqrt(math.pi / window) / 2
    if best - last > max(MAX_FALL_STDS * std, MAX_FALL_ERRORS * error):
        yield metrics.REWARD, f"mean over {window} logged values fell from {best:.3g} to {last:.3g}, {rate}"


@_rule("Constant rewards", "likely a fault of the verifier: read completions, score a right and a wrong answer")
def _constant_rewards(rows: Rows) -> Evidence:
    functions = sorted({key.removesuffix("/mean") for row in rows for key in row if key.startswith("rewards/")})
    stds = {metrics.REWARD: REWARD_STD} | {f"{name}/mean": f"{name}/std" for name in functions}
    for metric, std in stds.items():
        rewards, spreads = _values(rows, metric), _values(rows, std)
        if rewards and spreads and max(*spreads, max(rewards) - min(rewards)) < ROUNDING:
            yield metric, f"{rewards[0]:.3g} for every completion of {len(rewards)} logged values"


@_rule("Too few prompts per step", "raise `gradient_accumulation_steps`, or lower `num_generations`")
def _few_prompts(rows: Rows) -> Evidence:
    prompts = _values(rows, metrics.NUM_PROMPTS)
    needed = MIN_PROMPTS if _values(rows, metrics.LR_MULTIPLIER) and not _values(rows, metrics.CORRELATION) else 2
    if prompts and median(prompts) < needed:
        yield metrics.NUM_PROMPTS, f"median {median(prompts):g}, at least {needed} are needed"


@_rule("Learning-rate collapse", "look at the rewards first (noise? all equal?), then take more prompts per step")
def _learning_rate_collapse(rows: Rows) -> Evidence:
    multipliers = _recent(rows, metrics.LR_MULTIPLIER)
    ratios = _recent(rows, metrics.RHO, MIN_SETTLED_VALUES)
    drowned = bool(ratios) and median(ratios) < MIN_RHO
    if correlations := _recent(rows, metrics.CORRELATION, MIN_SETTLED_VALUES):
        # Steps that overshoot end at a correlation of 0 in runs that learn, but not without a signal. One prompt has no rho.
        if median(correlations) < MIN_CORRELATION and (drowned or not ratios):
            yield metrics.CORRELATION, f"median {median(correlations):.2g}: steps explain nothing of the rewards"
        return
    # Of fewer prompts rho is noise, which is a finding of its own.
    enough = median(_values(rows, metrics.NUM_PROMPTS) or [MIN_PROMPTS]) >= MIN_PROMPTS
    if enough and drowned and multipliers:
        effect = f"{metrics.LR_MULTIPLIER} is {median(multipliers):.2g}"
        yield metrics.RHO, f"median {median(ratios):.2g}, so that {effect}: the signal is not told from zero"


@_rule("Policy moved too far", "use an optimizer that steps by its `lr`, or lower `trust_region_kl`")
def _overstepped(rows: Rows) -> Evidence:
    # One batch's KL may be many times the target: few completions, of which one moved far.
    kls, targets = _recent(rows, metrics.KL), _recent(rows, metrics.KL_TARGET)
    if kls and targets and mean(kls) > MAX_KL_RATIO * mean(targets):
        yield metrics.KL, f"mean {mean(kls):.2g}, {mean(kls) / mean(targets):.0f} times its target"


@_rule("Gain not realised", "look for a reward that is not what was scored: stale data, a random or cached verifier")
def _unrealised_gain(rows: Rows) -> Evidence:
    predicted, rewards = _values(rows, metrics.PREDICTED_GAIN, MIN_GAINS), _values(rows, metrics.REWARD, MIN_GAINS)
    steps = [row["step"] for row in rows if metrics.PREDICTED_GAIN in row]
    if not predicted or not rewards:
        return
    total = mean(predicted) * (steps[-1] - steps[0])
    half = len(rewards) // 2
    # Between the means of the two halves lies half of the run.
    realised = 2 * (mean(rewards[half:]) - mean(rewards[:half]))
    error = 4 * stdev(rewards) / math.sqrt(half)
    if realised + error < MIN_GAIN_SHARE * total:
        yield metrics.PREDICTED_GAIN, f"{total:.2g} over the run, of which the reward shows {realised:.2g}"


@_rule("Exploding baseline", "return None for what cannot be scored, not a large penalty; set scale_rewards='none'")
def _exploding_baseline(rows: Rows) -> Evidence:
    shifts = _values(rows, metrics.BASELINE_SHIFT)
    typical = median([shift for shift in shifts if shift > 0] or [0.0])
    # Within the ordinary spread of rewards a small baseline may jump as it likes.
    if typical and max(shifts) > max(MAX_PEAK * typical, median(_values(rows, REWARD_STD) or [0.0])):
        yield metrics.BASELINE_SHIFT, f"up to {max(shifts):.3g}, {max(shifts) / typical:.0f} times the median"


@_rule("A baseline noisier than the plain mean", "leave `baseline_prior_strength` unset")
def _noisy_baseline(rows: Rows) -> Evidence:
    # The ratio of one batch is noisy around its mean.
    return _mean_above(1.05, rows, metrics.VARIANCE_VS_LEAVE_ONE_OUT, metrics.EFFECTIVE_GROUP_SIZE)


@_rule(
    "Zero-variance groups",
    "take prompts of another difficulty or a higher `temperature`; without a prior, more `num_generations`",
)
def _equal_rewards(rows: Rows) -> Evidence:
    live = _recent(rows, metrics.LIVE_FRACTION)
    if not live:  # GRPO, whose groups of equal rewards have no advantage
        yield from _mean_above(0.5, rows, "frac_reward_zero_std", metrics.REWARD)
    elif mean(live) < 0.5:
        reward = mean(_recent(rows, metrics.REWARD) or [math.nan])
        yield metrics.LIVE_FRACTION, f"mean {mean(live):.3g}, at a mean {metrics.REWARD} of {reward:.3g}"


@_rule(
    "Off-policy drift", "lower `num_iterations`, `steps_per_generation`, or `trust_region_kl` (or the learning rate)"
)
def _clipped_tokens(rows: Rows) -> Evidence:
    return _mean_above(0.05, rows, "clip_ratio/region_mean")  # a share of tokens; 0 on policy


@_rule("Off-policy drift", "vLLM's weights or dtype differ from the trainer's: see the page")
def _other_sampler(rows: Rows) -> Evidence:
    # Nats; bfloat16 alone makes about 0.01.
    return _mean_above(0.1, rows, "sampling/sampling_logp_difference/mean")


def _mean_above(maximum: float, rows: Rows, metric: str, context: str = "") -> Evidence:
    values, others = _recent(rows, metric), _recent(rows, context)
    if values and mean(values) > maximum:
        yield metric, f"mean {mean(values):.3g}" + (f", at a mean {context} of {mean(others):.3g}" if others else "")
