r"""Grading by math-verify, as TRL's `accuracy_reward` does it, but with the reference put between dollar signs first.

Without them math-verify reads the LaTeX `2\sqrt{3}` as 2. What counts as equal is math-verify's judgement: 0.5 and 1/2, 50\% and
0.5, but also 50\% and 50; units in `\text{}` are dropped; a set has no order, a tuple has.
"""

import threading
from collections.abc import Sequence
from typing import Any

from latex2sympy2_extended import NormalizationConfig
from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

from oblr_trl.data.answers import as_latex

ANSWER_FORMATS = ("any", "latex")
# Both put a `\boxed{}` before everything else. "latex" is what TRL's `accuracy_reward` reads.
_EXTRACTION: dict[str, dict[str, Any]] = {
    "any": {"extraction_config": [LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig()]},
    "latex": {
        "extraction_config": [
            LatexExtractionConfig(
                normalization_config=NormalizationConfig(units=True),
                boxed_match_priority=0,
                try_extract_without_anchor=False,
            )
        ],
        "extraction_mode": "first_match",
    },
}
# Seconds for one expression, as in `accuracy_reward`; math-verify warns of an answer that takes longer, and it counts as wrong.
PARSING_TIMEOUT = 10
VERIFY_TIMEOUT = 5


def parse_reference(answer: str) -> list[Any]:
    """
    Parse a reference answer.

    Returns:
        `list`: the expressions math-verify understands it as; empty if it understands none, and nothing could equal it.
    """
    parsed = parse(as_latex(answer), parsing_timeout=_seconds(PARSING_TIMEOUT))
    # Of what it does not understand math-verify keeps the text alone, which equals nothing but the same text.
    return parsed if any(not isinstance(expression, str) for expression in parsed) else []


def grade(reference: list[Any], completions: Sequence[str], *, answer_format: str = "any") -> list[bool]:
    r"""
    Whether each completion gives the reference answer.

    Args:
        reference (`list`):
            From [`parse_reference`], not empty.
        completions (`Sequence[str]`):
            Texts of a model.
        answer_format (`str`, *optional*, defaults to `"any"`):
            `"latex"`: the answer has to stand in `\boxed{}` or after words such as "the final answer is" as LaTeX, as for
            TRL's `accuracy_reward`; `"any"`: where there is no `\boxed{}`, the last number or expression counts too. Several
            boxes beside one another are one answer of several parts.
    """
    assert reference
    parsing_timeout, verify_timeout = _seconds(PARSING_TIMEOUT), _seconds(VERIFY_TIMEOUT)
    found = [parse(text, parsing_timeout=parsing_timeout, **_EXTRACTION[answer_format]) for text in completions]
    return [bool(verify(reference, answer, timeout_seconds=verify_timeout)) for answer in found]


def _seconds(timeout: int) -> Any:
    """math-verify's timeouts are signals, which only the main thread gets; it warns when they are off."""
    return timeout if threading.current_thread() is threading.main_thread() else None
