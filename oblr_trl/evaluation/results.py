"""From graded problems to tables: avg@k and pass@k with intervals, and paired differences between models."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from fractions import Fraction
from pathlib import Path
from typing import Any

from oblr_trl.evaluation.estimators import (
    Estimate,
    average,
    estimate,
    mean_of_benchmarks,
    paired_differences,
    pass_at_k,
)
from oblr_trl.evaluation.records import RESULTS_JSON, SETTINGS_FILE, Records

AVERAGE = "avg"
MEAN_ROW = "mean of the benchmarks"
# Of which a comparison says where they differ; prompts have to be the same.
COMPLETION_SETTINGS = (
    "answer_format",
    "temperature",
    "top_p",
    "top_k",
    "max_new_tokens",
    "stop_token_ids",
    "chat_template_kwargs",
)
INTERVAL_NOTE = "In percent; in brackets the 95 % bootstrap interval over problems"


def metric_values(records: Sequence[Mapping[str, Any]], pass_at: Sequence[int]) -> dict[str, list[Fraction]]:
    """Each metric of each problem: `avg`, and `pass@k` for every k."""
    counts = [(sum(record["correct"]), len(record["correct"])) for record in records]
    values = {AVERAGE: [average(c, n) for c, n in counts]}
    return values | {f"pass@{k}": [pass_at_k(c, n, k) for c, n in counts] for k in pass_at}


def summarize(
    records: Sequence[Mapping[str, Any]], *, pass_at: Sequence[int], excluded: Sequence[int], seed: int
) -> dict[str, Any]:
    """The results of one benchmark as plain data."""
    num_tokens = [count for record in records for count in record["num_tokens"] if count is not None]
    truncated = [flag for record in records for flag in record["truncated"] if flag is not None]
    return {
        "num_problems": len(records),
        "excluded": list(excluded),
        "num_completions": len(records[0]["correct"]),
        "pass_at": list(pass_at),
        "mean_tokens": sum(num_tokens) / len(num_tokens) if num_tokens else None,
        "truncated": sum(truncated) / len(truncated) if truncated else None,
        "metrics": {
            name: asdict(estimate(values, seed=seed)) for name, values in metric_values(records, pass_at).items()
        },
    }


def summarize_all(
    records: Mapping[str, Sequence[Mapping[str, Any]]],
    *,
    pass_at: Mapping[str, Sequence[int]],
    excluded: Mapping[str, Sequence[int]],
    seed: int,
) -> dict[str, Any]:
    """The results of all benchmarks, and the mean of avg@k over them where there are several."""
    results: dict[str, Any] = {
        "benchmarks": {
            name: summarize(rows, pass_at=pass_at[name], excluded=excluded[name], seed=seed)
            for name, rows in records.items()
        },
        "mean": None,
        "seed": seed,
    }
    if len(records) > 1:
        averages = {name: metric_values(rows, ())[AVERAGE] for name, rows in records.items()}
        results["mean"] = asdict(mean_of_benchmarks(averages, seed=seed))
    return results


def format_results(results: Mapping[str, Any], title: str) -> str:
    """The results of one model as Markdown."""
    benchmarks = results["benchmarks"]
    ks = sorted({k for entry in benchmarks.values() for k in entry["pass_at"]})
    header = ["benchmark", "problems", "k", "avg@k", *(f"pass@{k}" for k in ks), "tokens", "cut off"]
    rows = []
    for name, entry in benchmarks.items():
        problems = str(entry["num_problems"])
        if entry["excluded"]:
            problems += f" ({len(entry['excluded'])} excluded)"
        metrics = [_format(entry["metrics"].get(metric)) for metric in (AVERAGE, *(f"pass@{k}" for k in ks))]
        tokens = "" if entry["mean_tokens"] is None else f"{entry['mean_tokens']:.0f}"
        truncated = "" if entry["truncated"] is None else f"{100 * entry['truncated']:.1f} %"
        rows.append([name, problems, str(entry["num_completions"]), *metrics, tokens, truncated])
    if results["mean"] is not None:
        rows.append([MEAN_ROW, "", "", _format(results["mean"]), *[""] * (len(ks) + 2)])
    note = f"{INTERVAL_NOTE} (seed {results['seed']}). Excluded: problems whose reference answer cannot be parsed."
    return f"# {title}\n\n{markdown_table([header, *rows])}\n{note}\n"


def compare_evaluations(evaluations: Mapping[str, Path], *, seed: int = 0) -> dict[str, Any]:
    """
    Compare finished evaluations, problem by problem.

    Args:
        evaluations (`dict[str, Path]`):
            Output directories by label; differences are taken against the first.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the bootstrap.

    Raises:
        `ValueError`: an evaluation that is not finished, no benchmark in common, or other problems under the same name.
    """
    results = {label: _read_results(path) for label, path in evaluations.items()}
    settings = {label: json.loads((path / SETTINGS_FILE).read_text()) for label, path in evaluations.items()}
    reference = next(iter(evaluations))
    shared = [
        name
        for name in results[reference]["benchmarks"]
        if all(name in result["benchmarks"] for result in results.values())
    ]
    if not shared:
        raise ValueError("The evaluations have no benchmark in common: evaluate the models with one recipe.")
    for name in shared:
        problems = {label: settings[label]["benchmarks"][name]["problems"] for label in evaluations}
        for label, fingerprint in problems.items():
            if fingerprint != problems[reference]:
                raise ValueError(
                    f"Benchmark {name!r} has other prompts or answers in {label!r} than in {reference!r}, so that problems "
                    "cannot be paired: evaluate both models with one recipe on one version of the data."
                )
    comparison: dict[str, Any] = {"reference": reference, "benchmarks": {}, "mean": None, "seed": seed}
    comparison["notes"] = _comparison_notes(results, settings, shared)
    averages: dict[str, dict[str, list[Fraction]]] = {label: {} for label in evaluations}
    for name in shared:
        ks = [
            k
            for k in results[reference]["benchmarks"][name]["pass_at"]
            if all(k in result["benchmarks"][name]["pass_at"] for result in results.values())
        ]
        values = {}
        for label, path in evaluations.items():
            by_index = Records(path / f"{name}.jsonl").by_index
            values[label] = metric_values([by_index[index] for index in sorted(by_index)], ks)
            averages[label][name] = values[label][AVERAGE]
        comparison["benchmarks"][name] = {
            metric: _compare_metric({label: v[metric] for label, v in values.items()}, reference, seed)
            for metric in (AVERAGE, *(f"pass@{k}" for k in ks))
        }
    if len(shared) > 1:
        comparison["mean"] = {}
        for label, by_benchmark in averages.items():
            entry = asdict(mean_of_benchmarks(by_benchmark, seed=seed))
            if label != reference:
                paired = {name: paired_differences(averages[reference][name], by_benchmark[name]) for name in shared}
                entry["difference"] = asdict(mean_of_benchmarks(paired, seed=seed))
            comparison["mean"][label] = entry
    return comparison


def _compare_metric(values: Mapping[str, list[Fraction]], reference: str, seed: int) -> dict[str, Any]:
    entries = {}
    for label, numbers in values.items():
        entries[label] = asdict(estimate(numbers, seed=seed))
        if label != reference:
            entries[label]["difference"] = asdict(estimate(paired_differences(values[reference], numbers), seed=seed))
    return entries


def _comparison_notes(results: Mapping[str, Any], settings: Mapping[str, Any], shared: Sequence[str]) -> list[str]:
    """What makes the numbers less comparable than they look."""
    notes = []
    for label, result in results.items():
        left_out = [name for name in result["benchmarks"] if name not in shared]
        if left_out:
            notes.append(f"{label}: {', '.join(left_out)} left out, since not every model was evaluated on it")
    for key in COMPLETION_SETTINGS:
        found = {label: entry["settings"].get(key) for label, entry in settings.items()}
        if len(set(map(str, found.values()))) > 1:
            notes.append(f"warning: {key} differs: {', '.join(f'{label} {value}' for label, value in found.items())}")
    return notes


def format_comparison(comparison: Mapping[str, Any]) -> str:
    """Several models side by side as Markdown; differences that an interval keeps away from 0 are marked by *."""
    reference = comparison["reference"]
    first = next(iter(comparison["benchmarks"].values()))
    labels = list(first[AVERAGE])
    rows = [["benchmark", "metric", *labels, *(f"{label} - {reference}" for label in labels if label != reference)]]
    for name, metrics in comparison["benchmarks"].items():
        for metric, entries in metrics.items():
            rows.append([name, metric, *_comparison_cells(entries)])
    if comparison["mean"] is not None:
        rows.append([MEAN_ROW, AVERAGE, *_comparison_cells(comparison["mean"])])
    note = f"{INTERVAL_NOTE}, of differences paired by problem (seed {comparison['seed']}); *: without 0.\n"
    return f"{markdown_table(rows)}\n{note}" + "".join(f"{remark}\n" for remark in comparison["notes"])


def _comparison_cells(entries: Mapping[str, Any]) -> list[str]:
    differences = [entry["difference"] for entry in entries.values() if "difference" in entry]
    marks = ["*" if difference["low"] > 0 or difference["high"] < 0 else "" for difference in differences]
    cells = [_format(entry) for entry in entries.values()]
    return cells + [_format(difference, sign="+") + mark for difference, mark in zip(differences, marks, strict=True)]


def is_evaluation(directory: Path) -> bool:
    """Whether a directory holds an evaluation, finished or not."""
    return (directory / SETTINGS_FILE).is_file()


def _read_results(directory: Path) -> dict[str, Any]:
    path = directory / RESULTS_JSON
    if not path.is_file():
        raise ValueError(
            f"{directory}: the evaluation is not finished, it has no {RESULTS_JSON}: run the same `evaluate` command again."
        )
    return json.loads(path.read_text())


def _format(entry: Mapping[str, Any] | None, sign: str = "") -> str:
    if entry is None:
        return ""
    shown = Estimate(value=entry["value"], low=entry["low"], high=entry["high"])
    return f"{100 * shown.value:{sign}.1f} [{100 * shown.low:{sign}.1f}, {100 * shown.high:{sign}.1f}]"


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, the first column aligned to the left, the others to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            row[0].ljust(widths[0]),
            *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    rule = ["-" * (widths[0] + 2), *("-" * (width + 1) + ":" for width in widths[1:])]
    lines.insert(1, "|" + "|".join(rule) + "|")
    return "\n".join(lines) + "\n"
