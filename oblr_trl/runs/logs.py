"""The logs of whole training runs, found, checked and grouped by method.

A run is read from the `trainer_state.json` that the trainer itself writes, so any trainer of transformers or TRL can be compared.
"""

import json
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

STATE_FILE = "trainer_state.json"
CHECKPOINT = re.compile(r"checkpoint-(\d+)")


class RunLogError(ValueError):
    """A run that cannot be read; the message holds the path, the reason and the remedy."""


@dataclass(frozen=True)
class RunLog:
    """
    The log of one training run, as the state at `path` holds it: the optimizer steps done (`global_step`), and one dict per
    logging event, each with its `step` (`log_history`).
    """

    path: Path
    num_steps: int
    rows: list[dict[str, Any]]

    def series(self, metric: str) -> dict[int, float]:
        """[`logged_values`] of this run."""
        return logged_values(self.rows, metric)


def logged_values(rows: Iterable[Mapping[str, Any]], metric: str) -> dict[int, float]:
    """
    The values of `metric` by optimizer step, in the order of the steps, in rows such as `trainer.state.log_history`.

    JSON nulls (TRL writes them for a metric that was undefined on every batch) and non-finite numbers count as not logged. Of
    two values for one step the later one stands: it is the one after a repeated evaluation.
    """
    values = {int(row["step"]): float(row[metric]) for row in rows if _is_finite_number(row.get(metric))}
    return dict(sorted(values.items()))


def _is_finite_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def read_methods(arguments: Sequence[str]) -> dict[str, list[RunLog]]:
    """
    Read `RUN` or `LABEL=RUN` arguments and group the runs (seeds) by method, in the order in which the methods are first named.

    A `RUN` is an output directory of a trainer, or a directory of such directories called `seed-*`. Without a label, the method
    is called after the directory; after its parent, where the directory is itself a `seed-*` or `checkpoint-*`.

    Raises:
        `RunLogError`: no argument, an empty label, a run given twice, or a run that cannot be read.
    """
    if not arguments:
        raise RunLogError(
            "no runs given: name at least one output directory of a trainer, for example `runs/oblrpo GRPO=runs/grpo`"
        )
    methods: dict[str, list[RunLog]] = {}
    seen: set[Path] = set()
    for argument in arguments:
        label, directory = split_label(argument)
        for seed_directory in _seed_directories(directory):
            run = read_run(seed_directory)
            if run.path.resolve() in seen:
                raise RunLogError(f"{run.path}: given twice, it would count as two seeds; name every run once")
            seen.add(run.path.resolve())
            methods.setdefault(label, []).append(run)
    return methods


def split_label(argument: str) -> tuple[str, Path]:
    """Split `LABEL=PATH`; a path that exists as it is written may itself hold an equals sign."""
    if "=" in argument and not Path(argument).exists():
        label, _, path = argument.partition("=")
        if not label.strip() or not path:
            raise RunLogError(f"{argument}: an empty label or path; write `LABEL=PATH`, or the path alone")
        return label.strip(), Path(path)
    named = Path(os.path.abspath(argument))  # `.` and a trailing `..` get a name; links keep theirs
    while named.name.startswith("seed-") or CHECKPOINT.fullmatch(named.name):
        named = named.parent
    return named.name, Path(argument)


def _seed_directories(directory: Path) -> list[Path]:
    """The `seed-*` directories below `directory`, in order of their numbers, or else `directory` itself."""
    if not directory.is_dir():
        reason = "is a file" if directory.exists() else "does not exist"
        raise RunLogError(f"{directory}: {reason}; name a directory, the `output_dir` of a training run")
    seeds = sorted((path for path in directory.glob("seed-*") if path.is_dir()), key=lambda p: (len(p.name), p.name))
    if seeds and _state_files(directory):
        raise RunLogError(
            f"{directory}: holds both a run of its own and `seed-*` runs; name the one that is meant, "
            f"for example `{directory}/seed-*`"
        )
    return seeds or [directory]


def read_run(directory: Path) -> RunLog:
    """
    Read the state of the run that got furthest: the one `trainer.save_state()` left in `directory`, or that of the newest
    checkpoint where it has done more steps (a run that was interrupted after an earlier one had been saved).
    """
    candidates = _state_files(directory)
    if not candidates:
        raise RunLogError(
            f"{directory}: holds neither {STATE_FILE} nor checkpoint-*/{STATE_FILE}; name the `output_dir` of a training "
            "run, and have the run call `trainer.save_state()` or save a checkpoint"
        )
    # `max` keeps the first of equals: at the same step the saved state also knows the time that training took.
    run = max(map(_read_state, candidates), key=lambda run: run.num_steps)
    if not run.rows:
        raise RunLogError(
            f"{run.path}: log_history is empty, so there is nothing to compare; train for at least `logging_steps` steps"
        )
    return run


def _state_files(directory: Path) -> list[Path]:
    """The state saved in `directory` and that of its newest checkpoint, as far as they exist."""
    states = {
        int(match[1]): path
        for path in directory.glob(f"checkpoint-*/{STATE_FILE}")
        if (match := CHECKPOINT.fullmatch(path.parent.name))
    }
    newest = [states[max(states)]] if states else []
    return [path for path in (directory / STATE_FILE, *newest) if path.is_file()]


def _read_state(path: Path) -> RunLog:
    remedy = "restore it, or remove it so that an earlier checkpoint is read"
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RunLogError(f"{path}: cannot be read ({error.strerror}); check its permissions") from error
    except ValueError as error:  # truncated or otherwise broken JSON, or bytes that are not text
        raise RunLogError(
            f"{path}: not valid JSON ({error}), perhaps cut off while it was written; {remedy}"
        ) from error
    for key, kind, name in (("log_history", list, "list"), ("global_step", int, "whole number")):
        if not isinstance(state, dict) or not isinstance(state.get(key), kind):
            raise RunLogError(f"{path}: not the state of a trainer, it has no {name} `{key}`; {remedy}")
    for index, row in enumerate(state["log_history"]):
        if not isinstance(row, dict) or not _is_finite_number(row.get("step")):
            raise RunLogError(f"{path}: row {index} of log_history has no `step`; {remedy}")
    return RunLog(path=path, num_steps=state["global_step"], rows=state["log_history"])
