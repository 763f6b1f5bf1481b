"""What a table of metrics leaves to the reader: which known failure a run's log shows, on what evidence, and what to do.

The rules, each a section of `docs/troubleshooting.md`, are at the end. A callback applies them while a run trains, the script
`diagnose` afterwards. No finding means that none of these failures was seen, not that all is well.
"""

import logging
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, median
from typing import Any

import numpy as np
from transformers import TrainerCallback
from trl import GRPOConfig

from oblr_trl import metrics
from oblr_trl.runs import logs as run_logs
from oblr_trl.gradient_snr import MIN_PROMPTS

logger = logging.getLogger(__name__)

SHIFT = "baseline/shift"
PASS_TIME, STEP_TIME = "score/pass_time", "step_time"
REWARD_STD = "reward_std"

# Fewer values of a metric are an anecdote.
MIN_VALUES = 4
# In the first ten batches the estimated signal is held back in every run: a small rate then means nothing.
MIN_SETTLED_VALUES = 11
# Learning runs have had 0.04 to 0.4; below this the estimated signal is not told from zero.
MIN_RHO = 0.02
# What the multiplier of an ordinary run leaves of a GRPO user's rate.
MIN_LEARNING_RATE = GRPOConfig.learning_rate / 5
# A collapse takes the reward down from its best by this many of its standard deviations over completions.
MAX_FALL_STDS = 0.5
# And by this many standard deviations of such an average over batches: of few prompts each, healthy ones fall by up to 6.
MAX_FALL_ERRORS = 6
# A policy that is lost at once, too early for a best to fall from, never comes back to this share of where it started, although
# that was so many standard deviations above: one batch is noisy, all of the later half is not.
MAX_SHARE_LEFT, MAX_LOST_STDS = 0.5, 0.25
MAX_ACCURACY_STD = 0.5
# Equal rewards differ by less, in float32.
ROUNDING = 1e-6
# GRPO's shrinks the variance by ((G - 1) / G)^2, whatever the batch: any other baseline's ratio varies.
CONSTANT_RATIO_SPREAD = 1e-4
# Over the run's median; healthy runs have stayed below 4, but at shifts well within the rewards' deviation.
MAX_PEAKS = {SHIFT: 3.0, "grad_norm": 10.0}
# The pass is about half of a training step by arithmetic, and generation comes on top.
MAX_PASS_SHARE = 0.5


@dataclass(frozen=True)
class Finding:
    """
    A failure that the log shows.

    Args:
        name (`str`): The failure, a heading of `docs/troubleshooting.md`.
        metric (`str`): The metric that shows it.
        evidence (`str`): What was logged.
        remedy (`str`): What to try first.
    """

    name: str
    metric: str
    evidence: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.name}\n  {self.metric}: {self.evidence}\n  remedy: {self.remedy}\n"


Rows = Sequence[Mapping[str, Any]]
# The metric and what was logged of it, or `None` where the failure is not seen.
Rule = Callable[[Rows], tuple[str, str] | None]


def diagnose(rows: Rows) -> list[Finding]:
    """
    Looks for the failures of `docs/troubleshooting.md` in a log.

    Args:
        rows (`Sequence[Mapping[str, Any]]`):
            `trainer.state.log_history`, or the `rows` of a [`~runs.logs.RunLog`]. A metric that was logged fewer than 4 times
            is passed over.

    Returns:
        `list[Finding]`: what was found, empty if nothing was. Where the policy collapsed or all rewards are equal, other
        symptoms are consequences and left out.
    """
    findings = _apply(CAUSES, rows)
    if any(finding.metric in (metrics.REWARD, *metrics.EVALUATIONS) for finding in findings):
        return findings
    return findings + _apply(SYMPTOMS, rows)


