"""Verifiable rewards of the tasks of SmolLM2's recipes."""

import re
from typing import Any


def answer_reward(completions: list[Any], solution: list[str], **kwargs: Any) -> list[float]:
    """1 where the last number of the completion is the answer, 0 elsewhere."""
    return [
        float(re.findall(r"-?\d+", _text(completion))[-1:] == [answer])
        for completion, answer in zip(completions, solution, strict=True)
    ]


def list_reward(completions: list[Any], num_items: list[int], **kwargs: Any) -> list[float]:
    """
    How well a completion is a list of `num_items` things on one line, separated by commas: the share of its items that are one to
    three words and no repetition, times how near their number is, max(0, 1 - |m - n| / n). In [0, 1].
    """
    return [_list_score(_text(completion), wanted) for completion, wanted in zip(completions, num_items, strict=True)]


def _text(completion: Any) -> str:
    text = completion if isinstance(completion, str) else completion[-1]["content"]
    return text.strip()


def _list_score(text: str, num_items: int) -> float:
    items = [item.strip().removesuffix(".").lower() for item in text.split(",")]
    good = {item for item in items if 1 <= len(item.split(" ")) <= 3 and item.replace(" ", "").isalpha()}
    return max(0.0, 1 - abs(len(items) - num_items) / num_items) * len(good) / len(items)
