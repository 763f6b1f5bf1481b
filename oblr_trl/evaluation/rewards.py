r"""Grades by math-verify as TRL's `accuracy_reward` gives them, but with the reference put between dollar signs first.

Without them math-verify reads the LaTeX `2\sqrt{3}` as 2. What counts as equal is math-verify's judgement: 0.5 and
1/2, 50\% and 0.5, but also 50\% and 50; units in `\text{}` are dropped; a set has no order, a tuple has. The same
grades are a reward, so that training and evaluation agree on what is right; in a recipe:
`reward_funcs: oblr_trl.evaluation.rewards.math_accuracy`.
"""

import functools
import threading
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

from latex2sympy2_extended import NormalizationConfig
from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

from oblr_trl.data.answers import as_latex

# Both prefer a `\boxed{}` to everything else. "latex" is what TRL's `accuracy_reward` reads.
_LATEX = LatexExtractionConfig(
    normalization_config=NormalizationConfig(units=True), boxed_match_priority=0, try_extract_without_anchor=False
)
_EXTRACTION: dict[str, dict[str, Any]] = {
    "any": {"extraction_config": [LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig()]},
    "latex": {"extraction_config": [_LATEX], "extraction_mode": "first_match"},
}
ANSWER_FORMATS = tuple(_EXTRACTION)
# Seconds for one expression, as in `accuracy_reward`; an answer that takes longer counts as wrong, with a warning.
PARSING_TIMEOUT = 10
VERIFY_TIMEOUT = 5


@functools.lru_cache(maxsize=4096)  # the completions of a problem share its parsed answer
def parse_reference(answer: str) -> list[Any]:
    """The expressions that math-verify reads in a reference answer; without any, nothing could equal it."""
    parsed = parse(as_latex(answer), parsing_timeout=_seconds(PARSING_TIMEOUT))
    # Where math-verify understands nothing it keeps the text, which equals nothing but the same text.
    return parsed if any(not isinstance(expression, str) for expression in parsed) else []


def grade(answer: str, completions: Sequence[str], *, answer_format: str = "any") -> list[bool]:
    r"""
    Whether each completion gives the reference answer.

    Args:
        answer (`str`):
            Reference answer, which [`parse_reference`] understands.
        completions (`Sequence[str]`):
            Texts of a model.
        answer_format (`str`, *optional*, defaults to `"any"`):
            `"latex"`: the answer has to be in `\boxed{}`, or LaTeX after words such as "the final answer is", as for
            TRL's `accuracy_reward`; `"any"`: where there is no `\boxed{}`, the last number or expression counts too.
            Adjacent boxes are one answer of several parts.
    """
    reference = parse_reference(answer)
    assert reference
    parsing_timeout, verify_timeout = _seconds(PARSING_TIMEOUT), _seconds(VERIFY_TIMEOUT)
    found = [parse(text, parsing_timeout=parsing_timeout, **_EXTRACTION[answer_format]) for text in completions]
    return [bool(verify(reference, expressions, timeout_seconds=verify_timeout)) for expressions in found]


def math_accuracy(
    completions: list[Any],
    solution: list[str],
    benchmark: list[str] | None = None,
    log_metric: Callable[[str, float], None] | None = None,
    **kwargs: Any,
) -> list[float | None]:
    r"""
    1 for a right answer, 0 for a wrong one, `None` (not rewarded at all) where math-verify cannot parse the solution.

    Differs from TRL's `accuracy_reward` in that a solution in LaTeX needs no dollar signs, that prompts need not be
    conversations, that an answer outside of LaTeX counts, and that the mean is logged: as `accuracy`, and where the
    data have a column `benchmark` as `accuracy/<benchmark>`.

    Args:
        completions (`list`):
            Texts, or conversations whose last message counts.
        solution (`list[str]`):
            Reference answers.
        benchmark (`list[str]`, *optional*):
            Names of the benchmarks that the prompts are from, as in [`~evaluation.training.benchmark_datasets`].
        log_metric (`Callable`, *optional*):
            Given by the trainer.
    """
    rewards: list[float | None] = []
    by_metric: dict[str, list[float]] = defaultdict(list)
    metrics = [f"accuracy/{name}" for name in benchmark] if benchmark else ["accuracy"] * len(completions)
    for completion, answer, metric in zip(completions, solution, metrics, strict=True):
        text = completion if isinstance(completion, str) else completion[-1]["content"]
        reward = float(grade(answer, [text])[0]) if parse_reference(answer) else None
        rewards.append(reward)
        if reward is not None:
            by_metric[metric].append(reward)
    if log_metric is not None:
        for metric, found in by_metric.items():
            log_metric(metric, sum(found) / len(found))
    return rewards


def _seconds(timeout: int) -> Any:
    """math-verify's timeouts are signals, which only the main thread gets; it warns when they are off."""
    return timeout if threading.current_thread() is threading.main_thread() else None
