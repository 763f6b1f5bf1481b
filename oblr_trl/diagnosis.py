"""What a table of metrics leaves to the reader: which known failure a run's log shows, on what evidence, and what to do.

Each signature is a section of `docs/troubleshooting.md`. No finding means that none of these was seen, not that all is well.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np

from oblr_trl import run_logs

SHIFT = "baseline/shift"
EFFECTIVE_GROUP_SIZE = "baseline/effective_group_size"
PASS_TIME = "score/pass_time"
# Of TRL.
REWARD_STD = "reward_std"
ZERO_STD = "frac_reward_zero_std"
CLIPPED = "clip_ratio/region_mean"
LOGPS_DIFFERENCE = "sampling/sampling_logp_difference/mean"
GRAD_NORM = "grad_norm"
STEP_TIME = "step_time"

# Fewer values of a metric are an anecdote.
MIN_VALUES = 4
# Learning runs have had 0.04 to 0.4; below this the estimated signal is not told from zero.
LEAST_RHO = 0.02
# The ratio of one batch is noisy around its mean: a mean this far above 1 is a baseline that costs.
GREATEST_VARIANCE_RATIO = 1.05
# GRPO's shrinks the variance by ((G - 1) / G)^2, whatever the batch: any other baseline's ratio varies.
CONSTANT_RATIO_SPREAD = 1e-4
GREATEST_ZERO_STD = 0.5
# Share of tokens outside of the clipping range; 0 on policy.
GREATEST_CLIPPED = 0.05
# In nats; bfloat16 alone makes about 0.01.
GREATEST_LOGPS_DIFFERENCE = 0.1
# A collapse takes the reward down by this many of its standard deviations over completions.
GREATEST_REWARD_DROP = 0.5
# Over the run's median; healthy runs have stayed below 4, but at shifts well within the rewards' deviation.
GREATEST_PEAKS = {SHIFT: 3.0, GRAD_NORM: 10.0}
# The pass is about half of a training step by arithmetic, and generation comes on top.
GREATEST_PASS_SHARE = 0.5


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


Rows = Sequence[Mapping[str, Any]]


def diagnose(rows: Rows) -> list[Finding]:
    """
    Looks for the failure signatures of `docs/troubleshooting.md` in a log.

    Judged are the metrics' later halves (rewards and gradient norms: the whole run), each with at least 4 values; a metric
    that was not logged is passed over.

    Args:
        rows (`Sequence[Mapping[str, Any]]`):
            `trainer.state.log_history`, or the `rows` of a [`~run_logs.RunLog`].

    Returns:
        `list[Finding]`: what was found, a policy collapse by itself; empty if nothing was.
    """
    collapse = _policy_collapse(rows)
    if collapse is not None:  # what else such a log shows is its consequence
        return [collapse]
    return [finding for signature in SIGNATURES if (finding := signature(rows)) is not None]


def format_findings(findings: Sequence[Finding]) -> str:
    """The findings as text, one paragraph each."""
    if not findings:
        return "No known failure signature. That is no proof of health: compare the reward with a control.\n"
    return "\n".join(
        f"{finding.name}\n  {finding.metric}: {finding.evidence}\n  remedy: {finding.remedy}\n" for finding in findings
    )


def _values(rows: Rows, metric: str) -> list[float]:
    """The logged values in order; null and non-finite ones are left out."""
    values = [float(row[metric]) for row in rows if run_logs.is_finite_number(row.get(metric))]
    return values if len(values) >= MIN_VALUES else []


def _recent(rows: Rows, metric: str) -> list[float]:
    values = _values(rows, metric)
    return values[len(values) // 2 :]


def _policy_collapse(rows: Rows) -> Finding | None:
    rewards, spreads = _values(rows, run_logs.REWARD), _values(rows, REWARD_STD)
    if not rewards or not spreads or max(spreads) == 0:
        return None
    window = max(3, len(rewards) // 10)
    means = np.convolve(rewards, np.ones(window) / window, mode="valid")
    best, last = float(means.max()), float(means[-1])
    if best - last <= GREATEST_REWARD_DROP * max(spreads):
        return None
    return Finding(
        "Policy collapse",
        run_logs.REWARD,
        f"mean over {window} logged values fell from {best:.3g} to {last:.3g}",
        "resume from a checkpoint before the fall with a lower `learning_rate`; with lr_adaptation='none', 'snr' helps",
    )


def _learning_rate_collapse(rows: Rows) -> Finding | None:
    ratios, multipliers = _recent(rows, run_logs.RHO), _recent(rows, run_logs.LR_MULTIPLIER)
    if not ratios or not multipliers or median(ratios) >= LEAST_RHO:
        return None
    return Finding(
        "Learning-rate collapse",
        run_logs.RHO,
        f"median {median(ratios):.2g}, so that {run_logs.LR_MULTIPLIER} is {median(multipliers):.2g}: the signal is not "
        "told from zero",
        "look at the rewards first (noise? all equal?), then take more prompts per step",
    )


def _exploding_baseline(rows: Rows) -> Finding | None:
    for metric, greatest in GREATEST_PEAKS.items():
        values = _values(rows, metric)
        typical = median([value for value in values if value > 0] or [0.0])
        # Beside the ordinary spread of rewards a small baseline may jump as it likes.
        spread = median(_values(rows, REWARD_STD) or [0.0]) if metric == SHIFT else 0.0
        if typical and max(values) > max(greatest * typical, spread):
            return Finding(
                "Exploding baseline",
                metric,
                f"up to {max(values):.3g}, {max(values) / typical:.0f} times the median",
                "return None for what cannot be scored, not a large penalty; set scale_rewards='none'",
            )
    return None


def _costly_baseline(rows: Rows) -> Finding | None:
    ratios = _recent(rows, run_logs.VARIANCE_VS_LEAVE_ONE_OUT)
    if not ratios or np.mean(ratios) <= GREATEST_VARIANCE_RATIO:
        return None
    sizes = _recent(rows, EFFECTIVE_GROUP_SIZE)
    dominated = f"; {EFFECTIVE_GROUP_SIZE} {np.mean(sizes):.2g}" if sizes else ""
    return Finding(
        "A baseline noisier than the plain mean",
        run_logs.VARIANCE_VS_LEAVE_ONE_OUT,
        f"mean {np.mean(ratios):.2f}: the plain mean of the others would be less noisy{dominated}",
        "leave `baseline_prior_strength` unset; after a policy collapse it is a consequence of that",
    )


def _own_sample(rows: Rows) -> Finding | None:
    ratios = _values(rows, run_logs.VARIANCE_VS_LEAVE_ONE_OUT)
    if not ratios or max(ratios) >= 1 or max(ratios) - min(ratios) > CONSTANT_RATIO_SPREAD:
        return None
    return Finding(
        "A baseline that sees its own completion",
        run_logs.VARIANCE_VS_LEAVE_ONE_OUT,
        f"{ratios[-1]:.3f} at every step: the group mean, whose gradient is {ratios[-1] ** 0.5:.3f} of the true one",
        "not a gain; use baseline='leave_one_out' or 'gradient_weighted'",
    )


def _zero_variance_groups(rows: Rows) -> Finding | None:
    fractions = _recent(rows, ZERO_STD)
    if not fractions or np.mean(fractions) <= GREATEST_ZERO_STD:
        return None
    rewards = _recent(rows, run_logs.REWARD)
    return Finding(
        "Zero-variance groups",
        ZERO_STD,
        f"mean {np.mean(fractions):.2f}, at a mean reward of {np.mean(rewards):.3g}",
        "take prompts of another difficulty, a higher `temperature` or more `num_generations`",
    )


def _off_policy_drift(rows: Rows) -> Finding | None:
    for metric, greatest, remedy in (
        (CLIPPED, GREATEST_CLIPPED, "lower `num_iterations`, `steps_per_generation` or the learning rate"),
        (
            LOGPS_DIFFERENCE,
            GREATEST_LOGPS_DIFFERENCE,
            "vLLM's weights or dtype differ from the trainer's: see the page",
        ),
    ):
        values = _recent(rows, metric)
        if values and np.mean(values) > greatest:
            return Finding("Off-policy drift", metric, f"mean {np.mean(values):.3g}", remedy)
    return None


def _slow_scoring_pass(rows: Rows) -> Finding | None:
    passes, steps = _values(rows, PASS_TIME), _values(rows, STEP_TIME)
    if not passes or not steps or sum(passes) <= GREATEST_PASS_SHARE * sum(steps):
        return None
    return Finding(
        "Slow scoring pass",
        PASS_TIME,
        f"{sum(passes) / sum(steps):.0%} of {STEP_TIME}",
        "score_scope='last_k' with score_last_k=1, or 'lm_head'",
    )


SIGNATURES: tuple[Callable[[Rows], Finding | None], ...] = (
    _learning_rate_collapse,
    _exploding_baseline,
    _costly_baseline,
    _own_sample,
    _zero_variance_groups,
    _off_policy_drift,
    _slow_scoring_pass,
)
