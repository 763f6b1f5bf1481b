"""Tables of `benchmarks.fidelity`: weights, baselines and rho of every scope and sketch size against exact ones."""

from statistics import median
from typing import Any

from benchmarks.sections.tables import markdown_table, plus_minus

RESULT = "fidelity.json"
TITLE = "Fidelity of scopes and sketches"


def markdown(record: dict[str, Any]) -> str:
    """A table of scopes by case at the trainer's sketch size, and one of sketch sizes."""
    settings = record["settings"]
    return "\n\n".join(
        [
            f"{settings['num_seeds']} batches of {settings['num_prompts']} prompts x {settings['num_generations']} "
            f"completions, prior {settings['prior_strength']:g}, sketches of {_shown_size(record)} numbers.",
            _scopes_table(record),
            f"Sketch sizes of the scope `all`, median over {len(record['cases'])} cases (worst).",
            _sizes_table(record),
        ]
    )


def _shown_size(record: dict[str, Any]) -> str:
    """The trainer's default where it was measured, else the longest sketch."""
    sizes = [str(size) for size in record["settings"]["sketch_dims"]]
    return "4096" if "4096" in sizes else sizes[-1]


def _scopes_table(record: dict[str, Any]) -> str:
    rows = []
    for label, case in record["cases"].items():
        for index, (scope, by_size) in enumerate(case["scopes"].items()):
            excess, rho = by_size[_shown_size(record)]["objective"], by_size[_shown_size(record)]["rho"]
            rows.append(
                [
                    "" if index else label,
                    "" if index else f"{case['rloo_objective']['mean'] - 1:+.0%}",
                    f"`{scope}`",
                    plus_minus({"mean": excess["mean"] - 1, "std": excess["std"]}, ".1%"),
                    f"{rho['exact']:.2f} {rho['difference']:+.2f} ({rho['min']:+.2f} to {rho['max']:+.2f})",
                ]
            )
    return markdown_table(["case", "RLOO's excess", "scope", "excess", "rho"], rows)


def _sizes_table(record: dict[str, Any]) -> str:
    rows = []
    for size in map(str, record["settings"]["sketch_dims"]):
        cells = [case["scopes"]["all"][size] for case in record["cases"].values()]
        figures = (
            ([cell["norm_error"]["mean"] for cell in cells], ".1%"),
            ([cell["objective"]["mean"] - 1 for cell in cells], "+.2%"),
            ([abs(cell["rho"]["difference"]) for cell in cells], ".3f"),
        )
        rows.append([size, *(f"{median(values):{form}} ({max(values):{form}})" for values, form in figures)])
    return markdown_table(["numbers in a sketch", "error of ‖z‖²", "excess", "difference of rho"], rows)
