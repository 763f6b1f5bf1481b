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
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from oblr_trl.evaluation.results import compare_evaluations, format_comparison, is_evaluation
from oblr_trl.runs.logs import RunLog, read_methods, split_label
from oblr_trl.runs.summary import FINAL_STEPS, choose_evaluation_metric, summarize
from oblr_trl.runs.tables import markdown_table

# Name in the table and format, in the order of the rows; the keys are those of `summarize`.
TABLE_ROWS = {
    "steps": ("steps", ".0f"),
    "start_evaluation": ("held-out {evaluation}, start", ".3f"),
    "final_evaluation": ("held-out {evaluation}, final", ".3f"),
    "evaluation_gain": ("gain", ".3f"),
    "final_reward": (f"training reward, last {FINAL_STEPS} steps", ".3f"),
    "learning_rate": ("effective learning rate, mean", ".2e"),
    "lr_multiplier": ("learning-rate multiplier, mean", ".3f"),
    "rho": ("rho, mean", ".3f"),
    "live_fraction": ("completions with an advantage, mean", ".3f"),
    "noise_per_rollout": ("noise per completion, mean", ".3g"),
    "variance_ratio": ("variance / leave-one-out's, mean", ".3f"),
    "step_time": ("time per step (s), mean", ".2f"),
}


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Read the runs, print the table, write the files, and return what the JSON file holds."""
    parser = argparse.ArgumentParser(
        prog="python -m oblr_trl.scripts.compare",
        description="Compare training runs by their trainer_state.json: a table, a figure and, when asked, JSON. Or "
        "evaluated models by the output directories of `evaluate`: a table.",
    )
    parser.add_argument(
        "runs",
        nargs="+",
        metavar="RUN",
        help="an output_dir of a trainer, or a folder of such folders named seed-*; LABEL=RUN names the method, and runs "
        "with the same name are seeds of one method; or an output_dir of `evaluate`, the first of which is the reference",
    )
    parser.add_argument("--output", type=Path, help="figure of runs (default: compare.png), or table of evaluations")
    parser.add_argument(
        "--rollouts_per_step",
        type=int,
        help="completions of an optimizer step of all runs: the figure then counts completions",
    )
    parser.add_argument("--json", type=Path, help="also write the table, with the value of each seed, as JSON")
    arguments = parser.parse_args(argv)
    try:
        directories = [split_label(run) for run in arguments.runs]
        methods = {}
        if all(is_evaluation(directory) for _, directory in directories):
            if len(dict(directories)) < len(directories):
                labels = ", ".join(label for label, _ in directories)
                raise ValueError(f"{labels}: two evaluations of one name; name each by LABEL=DIR")
            comparison = compare_evaluations(dict(directories))
            table = format_comparison(comparison)
        else:
            methods = read_methods(arguments.runs)
            comparison = compare(methods)
            table = format_table(comparison)
        sys.stdout.write(table)
        if arguments.json is not None:
            _write(arguments.json, json.dumps(comparison, indent=2, allow_nan=False) + "\n")
        if methods:
            from oblr_trl.runs.figure import write_comparison  # the table does without matplotlib

            figure = arguments.output or Path("compare.png")
            metric, rollouts = comparison["evaluation_metric"], arguments.rollouts_per_step
            write_comparison(methods, metric, figure, rollouts_per_step=rollouts)
            sys.stdout.write(f"\nfigure: {figure}\n")
        elif arguments.output is not None:
            _write(arguments.output, table)
    except (ImportError, OSError, ValueError) as error:
        raise SystemExit(f"compare: {error}") from error
    return comparison


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def compare(methods: Mapping[str, Sequence[RunLog]]) -> dict[str, Any]:
    """The comparison as plain data: the evaluation metric, and one entry per method."""
    evaluation_metric = choose_evaluation_metric(methods)
    entries = {}
    for label, runs in methods.items():
        logs = [str(run.path) for run in runs]
        entries[label] = {"num_seeds": len(runs), "logs": logs, **summarize(runs, evaluation_metric)}
    return {"evaluation_metric": evaluation_metric, "methods": entries}


def format_table(comparison: Mapping[str, Any], *, by_method: bool = False) -> str:
    """
    The comparison as a Markdown table, a column for each method (`by_method`: a row), with mean ± sample standard deviation over
    seeds; unknown is blank.
    """
    methods = comparison["methods"]
    evaluation = comparison["evaluation_metric"].removeprefix("eval_")
    rows = [["", *(label.replace("|", "\\|") for label in methods)]]
    rows.append(["seeds (±: deviation)", *(str(entry["num_seeds"]) for entry in methods.values())])
    for key, (name, spec) in TABLE_ROWS.items():
        cells = [_format_statistic(entry[key], spec) for entry in methods.values()]
        rows.append([name.format(evaluation=evaluation), *cells])
    return markdown_table([*zip(*rows, strict=True)] if by_method else rows)


def _format_statistic(statistic: Mapping[str, Any], spec: str) -> str:
    if statistic["mean"] is None:
        return ""
    spread = "" if statistic["std"] is None else f" ± {statistic['std']:{spec}}"
    return f"{statistic['mean']:{spec}}{spread}"


if __name__ == "__main__":
    main()
