"""Tables and figure of `benchmarks.learning`: accuracy against rollouts and time at each method's best rate, and
collapse by rate."""

from collections.abc import Iterator
from typing import Any

from matplotlib.figure import Figure

from benchmarks.sections.tables import markdown_table, plus_minus

LABELS = {
    "oblrpo": "OBLR-PO",
    "baseline_only": "its baseline alone",
    "snr_only": "SNR only (with RLOO)",
    "grpo": "GRPO (TRL's defaults)",
    "dr_grpo": "Dr. GRPO",
    "rloo": "RLOO",
    "opo": "OPO",
    "constant_average": "control: constant average rate",
    "shuffled_multiplier": "control: shuffled multipliers",
}
OPTIMIZERS = {"adamw": "AdamW", "sgd": "SGD"}
# Okabe and Ito's, as in the package's figure of runs.
_COLOURS = ("#0072B2", "#56B4E9", "#009E73", "#E69F00", "#D55E00", "#CC79A7", "#000000")

Part = dict[str, Any]


def markdown(record: dict[str, Any]) -> str:
    """A table per policy and optimizer, and the accuracies while tuning."""
    settings, parts = record["settings"], list(_parts(record))
    return "\n\n".join(
        [
            f"{settings['num_steps']} steps of {settings['num_prompts']} prompts x {settings['num_generations']} "
            f"completions; {settings['tuning_seeds']} seed(s) for each rate of the grid, "
            f"{settings['evaluation_seeds']} other seeds at the best rate; {settings['test_size']} held-out prompts.",
            *(_part_table(part, policy, optimizer) for policy, optimizer, part in parts),
            "Accuracy at the end of the tuning runs by base rate, the lowest over seeds; bold where a run collapsed, "
            "which is below half of its start accuracy; and OBLR-PO's mean multiplier.",
            *(_tuning_table(part, policy, optimizer) for policy, optimizer, part in parts),
        ]
    )


def _parts(record: dict[str, Any]) -> Iterator[tuple[str, str, Part]]:
    for optimizer, policies in record["summary"].items():
        for policy, part in policies.items():
            yield policy, OPTIMIZERS[optimizer], part


def _part_table(part: Part, policy: str, optimizer: str) -> str:
    header = ["", "rate", "multiplier", "area", "OBLR-PO minus it", "final"]
    header += ["area, equal time", "OBLR-PO minus it", "seconds", "collapsed"]
    rates, rows = part["learning_rates"], []
    for method, cell in part["evaluation"].items():
        minus = part["ours_minus"].get(method)
        rows.append(
            [
                LABELS[method],
                f"{cell['learning_rate']:.2g}" + " (edge)" * (cell["learning_rate"] in (rates[0], rates[-1])),
                f"{cell['mean_multiplier']:.2f}",
                plus_minus(cell["area"], ".3f"),
                "" if minus is None else _interval(minus["area"]),
                plus_minus(cell["final"], ".3f"),
                plus_minus(cell["area_equal_time"], ".3f"),
                "" if minus is None else _interval(minus["area_equal_time"]),
                f"{cell['cpu_seconds']:.1f}",
                str(cell["collapsed"]),
            ]
        )
    start, seconds = part["start_accuracy"], part["equal_time_seconds"]
    title = f"**{policy}, {optimizer}** (start {start:.3f}; equal time: {seconds:.1f} s)"
    return f"{title}\n\n{markdown_table(header, rows)}"


def _tuning_table(part: Part, policy: str, optimizer: str) -> str:
    rows = []
    for method, cells in part["tuning"].items():
        finals = [(f"{cell['lowest_final']:.2f}", cell["collapsed"]) for cell in cells.values()]
        rows.append([LABELS[method], *(f"**{final}**" if collapsed else final for final, collapsed in finals)])
    multipliers = [f"{cell['mean_multiplier']:.3f}" for cell in part["tuning"]["oblrpo"].values()]
    rows.append(["multiplier of OBLR-PO", *multipliers])
    return markdown_table([f"{policy}, {optimizer}", *map(str, part["learning_rates"])], rows)


def _interval(value: dict[str, float]) -> str:
    return f"{value['mean']:+.3f} [{value['low']:+.3f}, {value['high']:+.3f}]"


def figure(record: dict[str, Any]) -> Figure:
    """Held-out accuracy over the steps at every method's best rate, mean over seeds; ours is thickest."""
    parts = list(_parts(record))
    steps = range(0, record["settings"]["num_steps"] + 1, record["settings"]["eval_steps"])
    canvas = Figure(figsize=(3.3 * len(parts) + 0.5, 3.6), layout="constrained")
    axes = canvas.subplots(1, len(parts), squeeze=False)[0]
    for axis, (policy, optimizer, part) in zip(axes, parts, strict=True):
        for method, colour in reversed(list(zip(LABELS, _COLOURS, strict=False))):
            if method in part["evaluation"]:
                thick = {"linewidth": 2.4, "marker": "o"} if method == "oblrpo" else {"linewidth": 1.1, "marker": "."}
                curve = part["evaluation"][method]["curve"]
                axis.plot(steps, curve, color=colour, markersize=4, label=LABELS[method], **thick)
        axis.axhline(part["start_accuracy"], color="#aaaaaa", linewidth=0.8, linestyle=":")
        axis.set_title(f"{policy}, {optimizer}", fontsize=10)
        axis.set_xlabel("step", fontsize=9)
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("held-out accuracy", fontsize=9)
    handles, labels = axes[0].get_legend_handles_labels()
    canvas.legend(handles[::-1], labels[::-1], loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    return canvas
