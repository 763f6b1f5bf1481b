"""Reward functions whose failure reaches every process, and that may only take so long.

TRL calls the reward functions on each process and then gathers their results: if one raises, or waits for a server that never
answers, all other processes wait in that gather. A wrapped function never raises: its first error is kept, and the trainer raises
it on all processes after the gather.
"""

import asyncio
import signal
import sys
import threading
import time
from collections.abc import Awaitable, Callable
from types import FrameType
from typing import Any

from torch import nn
from trl.trainer.utils import get_callable_name, is_async_callable

# Ignored unless handled, so that one that arrives late does no harm; SIGALRM belongs to math-verify's own timeouts.
_WAKE_UP: Any = getattr(signal, "SIGURG", None)  # Unix

# Time to close files and connections, in seconds, after an interruption and before the next one.
_GRACE = 1.0


class RewardFunctions:
    """
    Wraps the reward functions of one trainer, and keeps their first error.

    Args:
        timeout (`float`, *optional*):
            Longest time of one call, in seconds. No limit if not given. Code that neither returns nor lets Python handle a
            signal, such as a blocking call inside an asynchronous function, is not interrupted, but still counts as late.
    """

    def __init__(self, timeout: float | None = None) -> None:
        if timeout is not None and _WAKE_UP is None:
            raise ValueError(
                "`reward_timeout` interrupts by Unix signals, which this platform lacks. Leave it at None."
            )
        self.timeout = timeout
        self._error: Exception | None = None

    def take_error(self) -> Exception | None:
        """The first error since the last call of this method."""
        error, self._error = self._error, None
        return error

    def wrap(self, reward_func: Any) -> Any:
        """The function with its errors kept, synchronous or asynchronous as it was. A reward model is returned as it is."""
        if isinstance(reward_func, nn.Module):
            return reward_func
        name = get_callable_name(reward_func)

        def call(prompts: list | None = None, **kwargs: Any) -> list:
            if prompts is None:  # not a call of the trainer's
                return reward_func(**kwargs)
            try:
                return _call_in_time(lambda: _checked(reward_func(prompts=prompts, **kwargs), prompts), self.timeout)
            except Exception as error:
                return self._keep(error, name, prompts)

        async def call_async(prompts: list | None = None, **kwargs: Any) -> list:
            if prompts is None:
                return await reward_func(**kwargs)
            try:
                return _checked(await _await_in_time(reward_func(prompts=prompts, **kwargs), self.timeout), prompts)
            except Exception as error:
                return self._keep(error, name, prompts)

        wrapped = call_async if is_async_callable(reward_func) else call
        wrapped.__name__ = name
        return wrapped

    def _keep(self, error: Exception, name: str, prompts: list) -> list[float]:
        if isinstance(error, _OutOfTime):
            late = TimeoutError(
                f"The reward function '{name}' took longer than reward_timeout={self.timeout} seconds. Raise it, or look at "
                "what the function waits for."
            )
            late.__cause__ = error.__context__  # shows where the function was
            error = late
        else:
            error.add_note(f"Raised by the reward function '{name}'.")
        self._error = self._error or error
        return [0.0] * len(prompts)  # never used: the trainer raises before anything reads it


class _OutOfTime(Exception):
    """The limit of `reward_timeout`, not a timeout that the reward function raised itself."""


class _Interruption(BaseException):
    """Ends a reward function whose time is up; `except Exception` does not catch it."""


def _checked(rewards: Any, prompts: list) -> list:
    """TRL makes the same complaint about the count, but on the process at fault only."""
    rewards = list(rewards)
    if len(rewards) != len(prompts):
        raise ValueError(
            f"A reward function returned {len(rewards)} rewards, but {len(prompts)} were expected (one per "
            "prompt-completion pair)."
        )
    return [None if reward is None else float(reward) for reward in rewards]


def _call_in_time(function: Callable[[], list], seconds: float | None) -> list:
    """
    Call a function in the main thread, where alone Python handles signals; raise `_OutOfTime` if it took longer, whatever it caught, raised or returned.

    It is interrupted by a signal, also out of a blocking system call, and again every second until it ends: it may wait in a
    clean-up, or catch everything and continue. A thread for the function would not do: rewards that use signals themselves
    (math-verify) only work in the main one.
    """
    if seconds is None:
        return function()
    main_thread, this_frame = threading.get_ident(), sys._getframe()
    running, left = False, threading.Event()
    start = time.monotonic()

    def interrupt(signum: int, frame: FrameType | None) -> None:
        if running and frame is not this_frame:  # else the function has been left
            raise _Interruption

    def send_interruptions() -> None:
        wait = seconds
        while not left.wait(wait):
            signal.pthread_kill(main_thread, _WAKE_UP)
            wait = _GRACE

    previous = signal.signal(_WAKE_UP, interrupt)
    sender = threading.Thread(target=send_interruptions, daemon=True)
    sender.start()
    try:
        running = True
        return function()
    finally:
        running = False
        left.set()
        sender.join()  # from here on no signal can come
        signal.signal(_WAKE_UP, previous)
        if time.monotonic() - start >= seconds:
            raise _OutOfTime


async def _await_in_time(call: Awaitable, seconds: float | None) -> Any:
    """As `_call_in_time`, for a coroutine. One that catches its cancellation and continues is left behind, not awaited."""
    start = time.monotonic()
    task = asyncio.ensure_future(call)
    await asyncio.wait({task}, timeout=seconds)
    if seconds is not None and time.monotonic() - start >= seconds:
        task.cancel()
        await asyncio.wait({task}, timeout=_GRACE)
        raise _OutOfTime
    return task.result()
