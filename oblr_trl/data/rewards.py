"""Verifiable rewards by name: TRL's own, a dotted import path, or the scorer of the reasoning-gym task at hand."""

import functools
import importlib
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trl.rewards import (
    accuracy_reward,
    get_soft_overlong_punishment,
    reasoning_accuracy_reward,
    think_format_reward,
)

from oblr_trl.data.prompt_sets import DataArguments
from oblr_trl.data.recipe_files import option
from oblr_trl.data.tasks import decode_entry, make_task, nearest

Reward = Callable[..., list[float | None]]

TASK_REWARD = "task"
# Rewards of TRL that take no settings.
TRL_REWARDS: dict[str, Any] = {
    reward.__name__: reward for reward in (accuracy_reward, reasoning_accuracy_reward, think_format_reward)
}
OVERLONG_REWARD = "get_soft_overlong_punishment"
REWARD_NAMES = (TASK_REWARD, *TRL_REWARDS, OVERLONG_REWARD)
# What TRL hands to every reward function in addition to the columns of the dataset.
TRL_KEYWORDS = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric", "environments")


@dataclass
class RewardArguments:
    """How completions are rewarded. Fields are documented by their `help`."""

    reward_funcs: list[str] | None = option(  # noqa: RUF009
        None,
        "Reward functions: `task` (the reasoning-gym task's own scorer), `accuracy_reward`, `reasoning_accuracy_reward`, "
        "`think_format_reward`, `get_soft_overlong_punishment`, or dotted import paths such as `my_package.my_reward`. "
        "Defaults to `task` for a reasoning-gym task; a dataset has no default.",
    )
    soft_punish_cache: int = option(
        256, "Tokens below `max_completion_length` in which `get_soft_overlong_punishment` grows from 0 to -1."
    )

    def __post_init__(self):
        if isinstance(self.reward_funcs, str):  # `reward_funcs: task` in a recipe
            self.reward_funcs = [self.reward_funcs]


def load_rewards(
    args: RewardArguments, data_args: DataArguments, *, columns: list[str], max_completion_length: int
) -> list[Reward]:
    """
    Resolve the names of `args.reward_funcs` to functions with TRL's calling convention. `columns` are those of the training set,
    `max_completion_length` is in tokens.
    """
    names = args.reward_funcs or ([TASK_REWARD] if data_args.task is not None else [])
    if not names:
        raise ValueError(
            "`reward_funcs` is empty: a dataset needs at least one reward, for example `accuracy_reward`."
        )
    reward_funcs = [_load_reward(name, args, data_args, max_completion_length) for name in names]
    for name, reward_func in zip(names, reward_funcs, strict=True):
        _check_columns(name, reward_func, columns)
    return reward_funcs


def _load_reward(name: str, args: RewardArguments, data_args: DataArguments, max_completion_length: int) -> Reward:
    if name == TASK_REWARD:
        if data_args.task is None:
            raise ValueError(
                "`reward_funcs` names 'task', but no reasoning-gym `task` is set: set it, or name another."
            )
        assert not isinstance(data_args.task_params, str)  # parsed by DataArguments
        return task_reward(data_args.task, data_args.task_params)
    if name in TRL_REWARDS:
        return _on_messages(TRL_REWARDS[name])
    if name == OVERLONG_REWARD:
        if not 0 < args.soft_punish_cache < max_completion_length:
            raise ValueError(
                f"`soft_punish_cache` is {args.soft_punish_cache}, but must be positive and below `max_completion_length` "
                f"({max_completion_length})."
            )
        return get_soft_overlong_punishment(max_completion_length, args.soft_punish_cache)
    if "." in name:
        return _import_reward(name)
    raise ValueError(
        f"`reward_funcs` names {name!r}, which is unknown{nearest(name, REWARD_NAMES)}. Use one of "
        f"{', '.join(REWARD_NAMES)}, or a dotted import path."
    )


def _import_reward(path: str) -> Reward:
    module_name, _, attribute = path.rpartition(".")
    if str(Path.cwd()) not in sys.path:  # as TRL's scripts do: a reward may lie in the directory of the launch
        sys.path.insert(0, str(Path.cwd()))
    try:
        return getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"`reward_funcs` names {path!r}, which cannot be imported ({error}): install it, or launch from the directory that "
            "holds it."
        ) from error


def _check_columns(name: str, reward_func: Reward, columns: list[str]) -> None:
    """TRL calls a reward with every column as a keyword: a parameter without a default must be one of them."""
    for parameter in inspect.signature(reward_func).parameters.values():
        variadic = parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
        if variadic or parameter.default is not parameter.empty or parameter.name in (*TRL_KEYWORDS, *columns):
            continue
        remedy = f"add the column {parameter.name!r} to the data, or choose another reward"
        if parameter.name == "solution":
            remedy = "set `answer_column` to the column that holds the reference answer"
        raise ValueError(
            f"`reward_funcs` names {name!r}, which reads the column {parameter.name!r}, but the training set has only "
            f"{', '.join(columns)}: {remedy}."
        )


def _on_messages(reward_func: Reward) -> Reward:
    """TRL's own rewards read completions of conversations; this lets them read those of plain prompts too."""

    @functools.wraps(reward_func)
    def reward(completions: list[Any], **kwargs: Any) -> list[float | None]:
        messages = [[{"role": "assistant", "content": c}] if isinstance(c, str) else c for c in completions]
        return reward_func(completions=messages, **kwargs)

    return reward


def task_reward(task: str, params: dict[str, Any] | None = None) -> Reward:
    """
    The scorer of a reasoning-gym task as a reward function. Reads the column `entry`, and logs as `accuracy` the fraction
    of completions that earn the full score of 1: scorers may pay partial ones.
    """
    scorer = make_task(task, params, size=1, seed=0)

    def reward(
        completions: list[Any], entry: list[str], log_metric: Callable[[str, float], None] | None = None, **kwargs: Any
    ) -> list[float | None]:
        texts = [c if isinstance(c, str) else c[-1]["content"] for c in completions]  # or a list of messages
        scores = [
            float(scorer.score_answer(text, decode_entry(encoded))) for text, encoded in zip(texts, entry, strict=True)
        ]
        if log_metric is not None:
            log_metric("accuracy", sum(score >= 1 for score in scores) / len(scores))
        return list(scores)

    reward.__name__ = task  # TRL logs rewards under the function's name
    return reward
