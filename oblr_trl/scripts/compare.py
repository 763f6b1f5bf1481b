"""Compares training runs by the logs that the trainers wrote: a table, a figure and, when asked, JSON.

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
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from oblr_trl import metrics
from oblr_trl.evaluation.results import compare_evaluations, format_comparison, is_evaluation
from oblr_trl.runs.figure import write_comparison
from oblr_trl.runs.logs import RunLog, RunLogError, read_methods, split_label
from oblr_trl.runs.summary import FINAL_STEPS, choose_evaluation_metric, summarize, train_runtime
from oblr_trl.runs.tables import markdown_table

DEFAULT_FIGURE = Path("compare.png")
# Name in the table and format, in the order of the rows; the keys are those of `summarize`.
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
        description="Compare training runs by their trainer_state.json: a table, a figure and, when asked, JSON. Or "
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
        help=f"the figure of training runs (default: {DEFAULT_FIGURE}), or a Markdown file of evaluations",
    )
    parser.add_argument("--json", type=Path, help="also write the table, with the value of each seed, as JSON")
    return parser


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Read the runs, print the table, write the files, and return what the JSON file holds."""
    parser = make_parser()
    arguments = parser.parse_args(argv)
    output: Path | None = arguments.output
    try:
        evaluations = _compare_evaluations(arguments.runs)
        what, suffix = (
            ("evaluations have a table, a Markdown file", ".md") if evaluations else ("the figure is PNG", ".png")
        )
        if output is not None and output.suffix != suffix:
            parser.error(f"--output {output}: {what}; give it a name that ends in {suffix}")
        methods = {} if evaluations else read_methods(arguments.runs)
        comparison = evaluations or compare(methods)
        table = format_comparison(comparison) if evaluations else format_table(comparison)
        sys.stdout.write(table)
        if arguments.json is not None:
            _write(arguments.json, json.dumps(comparison, indent=2, allow_nan=False) + "\n")
        if not evaluations:  # after the table, which does without matplotlib
            write_comparison(methods, comparison["evaluation_metric"], output or DEFAULT_FIGURE)
            sys.stdout.write(f"\nfigure: {output or DEFAULT_FIGURE}\n")
        elif output is not None:
            _write(output, table)
    except RunLogError as error:
        raise SystemExit(f"compare: {error}") from error
    except OSError as error:
        raise SystemExit(
            f"compare: {error}; give --output and --json names in a folder that can be written"
        ) from error
    return comparison


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def _compare_evaluations(runs: Sequence[str]) -> dict[str, Any] | None:
    """The comparison of output directories of `evaluate`, or `None` where the arguments name training runs."""
    directories = [split_label(run) for run in runs]
    others = [directory for _, directory in directories if not is_evaluation(directory)]
    if len(others) == len(directories):
        return None
    if others:
        raise RunLogError(
            f"{others[0]}: not an evaluation, as the others are; compare runs and evaluations separately"
        )
    if len(dict(directories)) < len(directories):
        labels = ", ".join(label for label, _ in directories)
        raise RunLogError(f"{labels}: two evaluations of one name; name each by LABEL=DIR")
    try:
        return compare_evaluations(dict(directories))
    except ValueError as error:
        raise RunLogError(str(error)) from error


def compare(methods: Mapping[str, Sequence[RunLog]]) -> dict[str, Any]:
    """The comparison as plain data: the evaluation metric, one entry per method, and what to know before reading them."""
    evaluation_metric = choose_evaluation_metric(methods)
    entries = {}
    for label, runs in methods.items():
        logs = [str(run.path) for run in runs]
        entries[label] = {"num_seeds": len(runs), "logs": logs, **summarize(runs, evaluation_metric)}
    return {"evaluation_metric": evaluation_metric, "methods": entries, "notes": [*_notes(methods, evaluation_metric)]}


def _notes(methods: Mapping[str, Sequence[RunLog]], evaluation_metric: str | None) -> Iterator[str]:
    """What makes numbers of the table not comparable, or blank although the reader may expect them."""
    if len({run.num_steps for runs in methods.values() for run in runs}) > 1:
        steps = ", ".join(f"{label} {_step_range([run.num_steps for run in runs])}" for label, runs in methods.items())
        yield f"warning: the runs differ in their number of steps ({steps}); final values are from different steps"
    if evaluation_metric is None:
        yield "no run was evaluated: set `eval_strategy` and an evaluation set for the held-out rows"
    elif evaluation_metric == metrics.EVAL_REWARD:
        yield f"not every evaluated run logs {metrics.EVAL_ACCURACY}, so the held-out rows show {metrics.EVAL_REWARD}"
    for name, run in [(f"{label}: {run.path}", run) for label, runs in methods.items() for run in runs]:
        evaluated = list(run.series(evaluation_metric)) if evaluation_metric else [0, run.num_steps]
        if not evaluated:
            yield f"{name} holds no {evaluation_metric}"
        elif evaluated[0] > 0:
            yield f"{name} was first evaluated at step {evaluated[0]}; `eval_on_start=True` would give the start"
        if evaluated and evaluated[-1] < run.num_steps:
            yield f"{name} was last evaluated at step {evaluated[-1]} of {run.num_steps}"
        if run.series(metrics.TRAIN_RUNTIME) and train_runtime(run) is None:
            yield f"{name} was resumed and timed only from there, so its time is left out"


def format_table(comparison: Mapping[str, Any]) -> str:
    """The comparison as a Markdown table, quantities by methods, with its notes below; unknown is blank."""
    methods = comparison["methods"]
    evaluation = "reward" if comparison["evaluation_metric"] == metrics.EVAL_REWARD else "accuracy"
    rows = [
        ["", *(label.replace("|", "\\|") for label in methods)],
        ["seeds", *(str(entry["num_seeds"]) for entry in methods.values())],
        ["steps", *(_step_range(entry["steps"]["values"]) for entry in methods.values())],
    ]
    for key, (name, spec) in TABLE_ROWS.items():
        cells = [format_statistic(entry[key], spec) for entry in methods.values()]
        rows.append([name.format(evaluation=evaluation), *cells])
    remarks = list(comparison["notes"])
    if any(entry["num_seeds"] > 1 for entry in methods.values()):
        remarks.insert(0, "±: sample standard deviation over seeds.")
    return markdown_table(rows) + "\n" * bool(remarks) + "".join(f"{remark}\n" for remark in remarks)


def format_statistic(statistic: Mapping[str, Any], spec: str) -> str:
    """Mean ± standard deviation, each by the format `spec`; blank where unknown."""
    if statistic["mean"] is None:
        return ""
    spread = "" if statistic["std"] is None else f" ± {statistic['std']:{spec}}"
    return f"{statistic['mean']:{spec}}{spread}"


def _step_range(steps: Sequence[float]) -> str:
    return f"{min(steps):.0f}" if min(steps) == max(steps) else f"{min(steps):.0f} to {max(steps):.0f}"


if __name__ == "__main__":
    main()
