"""Statistics of the study of the trust region: gains as shares of the best constant rate's, paired over seeds."""

from collections.abc import Mapping, Sequence
from statistics import mean, median
from typing import Any

import numpy as np

from benchmarks.learning_summary import NUM_RESAMPLES, Run, held_out, paired_difference, step_area
from benchmarks.record import spread

REFERENCE = "constant"


def share(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, float]:
    """Ratio of mean gains, and its percentile bootstrap 95 % interval over paired seeds."""
    first, second = np.asarray(ours), np.asarray(theirs)
    picks = np.random.default_rng(0).integers(len(first), size=(NUM_RESAMPLES, len(first)))
    low, high = np.percentile(first[picks].mean(axis=1) / second[picks].mean(axis=1), [2.5, 97.5])
    return {"mean": float(first.mean() / second.mean()), "low": float(low), "high": float(high)}


def mean_curve(runs: Sequence[Run]) -> list[float]:
    """Curve at the evaluated steps, mean over runs."""
    return [round(float(value), 4) for value in np.mean([held_out(run) for run in runs], axis=0)]


def compare_one_value(
    gains: Mapping[tuple[str, float], Mapping[str, Sequence[float]]],
) -> list[dict[str, Any]]:
    """A row for every method and rate: its gain by setting, and ours minus its mean gain over the settings, paired over seeds. The first
    one is ours."""
    means = {case: np.mean(list(by_setting.values()), axis=0) for case, by_setting in gains.items()}
    ours = next(iter(means.values()))
    return [
        {
            "method": method,
            "learning_rate": rate,
            "gains": [spread(values) for values in gains[method, rate].values()],
            "mean": float(means[method, rate].mean()),
            "ours_minus": paired_difference(ours, means[method, rate]),
        }
        for method, rate in gains
    ]


def summarise(
    tuning: Mapping[str, Mapping[float, float]], runs: Mapping[str, Mapping[str, Sequence[Run]]]
) -> dict[str, Any]:
    """Everything that the table says, by setting and method."""
    summary: dict[str, Any] = {}
    for setting, by_method in runs.items():
        gains = {method: [step_area(run) - held_out(run)[0] for run in found] for method, found in by_method.items()}
        summary[setting] = {
            "start": mean(held_out(run)[0] for run in by_method[REFERENCE]),
            "tuning": {f"{rate:.3g}": round(value, 4) for rate, value in tuning[setting].items()},
            "methods": {
                method: {
                    "gain": spread(gains[method]),
                    "gains": [round(value, 4) for value in gains[method]],
                    "share": share(gains[method], gains[REFERENCE]),
                    "final": spread([held_out(run)[-1] for run in found]),
                    "learning_rate": found[0]["spec"]["learning_rate"],
                    # Half-way and over seeds: what the method ended up with.
                    "found_rate": median(
                        run["spec"]["learning_rate"] * multiplier
                        for run in found
                        for multiplier in run["multipliers"][len(run["multipliers"]) // 2 :]
                    ),
                    "curve": mean_curve(found),
                }
                for method, found in by_method.items()
            },
        }
    return summary
