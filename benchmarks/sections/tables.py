"""Markdown tables and their cells."""

from collections.abc import Mapping, Sequence


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table with one line per row."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def plus_minus(value: Mapping[str, float | None], form: str) -> str:
    """Mean ± standard deviation, of which one seed has none."""
    return " ± ".join(format(number, form) for number in (value["mean"], value["std"]) if number is not None)
