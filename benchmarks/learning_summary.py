"""Statistics of the learning study: areas under curves, collapse, best rates, and differences paired over seeds.

A curve is the held-out accuracy at the evaluated steps. Its area is the mean accuracy over the steps (equal rollouts), or over
the seconds that the fastest method needs for all its steps (equal time). Runs are the dictionaries of `learning_runs.run`.
"""

from collections.abc import Callable, Sequence
from statistics import mean, stdev
from typing import Any

import numpy as np

from benchmarks.learning_runs import CONTROLS, METHODS

OURS = "oblrpo"
HALF = "baseline_only"
# The best of these, in the evaluation itself, is the rival: choosing it afterwards is in its favour.
RIVALS = ("grpo", "dr_grpo", "rloo")
# A run collapsed if it ends below this fraction of the accuracy that it started from.
COLLAPSE_FRACTION = 0.5
NUM_RESAMPLES = 10_000

Run = dict[str, Any]


def area(curve: Sequence[float], at: Sequence[float], horizon: float | None = None) -> float:
    """
    Mean of a piecewise linear curve from `at[0]` to `horizon`, by default its end; beyond its end it keeps its last value.

    Args:
        curve (`Sequence[float]`): Values.
        at (`Sequence[float]`): Steps or seconds of the values, not decreasing.
        horizon (`float`, *optional*): Where the mean ends.
    """
    horizon = at[-1] if horizon is None else horizon
    inside = [place for place in at if place < horizon]
    values = [*curve[: len(inside)], float(np.interp(horizon, at, curve))]
    return float(np.trapezoid(values, [*inside, horizon])) / (horizon - at[0])


def collapsed(run: Run) -> bool:
    """Whether the run ends below half of its start accuracy."""
    return run["accuracies"][-1] < COLLAPSE_FRACTION * run["accuracies"][0]


def paired_difference(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, Any]:
    """Mean over seeds of ours minus theirs, its percentile bootstrap 95 % interval, and the number of seeds above zero."""
    differences = np.subtract(ours, theirs)
    generator = np.random.default_rng(0)
    resamples = generator.integers(len(differences), size=(NUM_RESAMPLES, len(differences)))
    low, high = np.percentile(differences[resamples].mean(axis=1), [2.5, 97.5])
    return {
        "mean": _rounded(differences.mean()),
        "low": _rounded(low),
        "high": _rounded(high),
        "seeds_above_zero": int((differences > 0).sum()),
        "num_seeds": len(differences),
    }


def best_rate(runs: Sequence[Run]) -> float:
    """Learning rate of the greatest mean area under the curve over the tuning runs of one method."""
    rates = sorted({run["spec"]["learning_rate"] for run in runs})
    return max(rates, key=lambda rate: mean(_step_areas(_at_rate(runs, rate))))


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
            summary[optimizer][policy] = _summarise_policy(tuning, evaluation, policy, optimizer)
    return summary


def _summarise_policy(tuning: Sequence[Run], evaluation: Sequence[Run], policy: str, optimizer: str) -> dict[str, Any]:
    tuned = {method: of_method(tuning, policy, optimizer, method) for method in METHODS}
    tuned = {method: runs for method, runs in tuned.items() if runs}
    evaluated = {method: of_method(evaluation, policy, optimizer, method) for method in METHODS | CONTROLS}
    evaluated = {method: runs for method, runs in evaluated.items() if runs}
    rates = sorted({run["spec"]["learning_rate"] for runs in tuned.values() for run in runs})
    best = {method: best_rate(runs) for method, runs in tuned.items()}
    horizon = min(
        mean(run["cpu_seconds"][-1] for run in runs if run["failure"] is None)
        for method, runs in evaluated.items()
        if method in METHODS and any(run["failure"] is None for run in runs)
    )
    measures: dict[str, Callable[[Run], float]] = {
        "area": lambda run: area(run["accuracies"], run["steps"]),
        "final": lambda run: run["accuracies"][-1],
        "area_equal_time": lambda run: area(run["accuracies"], run["cpu_seconds"], horizon),
    }
    return {
        "start_accuracy": tuning_start(next(iter(tuned.values()))),
        "learning_rates": rates,
        "tuning": {
            method: {str(rate): _tuning_cell(_at_rate(runs, rate)) for rate in rates} for method, runs in tuned.items()
        },
        "best_rate": best,
        "at_edge": [method for method, rate in best.items() if rate in (rates[0], rates[-1])],
        "equal_time_seconds": _rounded(horizon),
        "evaluation": {method: _evaluation_cell(runs, measures) for method, runs in evaluated.items()},
        **_comparisons(evaluated, measures),
    }


