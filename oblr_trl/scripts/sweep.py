"""Launch a recipe once for every combination of a grid and every seed, skip what is finished, and tabulate the results.

    python -m oblr_trl.scripts.sweep --config recipes/ablation/chain_sum.yaml

Differs from a loop around `accelerate launch` in that every run is checked before the first one starts, combinations that are
the same run are trained once, and a sweep that was killed goes on where it stood: a run resumes from its last checkpoint.
"""

import argparse
import dataclasses
import itertools
import json
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from oblr_trl.checkpoints import last_complete_checkpoint
from oblr_trl.data.tasks import nearest
from oblr_trl.runs.logs import STATE_FILE, RunLog, read_run
from oblr_trl.scripts.compare import TABLE_ROWS, compare, format_statistic
from oblr_trl.scripts.train import parse

RECIPE_FILE = "recipe.yaml"
LOG_FILE = "launch.log"
# The grid of the launched recipes is checked on whatever machine the sweep is started from.
ON_CPU = ("--use_cpu", "true", "--bf16", "false")


class SweepError(ValueError):
    """A sweep that cannot be run as it is written; the message holds the place, the reason and the remedy."""


@dataclass
class SweepArguments:
    """
    A sweep: one recipe, the axes along which it varies, and how it is launched.

    Args:
        recipe (`str`):
            Recipe that every run starts from.
        output_dir (`str`):
            Directory of the sweep; a run lies in `<combination>/seed-<seed>` below it.
        grid (`dict[str, list | dict]`):
            Axes: an option of the recipe with the list of its values. A mapping from values to further options sets
            these together with the value, for example a learning rate that belongs to it. `null` leaves the option out.
        seeds (`list[int]`):
            Seeds of every combination.
        launch (`str`, *optional*, defaults to `""`):
            Arguments of `accelerate launch`, for example `--config_file recipes/accelerate_configs/single_gpu.yaml`.
        overrides (`dict`, *optional*):
            Options of all runs that differ from the recipe's.
    """

    recipe: str
    output_dir: str
    grid: dict[str, list[Any] | dict[Any, dict[str, Any]]]
    seeds: list[int]
    launch: str = ""
    overrides: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class SweepRun:
    """
    One run of a sweep.

    Args:
        combination (`str`): Values of the axes, for example `"gradient_weighted-snr-all-auto"`.
        values (`dict[str, Any]`): The same by axis; an axis that does not apply is left out.
        directory (`Path`): Output directory.
        recipe (`dict[str, Any]`): The whole recipe of the run.
    """

    combination: str
    values: dict[str, Any]
    directory: Path
    recipe: dict[str, Any]


def read_sweep(path: Path) -> SweepArguments:
    """
    Read the YAML file of a sweep, strictly.

    Raises:
        `SweepError`: no such file, no mapping, an unknown or missing key, an empty axis or no seed.
    """
    if not path.is_file():
        raise SweepError(f"{path}: there is no such file; name one, for example recipes/ablation/chain_sum.yaml")
    content = yaml.safe_load(path.read_text())
    if not isinstance(content, dict):
        raise SweepError(f"{path}: must hold `key: value` lines, got {type(content).__name__}")
    fields = {f.name: f for f in dataclasses.fields(SweepArguments)}
    for key in content:
        if key not in fields:
            raise SweepError(f"{path}: unknown key `{key}`{nearest(key, fields)}; use {', '.join(fields)}")
    for key in ("recipe", "output_dir", "grid", "seeds"):
        if not content.get(key):
            raise SweepError(f"{path}: `{key}` is missing or empty; set it")
    for axis, values in content["grid"].items():
        if not isinstance(values, list | dict) or not values:
            raise SweepError(
                f"{path}: the axis `{axis}` is {values!r}; give a list of values, or a mapping from values to options"
            )
    if len(set(content["seeds"])) < len(content["seeds"]):
        raise SweepError(f"{path}: `seeds` names a seed twice; the second run would overwrite the first")
    if not Path(content["recipe"]).is_file():
        raise SweepError(
            f"{path}: `recipe` names {content['recipe']!r}, but there is no such file (looked for from here)"
        )
    return SweepArguments(**content)


def plan(sweep: SweepArguments) -> list[SweepRun]:
    """All runs of a sweep, each combination once with its seeds in a row."""
    recipe = yaml.safe_load(Path(sweep.recipe).read_text())
    axes: list[list[tuple[Any, dict[str, Any]]]]
    axes = [list(v.items()) if isinstance(v, dict) else [(value, {}) for value in v] for v in sweep.grid.values()]
    runs: dict[Path, SweepRun] = {}
    for point in itertools.product(*axes):
        values = _applicable({axis: value for axis, (value, _) in zip(sweep.grid, point, strict=True)}, recipe)
        options = {
            k: v for axis, (_, more) in zip(sweep.grid, point, strict=True) if axis in values for k, v in more.items()
        }
        combination = "-".join("auto" if value is None else str(value) for value in values.values())
        for seed in sweep.seeds:
            directory = Path(sweep.output_dir) / combination / f"seed-{seed}"
            settings = dict.fromkeys(sweep.grid) | values | options | sweep.overrides
            settings |= {"seed": seed, "output_dir": str(directory)}
            merged = {key: value for key, value in (recipe | settings).items() if value is not None}
            runs.setdefault(directory, SweepRun(combination, values, directory, merged))
    return list(runs.values())


