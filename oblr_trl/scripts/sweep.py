"""Launch a recipe once for every combination of a grid and every seed, and tabulate the finished runs.

    python -m oblr_trl.scripts.sweep --config recipes/ablation/chain_sum.yaml

Differs from a loop around `accelerate launch` in that the same command continues a sweep: finished runs are skipped, killed ones
resume from their last checkpoint, failed ones are repeated. A run lies in `<output_dir>/<combination>/seed-<seed>`.
`docs/recipes.md` lists the keys of the file.
"""

import argparse
import itertools
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from oblr_trl.checkpoints import last_complete_checkpoint
from oblr_trl.data.recipe_files import check_keys, parse_or_exit, read_recipe_file
from oblr_trl.runs.logs import STATE_FILE, RunLog, read_run
from oblr_trl.scripts.compare import compare, format_table

RECIPE_FILE = "recipe.yaml"
KEYS = ("recipe", "output_dir", "grid", "seeds", "launch", "overrides")


def plan(path: Path) -> tuple[dict[Path, dict[str, Any]], str]:
    """The recipe of every run by its directory, the seeds of a combination in a row; and the arguments of the launcher."""
    sweep = {"launch": "", "overrides": {}} | read_recipe_file(path, flag="--config")
    check_keys(sweep, KEYS)
    for key in KEYS:
        if key not in sweep:
            raise ValueError(f"`{key}` is missing; set it")
    grids = sweep["grid"] if isinstance(sweep["grid"], list) else [sweep["grid"]]
    for name, values in [("seeds", sweep["seeds"]), *(axis for grid in grids for axis in grid.items())]:
        if not values or not isinstance(values, list | dict):
            raise ValueError(f"`{name}` is {values!r}; set a list of values")
    recipe = read_recipe_file(sweep["recipe"], flag="recipe")
    runs: dict[Path, dict[str, Any]] = {}
    for grid in grids:
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
                written = directory / RECIPE_FILE
                on_disk = yaml.safe_load(written.read_text()) if written.exists() else merged
                if not runs.setdefault(directory, merged) == on_disk == merged:
                    what = "holds a run of other options, or two grids give it other options"
                    raise ValueError(f"{directory}: {what}; remove it, or set another `output_dir`")
    return runs, sweep["launch"]


def launch(directory: Path, recipe: Mapping[str, Any], arguments: str) -> None:
    """Train or resume, with recipe and output in the run's directory."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / RECIPE_FILE).write_text(yaml.safe_dump(dict(recipe), sort_keys=False))
    command = [sys.executable, "-m", "accelerate.commands.launch", *shlex.split(arguments)]
    command += ["-m", "oblr_trl.scripts.train", "--config", str(directory / RECIPE_FILE)]
    if last_complete_checkpoint(str(directory)) is not None:
        command += ["--resume_from_checkpoint", "true"]
    with open(directory / "launch.log", "a") as log:
        subprocess.run(command, stdout=log, stderr=subprocess.STDOUT)


def main(argv: Sequence[str] | None = None) -> None:
    """Run what is not finished, and print the table of all finished runs, a combination a row."""
    parser = argparse.ArgumentParser(
        prog="python -m oblr_trl.scripts.sweep",
        description="Launch a recipe for every combination of a grid and every seed, and tabulate the results.",
    )
    parser.add_argument("--config", type=Path, required=True, help="YAML file of the sweep")
    arguments = parser.parse_args(argv)
    runs, launch_arguments = parse_or_exit(lambda: plan(arguments.config), "sweep")
    methods: dict[str, list[RunLog]] = {}
    for number, (directory, recipe) in enumerate(runs.items(), start=1):
        # The training script saves the state in the output directory only at its end.
        if not (directory / STATE_FILE).is_file():
            launch(directory, recipe, launch_arguments)
        is_finished = (directory / STATE_FILE).is_file()
        sys.stdout.write(
            f"[{number}/{len(runs)}] {directory}: {'finished' if is_finished else 'FAILED, see launch.log'}\n"
        )
        sys.stdout.flush()  # a run takes hours, and a log has no other sign of life
        if is_finished:
            # By the path, because the name of a hub model has a slash.
            methods.setdefault(str(directory.parent), []).append(read_run(directory))
    if methods:
        sys.stdout.write(f"\n{format_table(compare(methods), by_method=True)}")
    if sum(map(len, methods.values())) < len(runs):
        raise SystemExit("sweep: some runs failed; start it again to repeat only those")


if __name__ == "__main__":
    main()
