"""Launch a recipe once for every combination of a grid and every seed, and tabulate the finished runs.

    python -m oblr_trl.scripts.sweep --config recipes/ablation/chain_sum.yaml

Differs from a loop around `accelerate launch` in that every run is checked before the first one starts, and in that the same
command continues a sweep: finished runs are skipped, killed ones resume from their last checkpoint, failed ones are repeated. A
run lies in `<output_dir>/<combination>/seed-<seed>`. `docs/recipes.md` lists the keys of the file.
"""

import argparse
import itertools
import json
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from oblr_trl.checkpoints import last_complete_checkpoint
from oblr_trl.data.recipe_files import check_keys, read_recipe_file
from oblr_trl.runs.logs import STATE_FILE, RunLog, read_run
from oblr_trl.scripts.compare import TABLE_ROWS, compare, format_statistic
from oblr_trl.scripts.train import parse

RECIPE_FILE = "recipe.yaml"
LOG_FILE = "launch.log"
REQUIRED_KEYS = ("recipe", "output_dir", "grid", "seeds")
# The recipes are checked on whatever machine the sweep is started from.
ON_CPU = ("--use_cpu", "true", "--bf16", "false")


def read_sweep(path: Path) -> dict[str, Any]:
    """Read the YAML file of a sweep, strictly: every complaint is a `ValueError`."""
    sweep = {"launch": "", "overrides": {}} | read_recipe_file(path, flag="--config")
    check_keys(sweep, (*REQUIRED_KEYS, "launch", "overrides"))
    for key in REQUIRED_KEYS:
        if not sweep.get(key):
            raise ValueError(f"`{key}` is missing or empty; set it")
    sweep["grid"] = sweep["grid"] if isinstance(sweep["grid"], list) else [sweep["grid"]]
    for grid in sweep["grid"]:
        if not isinstance(grid, dict):
            raise ValueError(f"`grid` holds {grid!r}; give a mapping from options to their values, or a list of such")
        for axis, values in grid.items():
            if not isinstance(values, list | dict) or not values:
                raise ValueError(
                    f"the axis `{axis}` is {values!r}; give a list of values, or a mapping from values to options"
                )
    return sweep


def plan(sweep: Mapping[str, Any]) -> dict[Path, dict[str, Any]]:
    """The recipe of every run by its directory; the seeds of a combination are in a row."""
    recipe = read_recipe_file(sweep["recipe"], flag="recipe")
    runs: dict[Path, dict[str, Any]] = {}
    for grid in sweep["grid"]:
        axes = [v.items() if isinstance(v, dict) else [(value, {}) for value in v] for v in grid.values()]
        for point in itertools.product(*axes):
            settings = dict(zip(grid, (value for value, _ in point), strict=True))
            combination = "-".join("auto" if value is None else str(value) for value in settings.values())
            for _, options in point:
                settings |= options
            for seed in sweep["seeds"]:
                directory = Path(sweep["output_dir"]) / combination / f"seed-{seed}"
                merged = recipe | settings | sweep["overrides"] | {"seed": seed, "output_dir": str(directory)}
                merged = {key: value for key, value in merged.items() if value is not None}
                if runs.setdefault(directory, merged) != merged:
                    raise ValueError(
                        f"{directory}: two grids have this combination with other options; drop one of them"
                    )
    return runs


def check(runs: Mapping[Path, Mapping[str, Any]]) -> None:
    """Parse every run as the training script will, and refuse a directory that holds a run of another recipe."""
    with tempfile.TemporaryDirectory() as folder:
        for directory, recipe in runs.items():
            written = directory / RECIPE_FILE
            if written.exists() and yaml.safe_load(written.read_text()) != recipe:
                raise ValueError(
                    f"{directory}: holds a run of another recipe ({RECIPE_FILE} differs); remove it, or set another "
                    "`output_dir`"
                )
            try:
                parse(["--config", _write_recipe(recipe, Path(folder)), *ON_CPU])
            except ValueError as error:
                raise ValueError(f"{directory}: {error}") from error


def _write_recipe(recipe: Mapping[str, Any], folder: Path) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / RECIPE_FILE
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return str(path)


def is_finished(directory: Path) -> bool:
    """Whether training came to its end: the script saves the state in the output directory only then."""
    return (directory / STATE_FILE).is_file()


def launch(directory: Path, recipe: Mapping[str, Any], arguments: str) -> bool:
    """Train or resume, with the output in the run's directory; whether training came to its end."""
    command = [sys.executable, "-m", "accelerate.commands.launch", *shlex.split(arguments)]
    command += ["-m", "oblr_trl.scripts.train", "--config", _write_recipe(recipe, directory)]
    if last_complete_checkpoint(str(directory)) is not None:
        command += ["--resume_from_checkpoint", "true"]
    with open(directory / LOG_FILE, "a") as log:
        code = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT).returncode
    return code == 0 and is_finished(directory)  # some launchers exit with 0 although nothing was trained


def tabulate(runs: Sequence[Path], output_dir: Path) -> dict[str, Any]:
    """Write `results.json` and `results.md`, a combination a row: mean ± standard deviation over seeds, blank where unknown."""
    methods: dict[str, list[RunLog]] = {}
    for directory in runs:
        methods.setdefault(str(directory.parent.relative_to(output_dir)), []).append(read_run(directory))
    results = compare(methods)
    evaluation = (results["evaluation_metric"] or "accuracy").removeprefix("eval_")
    rows = [["combination", "seeds", *(name.format(evaluation=evaluation) for name, _ in TABLE_ROWS.values())]]
    rows.append(["---"] * len(rows[0]))
    for combination, entry in results["methods"].items():
        cells = [format_statistic(entry[key], spec) for key, (_, spec) in TABLE_ROWS.items()]
        rows.append([combination, str(entry["num_seeds"]), *cells])
    table = "".join(f"| {' | '.join(row)} |\n" for row in rows)
    (output_dir / "results.json").write_text(json.dumps(results, indent=2, allow_nan=False) + "\n")
    (output_dir / "results.md").write_text(table)
    _say(f"\n{table}\nresults: {output_dir / 'results.md'}, {output_dir / 'results.json'}")
    return results


def main(argv: Sequence[str] | None = None) -> dict[str, Any] | None:
    """Run what is not finished, and return the results of all finished runs, if there are any."""
    parser = argparse.ArgumentParser(
        prog="python -m oblr_trl.scripts.sweep",
        description="Launch a recipe for every combination of a grid and every seed, and tabulate the results.",
    )
    parser.add_argument("--config", type=Path, required=True, help="YAML file of the sweep")
    parser.add_argument("--list", action="store_true", help="check and list the runs, and launch none")
    arguments = parser.parse_args(argv)
    try:
        sweep = read_sweep(arguments.config)
        runs = plan(sweep)
        check(runs)
    except ValueError as error:
        raise SystemExit(f"sweep: {error}") from error
    failed = 0
    for number, (directory, recipe) in enumerate(runs.items(), start=1):
        name = f"[{number}/{len(runs)}] {directory}"
        is_left = not is_finished(directory)
        _say(f"{name}: {'to be run' if is_left else 'finished'}")
        if is_left and not arguments.list and not launch(directory, recipe, sweep["launch"]):
            failed += 1
            _say(f"{name}: FAILED, see {directory / LOG_FILE}")
    finished = [directory for directory in runs if is_finished(directory)]
    results = tabulate(finished, Path(sweep["output_dir"])) if finished else None
    if failed:
        raise SystemExit(f"sweep: {failed} of {len(runs)} runs failed; start it again to repeat only those")
    return results


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
