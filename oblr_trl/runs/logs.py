"""The logs of whole training runs, found and grouped by method.

A run is read from the `trainer_state.json` that the trainer itself writes, so any trainer of transformers or TRL can be compared.
"""

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

STATE_FILE = "trainer_state.json"


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
    values = {row["step"]: float(row[metric]) for row in rows if row.get(metric) is not None}
    return {step: values[step] for step in sorted(values) if math.isfinite(values[step])}


def read_methods(arguments: Sequence[str]) -> dict[str, list[RunLog]]:
    """
    Read `RUN` or `LABEL=RUN` arguments and group the runs (seeds) by method, in the order in which the methods are first named.

    A `RUN` is an output directory of a trainer, or a directory of such directories called `seed-*`. Without a label, the method
    is called after the directory; after its parent, where the directory is itself a `seed-*`.

    Raises:
        `ValueError`: a run that cannot be read.
    """
    methods: dict[str, list[RunLog]] = {}
    for label, directory in map(split_label, arguments):
        seeds = sorted(directory.glob("seed-*"), key=_by_number)
        methods.setdefault(label, []).extend(map(read_run, seeds or [directory]))
    return methods


def split_label(argument: str) -> tuple[str, Path]:
    """Split `LABEL=PATH`, or name the path by its last part."""
    label, equals, path = argument.partition("=")
    if equals:
        return label, Path(path)
    named = Path(os.path.abspath(argument))  # `.` gets a name; links keep theirs
    return named.parent.name if named.name.startswith("seed-") else named.name, Path(argument)


def _by_number(path: Path) -> tuple[int, str]:
    """Sorts `seed-2` before `seed-10`."""
    return len(path.name), path.name


def read_run(directory: Path) -> RunLog:
    """Read the state that `trainer.save_state()` left in `directory`, or else that of the newest checkpoint in it."""
    states = sorted(directory.glob(f"checkpoint-[0-9]*/{STATE_FILE}"), key=lambda path: _by_number(path.parent))
    states += directory.glob(STATE_FILE)
    if not states:
        raise ValueError(
            f"{directory}: holds neither {STATE_FILE} nor checkpoint-*/{STATE_FILE}; name the `output_dir` of a training "
            "run, and have the run call `trainer.save_state()` or save a checkpoint"
        )
    path = states[-1]
    try:
        state = json.loads(path.read_text())
        run = RunLog(path=path, num_steps=state["global_step"], rows=state["log_history"])
    except (ValueError, KeyError, TypeError) as error:  # for example cut off while it was written
        raise ValueError(
            f"{path}: not the state of a trainer ({error!r}); restore it, or remove it so that a checkpoint is read"
        ) from error
    if not run.rows:
        raise ValueError(f"{path}: log_history is empty; train for at least `logging_steps` steps")
    return run
