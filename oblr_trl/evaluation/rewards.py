r"""Grades by math-verify as TRL's `accuracy_reward` gives them, but also of answers outside of LaTeX.

The reference is put between dollar signs first: without them math-verify reads the LaTeX `2\sqrt{3}` as 2. What counts as equal is math-verify's judgement: 0.5 and
1/2, 50\% and 0.5, but also 50\% and 50; units in `\text{}` are dropped; a set has no order, a tuple has. The same
grades are a reward, so that training and evaluation agree on what is right; in a recipe:
`reward_funcs: oblr_trl.evaluation.rewards.math_accuracy`.
"""

import functools
import threading
from collections.abc import Callable, Sequence
from typing import Any

from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

from oblr_trl.data.answers import as_latex

_EXTRACTION = [LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig()]  # a `\boxed{}` comes first
# Seconds for one expression, as in `accuracy_reward`; an answer that takes longer counts as wrong, with a warning.
PARSING_TIMEOUT = 10
VERIFY_TIMEOUT = 5


@functools.lru_cache(maxsize=4096)  # the completions of a problem share its parsed answer
def parse_reference(answer: str) -> list[Any]:
    """The expressions that math-verify reads in a reference answer; without any, nothing could equal it."""
    parsed = parse(as_latex(answer), parsing_timeout=_seconds(PARSING_TIMEOUT))
    # Where math-verify understands nothing it keeps the text, which equals nothing but the same text.
    return parsed if any(not isinstance(expression, str) for expression in parsed) else []


def grade(answer: str, completions: Sequence[str]) -> list[bool]:
    r"""
    Whether each completion gives the reference answer: in `\boxed{}`, of which adjacent ones are one answer of several
    parts, or else as the last number or expression. [`parse_reference`] has to understand `answer`.
    """
    reference = parse_reference(answer)
    assert reference
    parsing_timeout, verify_timeout = _seconds(PARSING_TIMEOUT), _seconds(VERIFY_TIMEOUT)
    found = [parse(text, _EXTRACTION, parsing_timeout=parsing_timeout) for text in completions]
    return [bool(verify(reference, expressions, timeout_seconds=verify_timeout)) for expressions in found]


def math_accuracy(
    completions: list[Any],
    solution: list[str],
    log_metric: Callable[[str, float], None] | None = None,
    **kwargs: Any,
) -> list[float | None]:
    r"""
    1 for a right answer, 0 for a wrong one, `None` (not rewarded at all) where math-verify cannot parse the solution.

    Differs from TRL's `accuracy_reward` in that a solution in LaTeX needs no dollar signs, that prompts need not be
    conversations, that an answer outside of LaTeX counts, and that the mean is logged as `accuracy`.

    Args:
        completions (`list`):
            Texts, or conversations whose last message counts.
        solution (`list[str]`):
            Reference answers.
        log_metric (`Callable`, *optional*):
            Given by the trainer.
    """
    texts = [completion if isinstance(completion, str) else completion[-1]["content"] for completion in completions]
    rewards = [
        float(grade(answer, [text])[0]) if parse_reference(answer) else None
        for text, answer in zip(texts, solution, strict=True)
    ]
    known = [reward for reward in rewards if reward is not None]
    if log_metric is not None and known:
        log_metric("accuracy", sum(known) / len(known))
    return rewards


def _seconds(timeout: int) -> Any:
    """math-verify's timeouts are signals, which only the main thread gets; it warns when they are off."""
    return timeout if threading.current_thread() is threading.main_thread() else None
