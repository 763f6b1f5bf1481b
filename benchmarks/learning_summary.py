"""Statistics of the learning study: areas under curves, collapse, best rates, and differences paired over seeds.

A curve is the held-out accuracy at the evaluated steps, or the held-out mean reward where rewards are graded. Its area is the
mean over the steps (equal rollouts), or over the seconds that the fastest method needs for all its steps (equal time). Runs are the
dictionaries of `learning_runs.run`.
"""

from collections.abc import Callable, Sequence
from statistics import mean
from typing import Any

import numpy as np

from benchmarks.learning_runs import CONTROLS, METHODS
from benchmarks.record import spread

OURS = "oblrpo"
# A run collapsed if it ends below this fraction of the accuracy that it started from.
COLLAPSE_FRACTION = 0.5
NUM_RESAMPLES = 10_000

Run = dict[str, Any]


def held_out(run: Run) -> list[float]:
    """Held-out mean of what the run was rewarded for, at the evaluated steps."""
    rewards: list[float] = run.get("rewards", [])
    return rewards or run["accuracies"]


def area(curve: Sequence[float], at: Sequence[float], horizon: float | None = None) -> float:
    """Mean of a piecewise linear curve, whose values at not decreasing places `at` are given, from `at[0]` to
    `horizon`, by default its end; beyond its end it keeps its last value."""
    horizon = at[-1] if horizon is None else horizon
    inside = [place for place in at if place < horizon]
    values = [*curve[: len(inside)], float(np.interp(horizon, at, curve))]
    return float(np.trapezoid(values, [*inside, horizon])) / (horizon - at[0])


def step_area(run: Run) -> float:
    """Mean of the curve over the steps; evaluations are equally far apart."""
    return area(held_out(run), range(len(held_out(run))))


def collapsed(run: Run) -> bool:
    """Whether the run ends below half of where it started."""
    return held_out(run)[-1] < COLLAPSE_FRACTION * held_out(run)[0]


def paired_difference(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, float]:
    """Mean over seeds of ours minus theirs, and its percentile bootstrap 95 % interval."""
    differences = np.subtract(ours, theirs)
    generator = np.random.default_rng(0)
    resamples = generator.integers(len(differences), size=(NUM_RESAMPLES, len(differences)))
    low, high = np.percentile(differences[resamples].mean(axis=1), [2.5, 97.5])
    return {"mean": _rounded(differences.mean()), "low": _rounded(low), "high": _rounded(high)}


def best_rate(runs: Sequence[Run]) -> float:
    """Learning rate of the largest mean area under the curve over the tuning runs of one method."""
    rates = sorted({run["spec"]["learning_rate"] for run in runs})
    return max(rates, key=lambda rate: mean(map(step_area, _at_rate(runs, rate))))


def of_method(runs: Sequence[Run], policy: str, optimizer: str, method: str) -> list[Run]:
    """The runs of one method on one policy with one optimizer, by seed."""
    wanted = {"policy": policy, "optimizer": optimizer, "method": method}
    chosen = [run for run in runs if all(run["spec"][name] == value for name, value in wanted.items())]
    return sorted(chosen, key=lambda run: run["spec"]["seed"])


def summarise(tuning: Sequence[Run], evaluation: Sequence[Run]) -> dict[str, dict[str, Any]]:
    """Everything that the tables say, by optimizer and policy."""
    summary: dict[str, dict[str, Any]] = {}
    for run in tuning:
        optimizer, policy = run["spec"]["optimizer"], run["spec"]["policy"]
        if policy not in summary.setdefault(optimizer, {}):
            tuned, evaluated = (
                {method: found for method in names if (found := of_method(runs, policy, optimizer, method))}
                for names, runs in ((METHODS, tuning), (METHODS | CONTROLS, evaluation))
            )
            summary[optimizer][policy] = _summarise_policy(tuned, evaluated)
    return summary


def _summarise_policy(tuned: dict[str, list[Run]], evaluated: dict[str, list[Run]]) -> dict[str, Any]:
    """Figures of one policy and optimizer from the runs by method."""
    rates = sorted({run["spec"]["learning_rate"] for runs in tuned.values() for run in runs})
    finished = {method: [run for run in evaluated[method] if run["failure"] is None] for method in tuned}
    horizon = min(mean(run["cpu_seconds"][-1] for run in runs) for runs in finished.values() if runs)
    measures: dict[str, Callable[[Run], float]] = {
        "area": step_area,
        "final": lambda run: held_out(run)[-1],
        "area_equal_time": lambda run: area(held_out(run), run["cpu_seconds"], horizon),
    }
    values = {
        method: {name: [measure(run) for run in runs] for name, measure in measures.items()}
        for method, runs in evaluated.items()
    }
    return {
        "start_accuracy": _rounded(mean(held_out(run)[0] for run in next(iter(tuned.values())))),
        "learning_rates": rates,
        "tuning": {
            method: {str(rate): _tuning_cell(_at_rate(runs, rate)) for rate in rates} for method, runs in tuned.items()
        },
        "equal_time_seconds": _rounded(horizon),
        "evaluation": {method: _evaluation_cell(runs, values[method]) for method, runs in evaluated.items()},
        "ours_minus": {
            method: {name: paired_difference(values[OURS][name], values[method][name]) for name in measures}
            for method in values
            if method != OURS
        },
    }


def _tuning_cell(runs: Sequence[Run]) -> dict[str, Any]:
    return {
        "lowest_final": _rounded(min(held_out(run)[-1] for run in runs)),
        "collapsed": sum(map(collapsed, runs)),
        "mean_multiplier": _mean_multiplier(runs),
    }


def _evaluation_cell(runs: Sequence[Run], values: dict[str, list[float]]) -> dict[str, Any]:
    return {
        "learning_rate": runs[0]["spec"]["learning_rate"],
        **{
            name: {key: None if value is None else _rounded(value) for key, value in spread(of_seeds).items()}
            for name, of_seeds in values.items()
        },
        "collapsed": sum(map(collapsed, runs)),
        "mean_multiplier": _mean_multiplier(runs),
        "cpu_seconds": _rounded(mean(run["cpu_seconds"][-1] for run in runs)),
        "curve": [_rounded(value) for value in np.mean([held_out(run) for run in runs], axis=0)],
    }


def _mean_multiplier(runs: Sequence[Run]) -> float:
    return _rounded(mean(mean(run["multipliers"]) for run in runs if run["multipliers"]))


def _at_rate(runs: Sequence[Run], rate: float) -> list[Run]:
    return [run for run in runs if run["spec"]["learning_rate"] == rate]


def _rounded(value: Any) -> float:
    return round(float(value), 4)
