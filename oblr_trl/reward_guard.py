"""Reward functions whose failure reaches every process, and that may only take so long.

TRL calls the reward functions on each process and then gathers their results: if one raises, or waits for a server that never
answers, all other processes wait in that gather. A guarded function never raises: the guard keeps the first error, and the
trainer raises it on all processes after the gather.
"""

import asyncio
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from torch import nn
from trl.trainer.utils import get_callable_name, is_async_callable

# Ignored unless handled, so that one that arrives late does no harm; SIGALRM belongs to math-verify's own timeouts.
_WAKE_UP = signal.SIGURG


class RewardGuard:
    """
    Guards the reward functions of one trainer.

    Args:
        timeout (`float`, *optional*):
            Longest time of one call, in seconds. No limit if not given.
    """

    def __init__(self, timeout: float | None = None) -> None:
        self.timeout = timeout
        self._error: Exception | None = None

    def take_error(self) -> Exception | None:
        """The first error since the last call of this method."""
        error, self._error = self._error, None
        return error

    def guard(self, reward_func: Any) -> Any:
        """The guarded reward function, synchronous or asynchronous as it was. A reward model is returned as it is."""
        if isinstance(reward_func, nn.Module):
            return reward_func
        name = get_callable_name(reward_func)
        wrapper = self._guard_async if is_async_callable(reward_func) else self._guard_sync
        guarded = wrapper(reward_func, name)
        guarded.__name__ = name
        return guarded

    def _guard_sync(self, reward_func: Callable, name: str) -> Callable:
        def guarded(**kwargs: Any) -> list:
            try:
                with _time_limit(self.timeout):
                    return _checked(reward_func(**kwargs), kwargs["prompts"])
            except Exception as error:
                return self._keep(error, name, kwargs["prompts"])

        return guarded

    def _guard_async(self, reward_func: Callable, name: str) -> Callable:
        async def guarded(**kwargs: Any) -> list:
            try:
                async with asyncio.timeout(self.timeout) as limit:
                    return _checked(await reward_func(**kwargs), kwargs["prompts"])
            except Exception as error:
                return self._keep(_OutOfTime() if limit.expired() else error, name, kwargs["prompts"])

        return guarded

    def _keep(self, error: Exception, name: str, prompts: list) -> list[float]:
        if isinstance(error, _OutOfTime):
            error = TimeoutError(
                f"The reward function '{name}' took longer than reward_timeout={self.timeout} seconds. Raise it, or look at "
                "what the function waits for."
            )
        else:
            error.add_note(f"Raised by the reward function '{name}'.")
        self._error = self._error or error
        return [0.0] * len(prompts)  # never used: the trainer raises before anything reads it


class _OutOfTime(Exception):
    """The guard's own limit, not a timeout that the reward function raised itself."""


def _checked(rewards: Any, prompts: list) -> list:
    """TRL makes the same complaint about the count, but on the process at fault only."""
    rewards = list(rewards)
    if len(rewards) != len(prompts):
        raise ValueError(
            f"A reward function returned {len(rewards)} rewards, but {len(prompts)} were expected (one per "
            "prompt-completion pair)."
        )
    return [None if reward is None else float(reward) for reward in rewards]


@contextmanager
def _time_limit(seconds: float | None) -> Iterator[None]:
    """Raise `_OutOfTime` in the main thread when the time is up, also out of a blocking system call.

    A thread for the function would not do: rewards that use signals themselves (math-verify) only work in the main one.
    """
    if seconds is None:
        yield
        return
    if threading.current_thread() is not threading.main_thread():
        raise RuntimeError("`reward_timeout` needs training to run in the main thread. Leave it unset.")
    running = True

    def wake_up(signum: int, frame: FrameType | None) -> None:
        if running:
            raise _OutOfTime

    previous = signal.signal(_WAKE_UP, wake_up)
    main_thread = threading.main_thread().ident
    assert main_thread is not None
    timer = threading.Timer(seconds, signal.pthread_kill, args=(main_thread, _WAKE_UP))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        running = False
        timer.cancel()
        timer.join()  # from here on no signal can come
        signal.signal(_WAKE_UP, previous)
