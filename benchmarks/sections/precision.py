"""Table of `benchmarks.precision`: score norms and rho in half precision relative to float64's."""

from typing import Any

from benchmarks.sections.tables import markdown_table

RESULT = "precision.json"
TITLE = "Scores in half precision"
_QUANTITIES = {"sketch": "‖z‖² of sketches", "exact": "exact norms", "rho": "rho"}


def markdown(record: dict[str, Any]) -> str:
    """The largest deviation over the policies, one row per precision and scope, and that of all."""
    deviations: dict[tuple[str, str], dict[str, float]] = {}
    for row in record["rows"]:
        by_quantity = deviations.setdefault((row["precision"], row["scope"]), {})
        by_quantity[row["quantity"]] = max(abs(ratio - 1) for ratio in row["ratios"])
    deviations["all", "largest"] = {name: max(row[name] for row in deviations.values()) for name in _QUANTITIES}
    rows = [
        [precision, scope, *(f"{by_quantity[name]:.1%}" for name in _QUANTITIES)]
        for (precision, scope), by_quantity in deviations.items()
    ]
    probabilities = ", ".join(f"{value:.1e}" for value in record["other_probs"])
    return (
        f"Largest deviation from float64 over policies with a mean 1 - p of {probabilities}; "
        f"seed {record['settings']['seed']}.\n\n" + markdown_table(["precision", "scope", *_QUANTITIES.values()], rows)
    )
