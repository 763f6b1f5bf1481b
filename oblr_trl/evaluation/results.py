"""From graded problems to tables: avg@k and pass@k with intervals, and paired differences between models."""

import json
import statistics
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

from oblr_trl.evaluation.benchmarks import ProblemSet
from oblr_trl.evaluation.estimators import estimate, paired_differences, pass_at_k
from oblr_trl.evaluation.records import SETTINGS_FILE, read_records
from oblr_trl.runs.tables import markdown_table

RESULTS_JSON = "results.json"
AVERAGE = "avg"
MEAN_ROW = "mean of the benchmarks"
# Settings that may differ without making scores less comparable: which model it was, and the seed.
MODEL_SETTINGS = {"model_name_or_path", "model_revision", "weights_changed_at", "seed"}
INTERVAL_NOTE = "In percent; in brackets the 95 % bootstrap interval over problems"


def metric_values(records: Sequence[Mapping[str, Any]], pass_at: Sequence[int]) -> dict[str, list[Fraction]]:
    """Each metric of each problem: `avg`, and `pass@k` for every k."""
    counts = [(sum(record["correct"]), len(record["correct"])) for record in records]
    values = {AVERAGE: [Fraction(c, n) for c, n in counts]}
    return values | {f"pass@{k}": [pass_at_k(c, n, k) for c, n in counts] for k in pass_at}


def summarize(
    problem_sets: Sequence[ProblemSet], records: Sequence[Sequence[Mapping[str, Any]]], *, seed: int
) -> dict[str, Any]:
    """The results as plain data: every metric of every benchmark, and the mean of avg@k where there are several."""
    benchmarks, averages = {}, []
    for problem_set, rows in zip(problem_sets, records, strict=True):
        values = metric_values(rows, problem_set.pass_at)
        averages.append(values[AVERAGE])
        benchmarks[problem_set.name] = {
            "num_problems": len(rows),
            "excluded": problem_set.excluded,
            "num_completions": problem_set.num_completions,
            "pass_at": list(problem_set.pass_at),
            "mean_tokens": _mean(rows, "num_tokens"),
            "truncated": _mean(rows, "truncated"),
            "metrics": {name: estimate(numbers, seed=seed) for name, numbers in values.items()},
        }
    mean = estimate(*averages, seed=seed) if len(averages) > 1 else None
    return {"benchmarks": benchmarks, "mean": mean, "seed": seed}


def _mean(records: Sequence[Mapping[str, Any]], name: str) -> float:
    return statistics.fmean(value for record in records for value in record[name])


def format_results(results: Mapping[str, Any]) -> str:
    """The results of one model as Markdown."""
    ks = sorted({k for entry in results["benchmarks"].values() for k in entry["pass_at"]})
    metrics = [AVERAGE, *(f"pass@{k}" for k in ks)]
    rows = [["benchmark", "problems", "k", "avg@k", *metrics[1:], "tokens", "cut off"]]
    for name, entry in results["benchmarks"].items():
        excluded = f" ({len(entry['excluded'])} excluded)" if entry["excluded"] else ""
        problems = f"{entry['num_problems']}{excluded}"
        cells = [_format(entry["metrics"].get(metric)) for metric in metrics]
        cells += [f"{entry['mean_tokens']:.0f}", f"{100 * entry['truncated']:.1f} %"]
        rows.append([name, problems, str(entry["num_completions"]), *cells])
    if results["mean"] is not None:
        rows.append([MEAN_ROW, "", "", _format(results["mean"]), *[""] * (len(ks) + 2)])
    note = f"{INTERVAL_NOTE} (seed {results['seed']}). Excluded: problems whose reference answer cannot be parsed."
    return f"# {results['model']}\n\n{markdown_table(rows)}\n{note}\n"


def is_evaluation(directory: Path) -> bool:
    """Whether a directory holds an evaluation, finished or not."""
    return (directory / SETTINGS_FILE).is_file()


