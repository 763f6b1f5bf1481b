"""Statistics of the study of small groups: what every method and group size ends with, and how soon it is where the controls end."""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from statistics import mean
from typing import Any

import numpy as np

from benchmarks.learning_summary import NUM_RESAMPLES, Run, held_out, step_area
from benchmarks.record import spread
from benchmarks.sections.small_groups import CONTROLS
from benchmarks.trust_region_summary import mean_curve

# What a run logs of its rollouts and gradients; TRL's trainer logs none of it.
LOGGED = ("advantage/live_fraction", "gradient_snr/noise_per_rollout", "baseline/remembered_fraction")


def final(run: Run) -> float:
    """Where the curve ends."""
    return held_out(run)[-1]


def part_until(curve: Sequence[float], level: float) -> float:
    """Part of a run after which its curve, linear between the evaluations, first has `level`; `inf` if it never has."""
    for i, (before, after) in enumerate(pairwise(curve)):
        if before >= level:
            return i / (len(curve) - 1)
        if after >= level:
            return (i + (level - before) / (after - before)) / (len(curve) - 1)
    return math.inf


def part_of_rollouts(ours: Sequence[Run], theirs: Sequence[Run]) -> dict[str, float | None]:
    """[`part_until`] of our mean curve and the mean that theirs end with, with its percentile bootstrap 95 % interval
    over paired seeds; `None` where ours does not get there."""
    curves = np.array([held_out(run) for run in ours])
    finals = np.array([final(run) for run in theirs])
    picks = np.random.default_rng(0).integers(len(curves), size=(NUM_RESAMPLES // 10, len(curves)))
    resampled = [part_until(curves[pick].mean(axis=0), finals[pick].mean()) for pick in picks]
    # No interpolation between a number and infinity.
    low, high = np.quantile(resampled, [0.025, 0.975], method="nearest")
    values = {"mean": part_until(curves.mean(axis=0), finals.mean()), "low": float(low), "high": float(high)}
    return {name: value if math.isfinite(value) else None for name, value in values.items()}


def pass_at_8_when(runs: Sequence[Run], level: float) -> float | None:
    """Mean pass@8 where the mean curve first has the accuracy `level`; `None` if it never has."""
    part = part_until(mean_curve(runs), level)
    if not math.isfinite(part):
        return None
    curve = np.mean([run["pass_at_8"] for run in runs], axis=0)
    return float(np.interp(part * (len(curve) - 1), range(len(curve)), curve))


def summarise(cells: Mapping[tuple[str, int], Sequence[Run]]) -> dict[str, Any]:
    """Everything that the tables say of a task. The strongest control is that of the highest mean accuracy at the end."""
    controls = {key: runs for key, runs in cells.items() if key[0] in CONTROLS}
    strongest = max(controls, key=lambda key: mean(map(final, controls[key])))
    level = mean(map(final, controls[strongest]))
    rows = []
    for (method, group_size), runs in cells.items():
        logged = [run["logged"] for run in runs if run["logged"]]
        rows.append(
            {
                "method": method,
                "group_size": group_size,
                "learning_rate": runs[0]["spec"]["learning_rate"],
                "final": spread([final(run) for run in runs]),
                # With graded rewards the curve is their mean, and this another measure.
                "accuracy": spread([run["accuracies"][-1] for run in runs]),
                "area": spread([step_area(run) for run in runs]),
                "pass_at_8": spread([run["pass_at_8"][-1] for run in runs]),
                "part_of_rollouts": part_of_rollouts(runs, controls[strongest]),
                "cpu_seconds": spread([run["cpu_seconds"][-1] for run in runs]),
                "pass_at_8_there": pass_at_8_when(runs, level),
                "logged": {name: mean(row[name] for row in logged) for name in LOGGED if logged and name in logged[0]},
                "curve": mean_curve(runs),
            }
        )
    start = mean(held_out(run)[0] for run in controls[strongest])
    measure = "mean reward" if any(run.get("rewards") for run in controls[strongest]) else "accuracy"
    return {"start": start, "measure": measure, "strongest": list(strongest), "rows": rows}