def _apply(rules: Sequence[tuple[str, Rule, str]], rows: Rows) -> list[Finding]:
    return [Finding(name, *found, remedy) for name, rule, remedy in rules if (found := rule(rows)) is not None]


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
        warms_up = state.global_step <= args.get_warmup_steps(state.max_steps)
        for finding in diagnose(state.log_history):
            if finding.name not in self._warned and not (warms_up and finding.metric == metrics.LEARNING_RATE):
                self._warned.add(finding.name)
                logger.warning("Step %d: %s", state.global_step, finding)

    def on_train_end(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            sys.stdout.write(f"\nDiagnosis of {args.output_dir}\n\n{format_findings(diagnose(state.log_history))}\n")


def _values(rows: Rows, metric: str, at_least: int = MIN_VALUES) -> list[float]:
    """The logged values in order; null and non-finite ones are left out."""
    values = [float(row[metric]) for row in rows if run_logs.is_finite_number(row.get(metric))]
    return values if len(values) >= at_least else []


def _recent(rows: Rows, metric: str, at_least: int = MIN_VALUES) -> list[float]:
    """The later half of the values, because a run's beginning proves nothing."""
    values = _values(rows, metric, at_least)
    return values[len(values) // 2 :]


def _collapse(rows: Rows) -> tuple[str, str] | None:
    at_rate = f", at learning rates of up to {max(_values(rows, metrics.LEARNING_RATE, 1), default=math.nan):.2g}"
    for metric in (*metrics.EVALUATIONS, metrics.REWARD):
        few = MIN_VALUES - 1 if metric == metrics.REWARD else 1  # an evaluation is of many prompts
        values = _values(rows, metric, few + 1)
        if not values:
            continue
        first, rest = values[0], values[-max(few, len(values) // 2) :]
        lowest, std = min(0.0, *values), max(_values(rows, f"{metric}_std", 1), default=MAX_ACCURACY_STD)
        if max(rest) - lowest < MAX_SHARE_LEFT * (first - lowest) and first - max(rest) > MAX_LOST_STDS * std:
            return metric, f"{first:.3g} at first, later at most {max(rest):.3g} (last {len(rest)} logged){at_rate}"
    rewards, std = _values(rows, metrics.REWARD), max(_values(rows, REWARD_STD), default=0.0)
    if not rewards or not std:
        return None
    window = max(3, len(rewards) // 10)
    means = np.convolve(rewards, np.ones(window) / window, mode="valid")
    best, last = means.max(), means[-1]
    # Of independent normal values two neighbours differ by 2 / sqrt(pi) standard deviations on average.
    error = float(np.abs(np.diff(rewards)).mean()) * math.sqrt(math.pi / window) / 2
    if best - last <= max(MAX_FALL_STDS * std, MAX_FALL_ERRORS * error):
        return None
    return metrics.REWARD, f"mean over {window} logged values fell from {best:.3g} to {last:.3g}{at_rate}"


def _constant_rewards(rows: Rows) -> tuple[str, str] | None:
    functions = sorted({key.removesuffix("/mean") for row in rows for key in row if key.startswith("rewards/")})
    stds = {metrics.REWARD: REWARD_STD} | {f"{name}/mean": f"{name}/std" for name in functions}
    for metric, std in stds.items():
        rewards, spreads = _values(rows, metric), _values(rows, std)
        if rewards and spreads and max(*spreads, max(rewards) - min(rewards)) < ROUNDING:
            return metric, f"{rewards[0]:.3g} for every completion of {len(rewards)} logged values"
    return None


def _few_prompts(rows: Rows) -> tuple[str, str] | None:
    prompts = _values(rows, metrics.NUM_PROMPTS)
    needed = MIN_PROMPTS if _values(rows, metrics.LR_MULTIPLIER) else 2
    if not prompts or median(prompts) >= needed:
        return None
    return metrics.NUM_PROMPTS, f"median {median(prompts):g}, at least {needed} are needed"


def _tiny_learning_rate(rows: Rows) -> tuple[str, str] | None:
    rates = _recent(rows, metrics.LEARNING_RATE, MIN_SETTLED_VALUES)
    if not rates or median(rates) > MIN_LEARNING_RATE:
        return None
    multipliers = _recent(rows, metrics.LR_MULTIPLIER)
    multiplied = f", after a multiplier of {median(multipliers):.2g}" if multipliers else ""
    return (
        metrics.LEARNING_RATE,
        f"median {median(rates):.2g}{multiplied}; GRPO's default is {GRPOConfig.learning_rate:g}",
    )


def _learning_rate_collapse(rows: Rows) -> tuple[str, str] | None:
    ratios = _recent(rows, metrics.RHO, MIN_SETTLED_VALUES)
    multipliers = _recent(rows, metrics.LR_MULTIPLIER)
    if not ratios or not multipliers or median(ratios) >= MIN_RHO:
        return None
    multiplier = f"{metrics.LR_MULTIPLIER} is {median(multipliers):.2g}"
    return metrics.RHO, f"median {median(ratios):.2g}, so that {multiplier}: the signal is not told from zero"


def _exploding_baseline(rows: Rows) -> tuple[str, str] | None:
    for metric, maximum in MAX_PEAKS.items():
        values = _values(rows, metric)
        typical = median([value for value in values if value > 0] or [0.0])
        # Beside the ordinary spread of rewards a small baseline may jump as it likes.
        spread = median(_values(rows, REWARD_STD) or [0.0]) if metric == SHIFT else 0.0
        if typical and max(values) > max(maximum * typical, spread):
            return metric, f"up to {max(values):.3g}, {max(values) / typical:.0f} times the median"
    return None


def _own_sample(rows: Rows) -> tuple[str, str] | None:
    ratios = _values(rows, metrics.VARIANCE_VS_LEAVE_ONE_OUT)
    if not ratios or max(ratios) >= 1 or max(ratios) - min(ratios) > CONSTANT_RATIO_SPREAD:
        return None
    shrunk = f"the group mean, whose gradient is {ratios[-1] ** 0.5:.3f} of the true one"
    return metrics.VARIANCE_VS_LEAVE_ONE_OUT, f"{ratios[-1]:.3f} at every step: {shrunk}"


def _slow_pass(rows: Rows) -> tuple[str, str] | None:
    passes, steps = _values(rows, PASS_TIME), _values(rows, STEP_TIME)
    if not passes or not steps or sum(passes) <= MAX_PASS_SHARE * sum(steps):
        return None
    return PASS_TIME, f"{sum(passes) / sum(steps):.0%} of {STEP_TIME}"


def _mean_above(maximum: float, metric: str, context: str = "") -> Rule:
    def rule(rows: Rows) -> tuple[str, str] | None:
        values, beside = _recent(rows, metric), _recent(rows, context)
        if not values or mean(values) <= maximum:
            return None
        return metric, f"mean {mean(values):.3g}" + (f", at a mean {context} of {mean(beside):.3g}" if beside else "")

    return rule


# Name, rule, remedy.
CAUSES: tuple[tuple[str, Rule, str], ...] = (
    (
        "Policy collapse",
        _collapse,
        "the learning rate is too large: divide `learning_rate` by 10, and start again or resume from before the fall",
    ),
    (
        "Constant rewards",
        _constant_rewards,
        "more likely a fault of the verifier than the prompts' difficulty: read completions, score a right and a wrong answer",
    ),
    ("Too few prompts per step", _few_prompts, "raise `gradient_accumulation_steps`, or lower `num_generations`"),
    (
        "Tiny learning rate",
        _tiny_learning_rate,
        "raise `learning_rate`: where the SNR multiplies it, a rate that suited GRPO has to be 5 to 20 times larger",
    ),
)
SYMPTOMS: tuple[tuple[str, Rule, str], ...] = (
    (
        "Learning-rate collapse",
        _learning_rate_collapse,
        "look at the rewards first (noise? all equal?), then take more prompts per step",
    ),
    (
        "Exploding baseline",
        _exploding_baseline,
        "return None for what cannot be scored, not a large penalty; set scale_rewards='none'",
    ),
    (
        "A baseline noisier than the plain mean",
        # The ratio of one batch is noisy around its mean.
        _mean_above(1.05, metrics.VARIANCE_VS_LEAVE_ONE_OUT, "baseline/effective_group_size"),
        "leave `baseline_prior_strength` unset",
    ),
    (
        "A baseline that sees its own completion",
        _own_sample,
        "not a gain; use baseline='leave_one_out' or 'gradient_weighted'",
    ),
    (
        "Zero-variance groups",
        _mean_above(0.5, "frac_reward_zero_std", metrics.REWARD),
        "take prompts of another difficulty, a higher `temperature` or more `num_generations`",
    ),
    (
        "Off-policy drift",
        _mean_above(0.05, "clip_ratio/region_mean"),  # a share of tokens; 0 on policy
        "lower `num_iterations`, `steps_per_generation` or the learning rate",
    ),
    (
        "Off-policy drift",
        _mean_above(0.1, "sampling/sampling_logp_difference/mean"),  # nats; bfloat16 alone makes about 0.01
        "vLLM's weights or dtype differ from the trainer's: see the page",
    ),
    ("Slow scoring pass", _slow_pass, "score_scope='last_k' with score_last_k=1, or 'lm_head'"),
)