def tuning_start(runs: Sequence[Run]) -> float:
    """Held-out accuracy before training, which all runs of a policy share."""
    return _rounded(mean(run["accuracies"][0] for run in runs))


def _tuning_cell(runs: Sequence[Run]) -> dict[str, Any]:
    finals = [run["accuracies"][-1] for run in runs]
    return {
        "area": _rounded(mean(_step_areas(runs))),
        "final": _rounded(mean(finals)),
        "lowest_final": _rounded(min(finals)),
        "collapsed": sum(map(collapsed, runs)),
        "num_seeds": len(runs),
    }


def _evaluation_cell(runs: Sequence[Run], measures: dict[str, Callable[[Run], float]]) -> dict[str, Any]:
    cell: dict[str, Any] = {name: _spread([measure(run) for run in runs]) for name, measure in measures.items()}
    multipliers = [mean(run["multipliers"]) for run in runs if run["multipliers"]]
    return cell | {
        "learning_rate": runs[0]["spec"]["learning_rate"],
        "num_seeds": len(runs),
        "collapsed": sum(map(collapsed, runs)),
        "mean_multiplier": _rounded(mean(multipliers)),
        "cpu_seconds": _spread([run["cpu_seconds"][-1] for run in runs]),
        "wall_seconds": _spread([run["wall_seconds"][-1] for run in runs]),
        "steps": runs[0]["steps"],
        "curve": [_rounded(value) for value in np.mean([run["accuracies"] for run in runs], axis=0)],
    }


def _comparisons(evaluated: dict[str, list[Run]], measures: dict[str, Callable[[Run], float]]) -> dict[str, Any]:
    """The rival by each measure, and ours minus every other method by every measure."""

    def values(method: str, name: str) -> list[float]:
        return [measures[name](run) for run in evaluated[method]]

    rivals = {
        name: max((method for method in RIVALS if method in evaluated), key=lambda method: mean(values(method, name)))
        for name in measures
    }
    paired: dict[str, Any] = {
        "rival": {name: paired_difference(values(OURS, name), values(rivals[name], name)) for name in measures}
    }
    for method in evaluated:
        if method != OURS:
            paired[method] = {name: paired_difference(values(OURS, name), values(method, name)) for name in measures}
    comparisons: dict[str, Any] = {"rival": rivals, "ours_minus": paired}
    if HALF in evaluated:
        comparisons["half_minus_rival"] = {
            name: paired_difference(values(HALF, name), values(rivals[name], name)) for name in measures
        }
    return comparisons


def _at_rate(runs: Sequence[Run], rate: float) -> list[Run]:
    return [run for run in runs if run["spec"]["learning_rate"] == rate]


def _step_areas(runs: Sequence[Run]) -> list[float]:
    return [area(run["accuracies"], run["steps"]) for run in runs]


def _spread(values: Sequence[float]) -> dict[str, float | None]:
    """Mean and standard deviation over seeds, `None` for one seed."""
    return {"mean": _rounded(mean(values)), "std": _rounded(stdev(values)) if len(values) > 1 else None}


def _rounded(value: Any) -> float:
    return round(float(value), 4)
