"""Several real training runs in one process that take turns, one global step at a time.

Every trainer runs its own `train()` in a thread of its own and waits in a callback for its turn; one thread at most is ever
at work. So a step is a whole one (generation, rewards, scoring, loss, backward, optimizer), no part of the host's loop is
re-implemented, and a slow spell of the machine meets all trainers alike.
"""

import threading
import time
from typing import Any

import torch
from tqdm import tqdm
from transformers import TrainerCallback


class SteppedTraining(TrainerCallback):
    """
    A `train()` that does one global step when it is told to.

    Args:
        trainer ([`~transformers.Trainer`]): A trainer that has not been trained yet.
    """

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
        """Go on to the first step, and wait before it."""
        self._thread.start()
        self._wait()

    def step(self) -> None:
        """Do one global step, and what lies between it and the next one (which is not timed)."""
        self._turn.release()
        self._wait()

    def on_step_begin(self, *args, **kwargs) -> None:
        self._paused.release()
        self._turn.acquire()
        self._started = time.perf_counter()

    def on_step_end(self, *args, **kwargs) -> None:
        self.seconds.append(time.perf_counter() - self._started)

    def logged(self, name: str) -> list[float]:
        """One of the trainer's metrics over the steps; empty where it does not log it."""
        return [row[name] for row in self.trainer.state.log_history if name in row]

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


def interleave(trainers: dict[str, Any], rounds: int, progress: tqdm) -> dict[str, dict[str, list[float]]]:
    """
    Seconds of every trainer's steps and of its scoring pass, round by round.

    Args:
        trainers (`dict[str, Trainer]`): Each set up for `rounds + 1` steps that are logged one by one.
        rounds (`int`): Steps of each that count; one more, the first, warms up.
        progress (`tqdm`): Advanced by one for every step.

    Returns:
        `dict`: `"seconds"` and `"pass_seconds"`, each from a trainer's name to `rounds` numbers; a trainer without a scoring
        pass is missing from the latter.
    """
    runs = {name: SteppedTraining(trainer) for name, trainer in trainers.items()}
    for run in runs.values():
        run.start()
    names = list(runs)
    for round_ in range(rounds + 1):
        shift = round_ % len(names)  # so that none always follows the same one
        for name in names[shift:] + names[:shift]:
            runs[name].step()
            progress.update()
    passes = {name: run.logged("score/pass_time")[1:] for name, run in runs.items()}
    return {
        "seconds": {name: run.seconds[1:] for name, run in runs.items()},
        "pass_seconds": {name: seconds for name, seconds in passes.items() if seconds},
    }
