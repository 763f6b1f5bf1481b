"""What `make bench-precision` measured: score norms and rho in half precision relative to float64's."""

from typing import Any

RESULT = "precision.json"
TITLE = "Scores in half precision"


def markdown(record: dict[str, Any]) -> str:
    """One row per precision, scope and quantity, one column per mean 1 - p."""
    header = [f"1 - p = {value:.1e}" for value in record["other_probs"]]
    lines = ["| precision | scope | quantity | " + " | ".join(header) + " |", "|---" * (3 + len(header)) + "|"]
    for row in record["rows"]:
        ratios = " | ".join(f"{ratio:.3f}" for ratio in row["ratios"])
        lines.append(f"| {row['precision']} | `{row['scope']}` | {row['quantity']} | {ratios} |")
    return "\n".join([summary(record), "", *lines])


def summary(record: dict[str, Any]) -> str:
    """The largest deviations of squared norms and of rho."""

    def worst(is_rho: bool) -> float:
        return max(abs(r - 1) for row in record["rows"] if (row["quantity"] == "rho") == is_rho for r in row["ratios"])

    return (
        f"`make bench-precision`: a tiny Qwen3 of ever lower entropy, mean 1 - p from {record['other_probs'][0]:.0e} to "
        f"{record['other_probs'][-1]:.1e}, seed {record['settings']['seed']}, relative to a float64 model with the same weights. Over "
        "bf16 autocast, bf16 and fp16 models, with and without a float32 head, all scopes, sketches and exact norms, the median "
        f"squared norm is off by {worst(False):.1%} at most and rho by {worst(True):.1%}."
    )
