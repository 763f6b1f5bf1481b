"""Table and figure of `benchmarks.trust_region`."""

from statistics import mean
from typing import Any

from matplotlib.figure import Figure

from benchmarks.sections.tables import markdown_table, plus_minus

LABELS = {
    "constant": "best constant rate",
    "linear": "linear decay, best rate",
    "snr": "SNR multiplier, best rate",
    "minimum": "KL = 0.000625 H, the minimum",
    "fixed_kl_1e-3": "KL = 0.001 H",
    "fixed_kl_3e-3": "KL = 0.003 H",
    "fixed_kl_1e-2": "KL = 0.01 H",
    "falling_kl_3e-3": "KL = 0.003 H, with linear decay of the rate",
    "falling_kl_1e-2": "KL = 0.01 H, with linear decay of the rate",
    "grpo": "GRPO, constant rate",
    "trust_region": "trust region",
}
# Okabe and Ito's, as in the package's figure of runs.
_COLOURS = {
    "constant": "#000000",
    "linear": "#009E73",
    "snr": "#CC79A7",
    "minimum": "#56B4E9",
    "grpo": "#D55E00",
    "trust_region": "#0072B2",
}


def markdown(record: dict[str, Any]) -> str:
    """A row per setting: gain of the best constant rate, and of the others as a share of it."""
    settings, summary = record["settings"], record["summary"]
    methods = [name for name in LABELS if name != "constant" and name in next(iter(summary.values()))["methods"]]
    header = ["", "start", "best constant rate", "gain"]
    header += [f"{LABELS[method]}: share of the gain" for method in methods] + ["rate that the trust region found"]
    rows = []
    for setting, part in summary.items():
        constant, ours = part["methods"]["constant"], part["methods"]["trust_region"]
        shares = [_interval(part["methods"][method]["share"]) for method in methods]
        rates = [float(rate) for rate in part["tuning"]]
        edge = " (edge)" * (constant["learning_rate"] in (min(rates), max(rates)))
        row = [setting, f"{part['start']:.3f}", f"{constant['learning_rate']:.2g}{edge}"]
        rows.append([*row, plus_minus(constant["gain"], ".3f"), *shares, f"{ours['found_rate']:.2g}"])
    averages = [mean(part["methods"][method]["share"]["mean"] for part in summary.values()) for method in methods]
    rows.append(["**mean**", "", "", "", *(f"{value:.2f}" for value in averages), ""])
    first, last = record.get("choosing_seeds", 0), settings["evaluation_seeds"]
    if 0 < first < last:
        later = [mean(_share_from(first, part["methods"], method) for part in summary.values()) for method in methods]
        seeds = f"seeds {first} to {last - 1}" if first < last - 1 else f"seed {first}"
        label = f"mean of {seeds}, which had no part in the choice of the rule"
        rows.append([label, "", "", "", *(f"{value:.2f}" for value in later), ""])
    text = (
        f"{settings['num_steps']} steps where the setting says nothing; {settings['tuning_seeds']} seed(s) for each rate, "
        f"{settings['evaluation_seeds']} other seeds for the table; {settings['test_size']} held-out prompts. Share: gain as a "
        "part of that of the best constant rate, with its bootstrap 95 % interval. Graded rewards are measured by their mean over sampled "
        "completions, everything else by accuracy."
    )
    tables = [markdown_table(header, rows)]
    if "batch_sizes" in record:
        tables.append(_batch_sizes(record["batch_sizes"]))
    return "\n\n".join([text, *tables])


def _share_from(seed: int, cells: dict[str, Any], method: str) -> float:
    """Share of a method's gain from a seed on."""
    return mean(cells[method]["gains"][seed:]) / mean(cells["constant"]["gains"][seed:])


def _batch_sizes(part: dict[str, Any]) -> str:
    """Gains with one value for all batch sizes."""
    header = ["one value for all", *part["settings"], "mean gain", "trust region minus it"]
    rows = []
    for row in part["rows"]:
        ours, rate = row["method"] == "trust_region", f"constant rate {row['learning_rate']:.2g}"
        label = rate if row["method"] == "constant" else LABELS[row["method"]]
        minus = row["ours_minus"]
        difference = "" if ours else f"{minus['mean']:+.3f} [{minus['low']:+.3f}, {minus['high']:+.3f}]"
        rows.append([label, *(plus_minus(gain, ".3f") for gain in row["gains"]), f"{row['mean']:.3f}", difference])
    return markdown_table(header, rows)


def _interval(value: dict[str, float]) -> str:
    return f"{value['mean']:.2f} [{value['low']:.2f}, {value['high']:.2f}]"


def figure(record: dict[str, Any]) -> Figure:
    """Held-out accuracy over the run, mean over seeds: at a rate that is far too large, then in every setting."""
    summary, collapse = record["summary"], record["collapse"]
    columns = min(len(summary) + 1, 4)
    num_rows = -(-(len(summary) + 1) // columns)
    canvas = Figure(figsize=(3.1 * columns, 2.5 * num_rows + 0.5), layout="constrained")
    first, *axes = canvas.subplots(num_rows, columns, squeeze=False).flatten()
    title = f"{collapse['setting']}, learning_rate = {collapse['learning_rate']:g}"
    _draw(first, title, collapse["curves"])
    for axis, (setting, part) in zip(axes, summary.items(), strict=False):
        _draw(axis, setting, {method: cell["curve"] for method, cell in part["methods"].items()})
    for axis in axes[len(summary) :]:
        axis.set_visible(False)
    found = {
        label: line for axis in (first, axes[0]) for line, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    canvas.legend(found.values(), found, loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    return canvas


def _draw(axis: Any, title: str, curves: dict[str, list[float]]) -> None:
    for method, curve in curves.items():
        width = 2.2 if method == "trust_region" else 1.1
        steps = [i * 10 for i in range(len(curve))]
        axis.plot(steps, curve, label=LABELS[method], color=_COLOURS[method], linewidth=width)
    axis.set_title(title, fontsize=9)
    axis.set_xlabel("step", fontsize=8)
    axis.set_ylabel("held-out accuracy", fontsize=8)
    axis.tick_params(labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)
