"""Reward functions that fail, take too long, or return what is no reward: a clear error before a weight is touched.

What happens to the other processes is in tests/backends/test_faults.py.
"""

import asyncio
import ctypes
import math
import signal
import time
import traceback

import pytest

from oblr_trl import OBLRPOConfig, OBLRPOTrainer
from oblr_trl.checks import reward_functions
from oblr_trl.checks.reward_functions import RewardFunctions
from tests.tiny_models import train


def test_the_error_of_a_reward_function_keeps_its_type_and_names_the_function(tmp_path):
    def broken_reward(completions, **kwargs):
        raise KeyError("no such answer")

    async def broken_async_reward(completions, **kwargs):
        raise KeyError("no such answer")

    for reward in (broken_reward, broken_async_reward):
        with pytest.raises(KeyError, match="no such answer") as caught:
            train(OBLRPOTrainer, OBLRPOConfig, tmp_path, reward=reward)
        assert caught.value.__notes__ == [f"Raised by the reward function '{reward.__name__}'."]


def test_a_reward_that_is_no_number_is_refused(tmp_path):
    with pytest.raises(ValueError, match="could not convert string to float: 'good'"):
        train(OBLRPOTrainer, OBLRPOConfig, tmp_path, reward=lambda completions, **kwargs: ["good"] * len(completions))


def test_a_reward_function_that_takes_too_long_is_interrupted(tmp_path):
    async def slow_async_reward(completions, **kwargs):
        await asyncio.sleep(60)

    def slow_reward(completions, **kwargs):
        time.sleep(60)

    for reward in (slow_reward, slow_async_reward):
        before = time.monotonic()
        with pytest.raises(TimeoutError, match=rf"'{reward.__name__}' took longer than reward_timeout=0.5 seconds"):
            train(OBLRPOTrainer, OBLRPOConfig, tmp_path, reward=reward, reward_timeout=0.5)
        assert time.monotonic() - before < 50


WAIT = 20  # seconds: how long what follows takes if nothing interrupts it


def catches_exceptions():
    """As a client that gives a completion nothing when its judge fails."""
    try:
        time.sleep(WAIT)
    except Exception:
        return 0.0


def catches_everything():
    try:
        time.sleep(WAIT)
    except:  # noqa: E722
        return 0.0


def waits_in_its_clean_up():
    try:
        time.sleep(WAIT)
    finally:
        time.sleep(WAIT)


def raises_an_error_of_its_own():
    try:
        time.sleep(WAIT)
    except BaseException as error:
        raise KeyError("no such answer") from error


def holds_the_interpreter_lock():
    ctypes.PyDLL(None).usleep(500_000)  # microseconds; nothing can interrupt it


async def tries_again_when_cancelled():
    end = time.monotonic() + WAIT
    while time.monotonic() < end:
        try:
            await asyncio.sleep(WAIT)
        except (asyncio.CancelledError, TimeoutError):
            continue


async def blocks_the_event_loop():
    time.sleep(0.5)


@pytest.mark.parametrize(
    "wait",
    [
        catches_exceptions,
        catches_everything,
        waits_in_its_clean_up,
        raises_an_error_of_its_own,
        holds_the_interpreter_lock,
        tries_again_when_cancelled,
        blocks_the_event_loop,
    ],
)
def test_the_time_limit_holds_whatever_a_reward_function_catches(wait):
    def reward(prompts):
        return [wait() for _ in prompts]

    async def async_reward(prompts):
        return [await wait() for _ in prompts]

    errors = RewardFunctions(timeout=0.25)
    signal_handler = signal.getsignal(signal.SIGURG)
    before = time.monotonic()
    if asyncio.iscoroutinefunction(wait):
        asyncio.new_event_loop().run_until_complete(errors.wrap(async_reward)(prompts=["a", "b"]))
    else:
        errors.wrap(reward)(prompts=["a", "b"])

    assert time.monotonic() - before < WAIT
    error = errors.take_error()
    assert isinstance(error, TimeoutError)
    assert "reward' took longer than reward_timeout=0.25 seconds" in str(error)
    assert signal.getsignal(signal.SIGURG) is signal_handler


def test_the_error_of_a_time_limit_shows_where_the_function_was():
    errors = RewardFunctions(timeout=0.25)
    errors.wrap(lambda prompts: [catches_exceptions() for _ in prompts])(prompts=["a"])

    assert "in catches_exceptions" in "".join(traceback.format_exception(errors.take_error()))


def test_of_two_rewards_that_fail_the_first_error_is_kept():
    def fails(message):
        def reward(prompts):
            raise KeyError(message)

        return reward

    errors = RewardFunctions()
    for message in ("first", "second"):
        errors.wrap(fails(message))(prompts=["a"])

    assert errors.take_error().args == ("first",)
    errors.wrap(fails("of the next batch"))(prompts=["a"])
    assert errors.take_error().args == ("of the next batch",)


def test_a_timeout_of_the_reward_function_itself_is_passed_on(tmp_path):
    def impatient_reward(completions, **kwargs):
        raise TimeoutError("the server is busy")

    with pytest.raises(TimeoutError, match="the server is busy"):
        train(OBLRPOTrainer, OBLRPOConfig, tmp_path, reward=impatient_reward, reward_timeout=30)


def test_the_time_limit_leaves_signals_and_rewards_alone():
    def uses_alarms(prompts, **kwargs):  # as math-verify does
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(5)
        signal.alarm(0)
        return [None, 1]

    before = signal.getsignal(signal.SIGURG)
    errors = RewardFunctions(timeout=5)

    assert errors.wrap(uses_alarms)(prompts=["a", "b"]) == [None, 1.0]
    assert errors.take_error() is None
    assert signal.getsignal(signal.SIGURG) is before


@pytest.mark.parametrize("timeout", [0, -1.0, math.nan])
def test_a_time_limit_must_be_positive(tmp_path, timeout):
    with pytest.raises(ValueError, match=r"cannot honour reward_timeout=.*seconds"):
        OBLRPOConfig(str(tmp_path), bf16=False, use_cpu=True, reward_timeout=timeout)


def test_a_reward_function_may_be_called_without_the_trainers_arguments():
    async def later(completions):
        return [2.0 for _ in completions]

    functions = RewardFunctions(None)
    assert functions.wrap(lambda completions: [1.0 for _ in completions])(completions=["a", "b"]) == [1.0, 1.0]
    assert asyncio.run(functions.wrap(later)(completions=["a"])) == [2.0]


def test_a_time_limit_is_refused_where_there_is_no_signal_to_interrupt_by(monkeypatch):
    monkeypatch.setattr(reward_functions, "_WAKE_UP", None)  # as on Windows
    RewardFunctions()
    with pytest.raises(ValueError, match=r"`reward_timeout` interrupts by Unix signals"):
        RewardFunctions(timeout=1.0)