def compare_evaluations(evaluations: Mapping[str, Path], *, seed: int = 0) -> dict[str, Any]:
    """
    Compare finished evaluations, problem by problem.

    Args:
        evaluations (`dict[str, Path]`):
            Output directories by label; differences are taken against the first.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the bootstrap.

    Raises:
        `ValueError`: an evaluation that is not finished, no benchmark in common, or other problems under one name.
    """
    results, settings = {}, {}
    for label, path in evaluations.items():
        if not (path / RESULTS_JSON).is_file():
            raise ValueError(
                f"{path}: the evaluation is not finished, it has no {RESULTS_JSON}: run the same `evaluate` command "
                "again."
            )
        results[label] = json.loads((path / RESULTS_JSON).read_text())["benchmarks"]
        settings[label] = json.loads((path / SETTINGS_FILE).read_text())
    reference = next(iter(evaluations))
    shared = [name for name in results[reference] if all(name in entries for entries in results.values())]
    if not shared:
        raise ValueError("The evaluations have no benchmark in common: evaluate the models with one recipe.")
    values: dict[str, dict[str, dict[str, list[Fraction]]]] = {label: {} for label in evaluations}
    for name in shared:
        for label, path in evaluations.items():
            if settings[label][f"benchmarks.{name}.problems"] != settings[reference][f"benchmarks.{name}.problems"]:
                raise ValueError(
                    f"Benchmark {name!r} has other prompts or answers in {label!r} than in {reference!r}, so that "
                    "problems cannot be paired: evaluate both models with one recipe on one version of the data."
                )
            records = read_records(path / f"{name}.jsonl")
            rows = [records[index] for index in sorted(records)]
            values[label][name] = metric_values(rows, results[label][name]["pass_at"])
    benchmarks = {
        name: {
            metric: _compare({label: [metrics[name][metric]] for label, metrics in values.items()}, seed)
            for metric in values[reference][name]
            if all(metric in metrics[name] for metrics in values.values())
        }
        for name in shared
    }
    averages = {label: [metrics[name][AVERAGE] for name in shared] for label, metrics in values.items()}
    mean = _compare(averages, seed) if len(shared) > 1 else None
    notes = _notes(results, settings, shared)
    return {"reference": reference, "benchmarks": benchmarks, "mean": mean, "seed": seed, "notes": notes}


def _compare(values: Mapping[str, Sequence[Sequence[Fraction]]], seed: int) -> dict[str, Any]:
    """The estimate of each label, and for all but the first that of its `difference` to the first."""
    first, *others = values
    entries: dict[str, dict[str, Any]] = {label: estimate(*values[label], seed=seed) for label in values}
    for label in others:
        entries[label]["difference"] = estimate(*map(paired_differences, values[first], values[label]), seed=seed)
    return entries


def _notes(results: Mapping[str, Any], settings: Mapping[str, Any], shared: Sequence[str]) -> list[str]:
    """What makes the numbers less comparable than they look."""
    notes = []
    for label, benchmarks in results.items():
        left_out = [name for name in benchmarks if name not in shared]
        if left_out:
            notes.append(f"{label}: {', '.join(left_out)} left out, since not every model was evaluated on it")
    for key in dict.fromkeys(key for entry in settings.values() for key in entry):
        found = {label: entry.get(key) for label, entry in settings.items()}
        is_comparable = key in MODEL_SETTINGS or key.startswith("benchmarks.")
        if not is_comparable and len(set(map(str, found.values()))) > 1:
            notes.append(f"warning: {key} differs: {', '.join(f'{label} {value}' for label, value in found.items())}")
    return notes


def format_comparison(comparison: Mapping[str, Any]) -> str:
    """Several models side by side as Markdown; differences whose interval does not contain 0 are marked by *."""
    entries = [
        (name, metric, by_label)
        for name, metrics in comparison["benchmarks"].items()
        for metric, by_label in metrics.items()
    ]
    if comparison["mean"] is not None:
        entries.append((MEAN_ROW, AVERAGE, comparison["mean"]))
    reference, *others = entries[0][2]
    rows = [["benchmark", "metric", reference, *others, *(f"{label} - {reference}" for label in others)]]
    for name, metric, by_label in entries:
        differences = [by_label[label]["difference"] for label in others]
        marks = ["*" if difference["low"] > 0 or difference["high"] < 0 else "" for difference in differences]
        cells = [_format(difference, "+") + mark for difference, mark in zip(differences, marks, strict=True)]
        rows.append([name, metric, *map(_format, by_label.values()), *cells])
    note = f"{INTERVAL_NOTE}, of differences paired by problem (seed {comparison['seed']}); *: without 0.\n"
    return f"{markdown_table(rows)}\n{note}" + "".join(f"{remark}\n" for remark in comparison["notes"])


def _format(entry: Mapping[str, Any] | None, sign: str = "") -> str:
    if entry is None:
        return ""
    value, low, high = (f"{100 * entry[name]:{sign}.1f}" for name in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"
