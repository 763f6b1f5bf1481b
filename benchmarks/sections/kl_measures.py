"""Table of `benchmarks.kl_measures`."""

from typing import Any

from benchmarks.sections.tables import markdown_table

_COLUMNS = {
    "float32": "exact KL, float32",
    "sketches": "from sketches",
    "float32, few": "float32, 8 completions",
    "bfloat16": "bfloat16",
    "own batch": "exact, own batch",
}


def markdown(record: dict[str, Any]) -> str:
    """A row per setting: mean KL of a step by each measure, spread around the exact one, and cost."""
    header = [
        "",
        *_COLUMNS.values(),
        "spread: sketches",
        "spread: 8 completions",
        "cost: sketches",
        "cost: 8 completions",
        "rate found",
    ]
    rows = []
    for setting, result in record["results"].items():
        spreads = [f"{result[f'{name}: spread']:.2f}" for name in ("sketches", "float32, few")]
        shares = [result[f"share of step, {name}"] for name in ("sketches", "few")]
        costs = ["" if share is None else f"{share:.3f}" for share in shares]
        rows.append(
            [setting, *(f"{result[name]:.2g}" for name in _COLUMNS), *spreads, *costs, f"{result['found rate']:.2g}"]
        )
    text = (
        "Mean over the steps, in nats per completion. Spread: standard deviation of the error of one step, as a part of the mean "
        "exact KL. Cost: as a part of a training step."
    )
    blocks = [text, markdown_table(header, rows)]
    if zero := record.get("zero"):
        ratios = [half / full for full, half in zip(*zero.values(), strict=True)]
        blocks += [
            "The rate found with 9 M parameters under DeepSpeed (ZeRO-2), which steps a float32 copy of the weights, by seed:",
            markdown_table(
                ["weights", *(f"seed {seed}" for seed in range(len(ratios)))],
                [[name, *(f"{rate:.3g}" for rate in rates)] for name, rates in zero.items()]
                + [["ratio", *(f"{ratio:.2f}" for ratio in ratios)]],
            ),
        ]
    return "\n\n".join(blocks)
