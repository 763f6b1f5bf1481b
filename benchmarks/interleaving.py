"""Measurements that take turns in one run, so that a slow spell of the machine affects all that is compared alike.

Passes take turns in rounds of rotating order; whole training runs take turns one global step at a time, each in its own
`train()`, so that no part of the trainer's loop is re-implemented. Ratios are taken within a round.
"""

import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from transformers import TrainerCallback


def rotating(names: list[str], rounds: int) -> Iterator[tuple[int, str]]:
    """Number of the round and name, for `rounds + 1` rounds: round 0 warms up. No name always follows the same one."""
    for round_ in range(rounds + 1):
        shift = round_ % len(names)
        for name in names[shift:] + names[:shift]:
            yield round_, name


def ratio_spread(numerators: list[float], denominators: list[float]) -> dict[str, float]:
    """Median and quartiles of the ratios within each round."""
    lower, middle, upper = np.quantile(np.divide(numerators, denominators), (0.25, 0.5, 0.75)).tolist()
    return {"median": middle, "lower": lower, "upper": upper}


class SteppedTraining(TrainerCallback):
    """The `train()` of a trainer in a thread of its own, one global step on demand; only one thread works at any time."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.seconds: list[float] = []
        self._error: BaseException | None = None
        self._turn, self._paused = threading.Semaphore(0), threading.Semaphore(0)
        self._num_threads = torch.get_num_threads()
        trainer.add_callback(self)
        # A daemon: a run that is given up must not keep the process alive.
        self._thread = threading.Thread(target=self._train, daemon=True)

    def start(self) -> None:
        """Train up to the first step, and wait before it."""
        self._thread.start()
        self._wait()

    def step(self) -> None:
        """Do one global step, and the work between it and the next one (which is not timed)."""
        self._turn.release()
        self._wait()

    def on_step_begin(self, *args, **kwargs) -> None:
        self._paused.release()
        self._turn.acquire()
        self._started = time.perf_counter()

    def on_step_end(self, *args, **kwargs) -> None:
        self.seconds.append(time.perf_counter() - self._started)

    def _train(self) -> None:
        torch.set_num_threads(self._num_threads)  # OpenMP's number is one of each thread
        try:
            self.trainer.train()
        except BaseException as error:  # raised again in the thread that waits
            self._error = error
        finally:
            self._paused.release()

    def _wait(self) -> None:
        self._paused.acquire()
        if self._error is not None:
            raise self._error


def interleave(trainers: dict[str, Any], rounds: int) -> dict[str, dict[str, list[float]]]:
    """
    Seconds of every trainer's steps (`"seconds"`) and of its scoring pass, if it has one (`"pass_seconds"`), in `rounds` rounds.
    Every trainer is set up for `rounds + 1` steps that are logged one by one; the first one warms up.
    """
    runs = {name: SteppedTraining(trainer) for name, trainer in trainers.items()}
    for run in runs.values():
        run.start()
    for _, name in rotating(list(runs), rounds):
        runs[name].step()
    passes = {
        name: [row["score/pass_time"] for row in trainer.state.log_history if "score/pass_time" in row][1:]
        for name, trainer in trainers.items()
    }
    return {
        "seconds": {name: run.seconds[1:] for name, run in runs.items()},
        "pass_seconds": {name: seconds for name, seconds in passes.items() if seconds},
    }
