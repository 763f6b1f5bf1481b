"""The evaluation's grades as a reward, so that training and evaluation agree on what is right.

In a recipe: `reward_funcs: oblr_trl.evaluation.rewards.math_accuracy`.
"""

import functools
from collections import defaultdict
from collections.abc import Callable
from typing import Any

from oblr_trl.evaluation.grading import grade, parse_reference


def math_accuracy(
    completions: list[Any],
    solution: list[str],
    benchmark: list[str] | None = None,
    log_metric: Callable[[str, float], None] | None = None,
    **kwargs: Any,
) -> list[float | None]:
    r"""
    1 for a right answer, 0 for a wrong one, `None` (not rewarded at all) where math-verify cannot parse the solution.

    Differs from TRL's `accuracy_reward` in that a solution in LaTeX needs no dollar signs (there `2\sqrt{3}` is read as 2), that
    prompts need not be conversations, that an answer outside of LaTeX counts, and that the mean is logged: as `accuracy`, and
    where the data have a column `benchmark` as `accuracy/<benchmark>`.

    Args:
        completions (`list`):
            Texts, or conversations whose last message counts.
        solution (`list[str]`):
            Reference answers.
        benchmark (`list[str]`, *optional*):
            Names of the sets that the prompts are from, as [`~evaluation.training.benchmark_datasets`] has them.
        log_metric (`Callable`, *optional*):
            Given by the trainer.
    """
    texts = [text if isinstance(text, str) else text[-1]["content"] for text in completions]
    rewards: list[float | None] = []
    for text, answer in zip(texts, solution, strict=True):
        reference = _reference(answer)
        rewards.append(float(grade(reference, [text])[0]) if reference else None)
    if log_metric is not None:
        groups: dict[str, list[float]] = defaultdict(list)
        for name, reward in zip(benchmark or [""] * len(rewards), rewards, strict=True):
            if reward is not None:
                groups[f"accuracy/{name}" if name else "accuracy"].append(reward)
        for name, found in groups.items():
            log_metric(name, sum(found) / len(found))
    return rewards


@functools.lru_cache(maxsize=4096)
def _reference(answer: str) -> list[Any]:
    """The G completions of a prompt share its parsed solution."""
    return parse_reference(answer)
