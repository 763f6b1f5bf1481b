"""Compares training runs by the logs that the trainers wrote: a table, a picture and, when asked, JSON.

```bash
python -m oblr_trl.scripts.compare OBLR-PO=runs/oblrpo GRPO=runs/grpo --output compare.png --json compare.json
```

Of the output directories of `oblr_trl.scripts.evaluate` it compares the scores, with differences paired by problem:

```bash
python -m oblr_trl.scripts.compare GRPO=runs/evaluation/grpo OBLR-PO=runs/evaluation/oblrpo --output compare.md
```
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from oblr_trl import metrics
from oblr_trl.evaluation.results import compare_evaluations, format_comparison, is_evaluation
from oblr_trl.runs.figure import write_comparison
from oblr_trl.runs.logs import RunLog, RunLogError, read_methods, split_label
from oblr_trl.runs.summary import FINAL_STEPS, Statistic, choose_evaluation_metric, summarize, train_runtime

DEFAULT_PICTURE = Path("compare.png")
# Name in the table and format, in the order of the rows; the keys are those of `run_summary.summarize`.
TABLE_ROWS = {
    "start_evaluation": ("held-out {evaluation}, start", ".3f"),
    "final_evaluation": ("held-out {evaluation}, final", ".3f"),
    "evaluation_gain": ("gain", ".3f"),
    "final_reward": (f"training reward, last {FINAL_STEPS} steps", ".3f"),
    "learning_rate": ("effective learning rate, mean", ".2e"),
    "last_learning_rate": ("effective learning rate, last", ".2e"),
    "lr_multiplier": ("learning-rate multiplier, mean", ".3f"),
    "rho": ("rho, mean", ".3f"),
    "variance_ratio": ("variance / leave-one-out's, mean", ".3f"),
    "train_runtime": ("training and evaluation time (s)", ".1f"),
}


def make_parser() -> argparse.ArgumentParser:
    """The command line of this script."""
    parser = argparse.ArgumentParser(
        prog="python -m oblr_trl.scripts.compare",
        description="Compare training runs by their trainer_state.json: a table, a picture and, when asked, JSON. Or "
        "evaluated models by the output directories of `evaluate`: a table and, when asked, Markdown and JSON.",
    )
    parser.add_argument(
        "runs",
        nargs="*",
        metavar="RUN",
        help="an output_dir of a trainer, or a folder of such folders named seed-*; LABEL=RUN names the method, and runs "
        "with the same name are seeds of one method; or an output_dir of `evaluate`, the first of which is the reference",
    )
    parser.add_argument(
        "--output",
        type=Path,
        help=f"the picture of training runs (default: {DEFAULT_PICTURE}), or a Markdown file of evaluations",
    )
    parser.add_argument("--json", type=Path, help="also write the table, with the value of each seed, as JSON")
    return parser


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Reads the runs, prints the table, writes the files, and returns what the JSON file holds."""
    parser = make_parser()
    arguments = parser.parse_args(argv)
    try:
        evaluations = _evaluations(arguments.runs)
        if evaluations is not None:
            return _write_evaluations(evaluations, arguments, parser)
        picture: Path = arguments.output or DEFAULT_PICTURE
        if picture.suffix != ".png":
            parser.error(f"--output {picture}: the picture is a PNG file; give it a name that ends in .png")
        methods = read_methods(arguments.runs)
        comparison = compare(methods)
        sys.stdout.write(format_table(comparison))
        _write_json(comparison, arguments.json)
        # The picture comes last, so that without matplotlib there is still the table.
        write_comparison(methods, comparison["evaluation_metric"], picture)
    except RunLogError as error:
        raise SystemExit(f"compare: {error}") from error
    except OSError as error:
        raise SystemExit(
            f"compare: {error}; give --output and --json names in a folder that can be written"
        ) from error
    sys.stdout.write(f"\npicture: {picture}\n")
    return comparison


def _evaluations(runs: Sequence[str]) -> dict[str, Path] | None:
    """The output directories of `evaluate` by label, or `None` where the arguments name training runs."""
    directories = [split_label(run) for run in runs]
    found = [is_evaluation(directory) for _, directory in directories]
    if not any(found):
        return None
    if not all(found):
        other = directories[found.index(False)][1]
        raise RunLogError(f"{other}: not an evaluation, as the others are; compare runs and evaluations separately")
    labels = [label for label, _ in directories]
    if len(set(labels)) < len(labels):
        raise RunLogError(f"{', '.join(labels)}: two evaluations of one name; name each by LABEL=DIR")
    return dict(directories)


def _write_evaluations(
    evaluations: Mapping[str, Path], arguments: argparse.Namespace, parser: argparse.ArgumentParser
) -> dict[str, Any]:
    output: Path | None = arguments.output
    if output is not None and output.suffix != ".md":
        parser.error(f"--output {output}: of evaluations there is no picture, only Markdown; use a name in .md")
    try:
        comparison = compare_evaluations(evaluations)
    except ValueError as error:
        raise SystemExit(f"compare: {error}") from error
    table = format_comparison(comparison)
    sys.stdout.write(table)
    _write_json(comparison, arguments.json)
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(table, encoding="utf-8")
    return comparison


