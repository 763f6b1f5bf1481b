"""Reference answers in the form that `math_verify.parse` reads as one: extracted, joined, between dollar signs."""

import re
from typing import Any


def check_answer_pattern(pattern: str | None, *, field_name: str) -> None:
    """Refuse what is no regular expression whose one group is the answer, e.g. `"#### (.+)"` for GSM8K."""
    if pattern is None:
        return
    try:
        num_groups = re.compile(pattern).groups
    except re.error as error:
        raise ValueError(f"`{field_name}` is {pattern!r}, which is not a regular expression: {error}.") from error
    if num_groups != 1:
        raise ValueError(
            f"`{field_name}` is {pattern!r}, which has {num_groups} groups: put the answer, and nothing else, into "
            "parentheses, as in '#### (.+)'."
        )


def extract_answer(value: Any, pattern: str | None) -> str | None:
    """
    The reference answer in a cell of an answer column, or `None` where there is none.

    Of several matches of `pattern` the last one counts. A number is written out, without `.0` where it is whole. The entries of a
    list (OlympiadBench's `final_answer`) are the parts of one answer: they are joined by commas, which math-verify reads as a set.
    """
    if isinstance(value, (list, tuple)):
        parts = [part for part in (extract_answer(part, None) for part in value) if part is not None]
        if len(parts) < max(len(value), 1):
            return None
        text = parts[0] if len(parts) == 1 else ", ".join(map(_without_dollars, parts))
    elif isinstance(value, bool) or not isinstance(value, (str, int, float)):
        return None
    else:
        text = str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)
    if pattern is not None:
        matches = re.findall(pattern, text)
        text = matches[-1] if matches else ""
    return text.strip() or None


def as_latex(answer: str) -> str:
    r"""
    Put an answer between dollar signs, unless it has some or a `\boxed{}`.

    Without them math-verify takes the number that comes last for the answer: `2\sqrt{3}` is read as 2, and `y = 2x + 3` as 3.
    """
    return answer if re.search(r"(?<!\\)\$|\\boxed|\\\(|\\\[", answer) else f"${answer}$"


def _without_dollars(part: str) -> str:
    """`$x$` as `x`; anything else, for example `$1$ or $2$`, as it is."""
    match = re.fullmatch(r"\$([^$]+)\$", part)
    return match[1].strip() if match else part
