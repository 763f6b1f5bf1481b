"""Numbers of a table and curves of a figure from the logs of one method's seeds: means, spreads, bands."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from oblr_trl import metrics
from oblr_trl.runs.logs import RunLog

# The final reward is averaged over this many steps, because the reward of a single batch is mostly noise.
FINAL_STEPS = 10


def choose_evaluation_metric(methods: Mapping[str, Sequence[RunLog]]) -> str:
    """The metric that compares all methods on held-out prompts: accuracy, or the reward if a run logged only that."""
    runs = [run for runs in methods.values() for run in runs]
    only_reward = any(run.series(metrics.EVAL_REWARD) and not run.series(metrics.EVAL_ACCURACY) for run in runs)
    return metrics.EVAL_REWARD if only_reward else metrics.EVAL_ACCURACY


def summarize(runs: Sequence[RunLog], evaluation_metric: str) -> dict[str, dict[str, Any]]:
    """
    Each quantity of the table over the seeds of one method: the `values` of the seeds, `None` where a log does not hold it, the
    `mean` of the known ones, and their sample standard deviation `std` (n - 1), `None` for fewer than two.
    """
    by_seed = [_quantities(run, evaluation_metric) for run in runs]
    summary = {}
    for name in by_seed[0]:
        values = [quantities[name] for quantities in by_seed]
        known = [value for value in values if value is not None]
        std = float(np.std(known, ddof=1)) if len(known) > 1 else None
        summary[name] = {"mean": _mean(known), "std": std, "values": values}
    return summary


def _quantities(run: RunLog, evaluation_metric: str) -> dict[str, float | None]:
    evaluations = run.series(evaluation_metric)
    start = evaluations.get(0)  # by `eval_on_start`; a later one is not the start
    final = next((evaluations[step] for step in reversed(evaluations) if step > 0), None)
    last_rewards = [value for step, value in run.series(metrics.REWARD).items() if step > run.num_steps - FINAL_STEPS]
    means = {
        "learning_rate": metrics.LEARNING_RATE,
        "lr_multiplier": metrics.LR_MULTIPLIER,
        "rho": metrics.RHO,
        "live_fraction": metrics.LIVE_FRACTION,
        "noise_per_rollout": metrics.NOISE_PER_ROLLOUT,
        "variance_ratio": metrics.VARIANCE_VS_LEAVE_ONE_OUT,
        "step_time": "step_time",  # of TRL
    }
    return {
        "steps": float(run.num_steps),
        "start_evaluation": start,
        "final_evaluation": final,
        "evaluation_gain": None if start is None or final is None else final - start,
        "final_reward": _mean(last_rewards),
        **{name: _mean(run.series(metric).values()) for name, metric in means.items()},
    }


def _mean(values: Iterable[float]) -> float | None:
    numbers = list(values)
    return float(np.mean(numbers)) if numbers else None


class Curve(NamedTuple):
    """Mean over seeds by optimizer step, and the smallest and largest value of a seed."""

    steps: list[int]
    mean: list[float]
    low: list[float]
    high: list[float]


def seed_curve(runs: Sequence[RunLog], metric: str, *, window: int = 1) -> Curve | None:
    """
    Mean and range over the seeds that logged `metric`, `None` if none did; every seed is smoothed by itself first.

    The curve ends with the seed that ends first: past that step its mean would jump to that of the remaining seeds.
    """
    logged = [series for run in runs if (series := run.series(metric))]
    if not logged:
        return None
    last_step = min(max(series) for series in logged)
    by_step: defaultdict[int, list[float]] = defaultdict(list)
    for series in logged:
        for step, value in zip(series, smooth(list(series.values()), window), strict=True):
            if step <= last_step:
                by_step[step].append(value)
    steps = sorted(by_step)
    values = [by_step[step] for step in steps]
    return Curve(steps, [float(np.mean(seeds)) for seeds in values], [*map(min, values)], [*map(max, values)])


def smooth(values: Sequence[float], window: int) -> list[float]:
    """Centred moving average over `window` (odd) values, of which only those that exist count at the two ends."""
    half = window // 2
    return [float(np.mean(values[max(0, index - half) : index + half + 1])) for index in range(len(values))]