def _write_json(comparison: Mapping[str, Any], path: Path | None) -> None:
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(comparison, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def compare(methods: Mapping[str, Sequence[RunLog]]) -> dict[str, Any]:
    """The comparison as plain data: the evaluation metric, one entry per method, and what to know before reading them."""
    evaluation_metric = choose_evaluation_metric(methods)
    entries = {}
    for label, runs in methods.items():
        summary = summarize(runs, evaluation_metric)
        entries[label] = {
            "num_seeds": len(runs),
            "logs": [str(run.path) for run in runs],
            **{name: _as_plain(statistic) for name, statistic in summary.items()},
        }
    return {"evaluation_metric": evaluation_metric, "methods": entries, "notes": notes(methods, evaluation_metric)}


def _as_plain(statistic: Statistic) -> dict[str, Any]:
    return {"mean": statistic.mean, "std": statistic.std, "values": list(statistic.values)}


def notes(methods: Mapping[str, Sequence[RunLog]], evaluation_metric: str | None) -> list[str]:
    """What makes numbers of the table not comparable, or blank although the reader may expect them."""
    found = []
    num_steps = {label: sorted({run.num_steps for run in runs}) for label, runs in methods.items()}
    if len({step for steps in num_steps.values() for step in steps}) > 1:
        listed = ", ".join(f"{label} {_step_range(steps)}" for label, steps in num_steps.items())
        found.append(
            f"warning: the runs differ in their number of steps ({listed}); final values are from different steps"
        )
    if evaluation_metric is None:
        found.append("no run was evaluated: set `eval_strategy` and an evaluation set for the held-out rows")
    elif evaluation_metric == metrics.EVAL_REWARD:
        found.append(
            f"not every evaluated run logs {metrics.EVAL_ACCURACY}, so the held-out rows show {metrics.EVAL_REWARD}"
        )
    for label, runs in methods.items():
        found.extend(f"{label}: {note}" for run in runs for note in _run_notes(run, evaluation_metric))
    return found


def _run_notes(run: RunLog, evaluation_metric: str | None) -> list[str]:
    """What to know about the numbers of one run."""
    found = []
    if evaluation_metric is not None:
        steps = list(run.series(evaluation_metric))
        if not steps:
            found.append(f"{run.path} holds no {evaluation_metric}")
        elif steps[0] > 0:
            found.append(
                f"{run.path} was first evaluated at step {steps[0]}; `eval_on_start=True` would give the start"
            )
        if steps and steps[-1] < run.num_steps:
            found.append(f"{run.path} was last evaluated at step {steps[-1]} of {run.num_steps}")
    if run.series(metrics.TRAIN_RUNTIME) and train_runtime(run) is None:
        found.append(f"{run.path} was resumed and timed only from there, so its time is left out")
    return found


def format_table(comparison: Mapping[str, Any]) -> str:
    """The comparison as a Markdown table, quantities by methods, with its notes below; unknown is blank."""
    methods = comparison["methods"]
    evaluation = "reward" if comparison["evaluation_metric"] == metrics.EVAL_REWARD else "accuracy"
    rows = [
        ["", *(label.replace("|", "\\|") for label in methods)],
        ["seeds", *(str(entry["num_seeds"]) for entry in methods.values())],
        ["steps", *(_step_range([int(step) for step in entry["steps"]["values"]]) for entry in methods.values())],
    ]
    for key, (name, spec) in TABLE_ROWS.items():
        cells = [format_statistic(entry[key], spec) for entry in methods.values()]
        rows.append([name.format(evaluation=evaluation), *cells])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [_format_row(row, widths) for row in rows]
    lines.insert(
        1, "|" + "|".join("-" * (width + 1) + (":" if column else "-") for column, width in enumerate(widths)) + "|"
    )
    remarks = list(comparison["notes"])
    if any(entry["num_seeds"] > 1 for entry in methods.values()):
        remarks.insert(0, "±: sample standard deviation over seeds.")
    return "\n".join(lines) + "\n" + ("\n" + "".join(f"{remark}\n" for remark in remarks) if remarks else "")


def _format_row(cells: Sequence[str], widths: Sequence[int]) -> str:
    aligned = [
        cells[0].ljust(widths[0]),
        *(cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True)),
    ]
    return "| " + " | ".join(aligned) + " |"


def format_statistic(statistic: Mapping[str, Any], spec: str) -> str:
    """Mean ± standard deviation, each by the format `spec`; blank where unknown."""
    if statistic["mean"] is None:
        return ""
    spread = "" if statistic["std"] is None else f" ± {statistic['std']:{spec}}"
    return f"{statistic['mean']:{spec}}{spread}"


def _step_range(steps: Sequence[int]) -> str:
    return str(min(steps)) if min(steps) == max(steps) else f"{min(steps)} to {max(steps)}"


if __name__ == "__main__":
    main()
