"""Ratios of interleaved steps with their spread, and how a cost grows: the slope of a line through logarithms."""

import math
from statistics import median, quantiles
from typing import Any

CONTROL = "grpo"


def spread(values: list[float]) -> dict[str, float]:
    """Median and quartiles."""
    lower, _, upper = quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return {"median": median(values), "lower": lower, "upper": upper}


def ratios(seconds: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """Every trainer's step over the control's step of the same round."""
    return {
        name: spread([a / b for a, b in zip(steps, seconds[CONTROL], strict=True)])
        for name, steps in seconds.items()
        if name != CONTROL
    }


def log_log_slope(values: list[float], costs: list[float]) -> dict[str, float | None]:
    r"""
    Least-squares fit of \\( \log c = a + s \log x \\).

    Returns:
        `dict`: `"slope"` s (1: the cost doubles with the size) and `"standard_error"` of the fit, which takes the residuals
        about the line for independent; `None` where two sizes leave no residual.

    Raises:
        `ValueError`: For fewer than two different sizes, or for sizes or costs that are not positive.
    """
    if len(set(values)) < 2 or len(values) != len(costs):
        raise ValueError(
            f"A slope needs at least two different sizes and one cost for each, got {values} and {costs}."
        )
    if min(*values, *costs) <= 0:
        raise ValueError(f"A slope of logarithms needs positive sizes and costs, got {values} and {costs}.")
    x, y = ([math.log(number) for number in numbers] for numbers in (values, costs))
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    square = sum((a - mean_x) ** 2 for a in x)
    slope = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / square
    if len(x) < 3:
        return {"slope": slope, "standard_error": None}
    residual = sum((b - mean_y - slope * (a - mean_x)) ** 2 for a, b in zip(x, y, strict=True))
    return {"slope": slope, "standard_error": math.sqrt(residual / (len(x) - 2) / square)}


def summarise(measured: dict[str, dict[str, list[float]]]) -> dict[str, Any]:
    """What the record holds of one interleaved measurement: the raw seconds, and ratios derived from them."""
    control = measured["seconds"][CONTROL]
    relative = {
        name: spread([a / b for a, b in zip(seconds, control, strict=True)])
        for name, seconds in measured["pass_seconds"].items()
    }
    return {**measured, "ratios": ratios(measured["seconds"]), "pass_over_control": relative}


def slopes(sizes: list[float], cases: list[dict[str, Any]], method: str) -> dict[str, dict[str, float | None]]:
    """Growth of the control's step, of the method's step and pass, and of the two ratios, by medians over rounds."""
    costs = {
        "control_step": [median(case["seconds"][CONTROL]) for case in cases],
        "step": [median(case["seconds"][method]) for case in cases],
        "pass": [median(case["pass_seconds"][method]) for case in cases],
        "ratio": [case["ratios"][method]["median"] for case in cases],
        "pass_over_control": [case["pass_over_control"][method]["median"] for case in cases],
    }
    return {name: log_log_slope(sizes, values) for name, values in costs.items()}