def _applicable(values: Mapping[str, Any], recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Without the axes that change nothing at this point of the grid, and that the configuration would refuse."""
    baseline = values.get("baseline", recipe.get("baseline", "gradient_weighted"))
    adaptation = values.get("lr_adaptation", recipe.get("lr_adaptation", "snr"))
    idle = set()
    if baseline != "gradient_weighted":
        idle.add("baseline_prior_strength")
        if adaptation != "snr":  # no scores are needed
            idle |= {"score_scope", "score_method", "score_sketch_dim"}
    return {axis: value for axis, value in values.items() if axis not in idle}


def check(runs: Sequence[SweepRun]) -> None:
    """
    Parse every run, strictly, as the training script will.

    Raises:
        `SweepError`: A run that would be refused, or whose directory holds a run of another recipe.
    """
    with tempfile.TemporaryDirectory() as folder:
        for run in runs:
            written = run.directory / RECIPE_FILE
            if written.exists() and yaml.safe_load(written.read_text()) != run.recipe:
                raise SweepError(
                    f"{run.directory}: holds a run of another recipe ({RECIPE_FILE} differs); remove it, or set another "
                    "`output_dir`"
                )
            try:
                parse(["--config", str(_write_recipe(run, Path(folder))), *ON_CPU])
            except ValueError as error:
                raise SweepError(f"{run.directory}: {error}") from error


def _write_recipe(run: SweepRun, folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / RECIPE_FILE
    path.write_text(yaml.safe_dump(run.recipe, sort_keys=False))
    return path


def is_finished(run: SweepRun) -> bool:
    """Whether training came to its end: the script saves the state in the output directory only then."""
    return (run.directory / STATE_FILE).is_file()


def launch(run: SweepRun, arguments: str) -> bool:
    """Train, with the output in the run's directory; whether it came to its end."""
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        *shlex.split(arguments),
        "-m",
        "oblr_trl.scripts.train",
    ]
    command += ["--config", str(_write_recipe(run, run.directory))]
    if last_complete_checkpoint(str(run.directory)) is not None:
        command += ["--resume_from_checkpoint", "true"]
    with open(run.directory / LOG_FILE, "a") as log:
        code = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT).returncode
    return code == 0 and is_finished(run)  # some launchers exit with 0 although nothing was trained


def collect(runs: Sequence[SweepRun]) -> dict[str, Any]:
    """The finished runs by combination, as `oblr_trl.scripts.compare` tabulates them, with the axes' values."""
    methods: dict[str, list[RunLog]] = {}
    values = {}
    for run in runs:
        if is_finished(run):
            methods.setdefault(run.combination, []).append(read_run(run.directory))
            values[run.combination] = run.values
    comparison = compare(methods)
    for combination, entry in comparison["methods"].items():
        entry["values"] = {
            axis: "inf" if value == float("inf") else value for axis, value in values[combination].items()
        }
    return comparison


def format_table(results: Mapping[str, Any], axes: Sequence[str]) -> str:
    """The results as a Markdown table, a combination a row; mean ± standard deviation over seeds, blank where unknown."""
    evaluation = (results["evaluation_metric"] or "accuracy").removeprefix("eval_")
    rows = [[*axes, "seeds", *(name.format(evaluation=evaluation) for name, _ in TABLE_ROWS.values())]]
    rows.append(["---"] * len(rows[0]))
    for entry in results["methods"].values():
        cells = [_format_value(entry["values"], axis) for axis in axes]
        cells += [
            str(entry["num_seeds"]),
            *(format_statistic(entry[key], spec) for key, (_, spec) in TABLE_ROWS.items()),
        ]
        rows.append(cells)
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _format_value(values: Mapping[str, Any], axis: str) -> str:
    return ("auto" if values[axis] is None else str(values[axis])) if axis in values else ""


def make_parser() -> argparse.ArgumentParser:
    """The command line of this script."""
    parser = argparse.ArgumentParser(
        prog="python -m oblr_trl.scripts.sweep",
        description="Launch a recipe for every combination of a grid and every seed, and tabulate the results.",
    )
    parser.add_argument("--config", type=Path, required=True, help="YAML file of the sweep")
    parser.add_argument("--list", action="store_true", help="check and list the runs, and launch none")
    return parser


def main(argv: Sequence[str] | None = None) -> dict[str, Any] | None:
    """Run what is not finished, write `results.json` and `results.md`, and return the results, if there are any."""
    arguments = make_parser().parse_args(argv)
    try:
        sweep = read_sweep(arguments.config)
        runs = plan(sweep)
        check(runs)
    except SweepError as error:
        raise SystemExit(f"sweep: {error}") from error
    failed = []
    for number, run in enumerate(runs, start=1):
        name = f"[{number}/{len(runs)}] {run.directory}"
        if is_finished(run) or arguments.list:
            _say(f"{name}: {'finished' if is_finished(run) else 'to be run'}")
            continue
        _say(f"{name}: started")
        start = time.monotonic()
        if launch(run, sweep.launch):
            _say(f"{name}: finished in {time.monotonic() - start:.0f} s")
        else:
            failed.append(run)
            _say(f"{name}: FAILED, see {run.directory / LOG_FILE}")
    results = None
    if any(is_finished(run) for run in runs):
        results = collect(runs)
        table = format_table(results, list(sweep.grid))
        output_dir = Path(sweep.output_dir)
        (output_dir / "results.json").write_text(json.dumps(results, indent=2, allow_nan=False) + "\n")
        (output_dir / "results.md").write_text(table)
        _say(f"\n{table}\nresults: {output_dir / 'results.md'}, {output_dir / 'results.json'}")
    if failed:
        raise SystemExit(f"sweep: {len(failed)} of {len(runs)} runs failed; start it again to repeat only those")
    return results


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
