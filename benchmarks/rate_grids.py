"""Learning rates on grids with a factor of 2 that are extended until the best one has neighbours."""

from collections.abc import Callable, Hashable
from typing import TypeVar

Case = TypeVar("Case", bound=Hashable)
_MAX_ROUNDS = 6


def around(rate: float) -> list[float]:
    """The rate between half and twice as much."""
    return [0.5 * rate, rate, 2 * rate]


def best(gains: dict[float, float]) -> float:
    """Rate of the largest gain."""
    return max(gains, key=gains.__getitem__)


def extended(
    rates: dict[Case, list[float]], measure: Callable[[dict[Case, list[float]]], dict[Case, dict[float, float]]]
) -> dict[Case, dict[float, float]]:
    """Gain by rate of every case: what `measure` says of the rates, with further ones where the best is at the edge of its grid."""
    for _ in range(_MAX_ROUNDS):
        gains = measure(rates)
        wider = {case: list(grid) for case, grid in rates.items()}
        for case, by_rate in gains.items():
            for edge, factor in ((min(by_rate), 0.5), (max(by_rate), 2.0)):
                if best(by_rate) == edge:
                    wider[case] = sorted([*wider[case], edge * factor])
        if wider == rates:
            break
        rates = wider
    return gains
