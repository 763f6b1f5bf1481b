"""What `make study` measured: does OBLR-PO learn faster than GRPO, RLOO and OPO, and at which learning rates do they collapse?"""

from __future__ import annotations

from collections.abc import Iterator
from statistics import mean
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

RESULT = "learning.json"
TITLE = "Does it learn faster, and when does it collapse?"
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
CONTROLS = ("constant_average", "shuffled_multiplier")
MEASURES = {"area": "equal rollouts", "area_equal_time": "equal time"}
# `snr_min_multiplier` of all runs.
FLOOR = 0.05
# Okabe and Ito's, as in `oblr_trl.runs.figure`, and a grey; ours is drawn last and thickest.
_COLOURS = ("#0072B2", "#56B4E9", "#009E73", "#E69F00", "#D55E00", "#CC79A7", "#000000", "#888888")
_LINES = dict(zip(LABELS, _COLOURS, strict=False))

Part = dict[str, Any]


def markdown(record: dict[str, Any]) -> str:
    """What was compared, the verdicts, and a table each of curves, collapse and differences."""
    settings = record["settings"]
    paragraphs = [
        f"`make study`: {settings['num_steps']} steps of {settings['num_prompts']} prompts x {settings['num_generations']} "
        "completions. Each method runs at its own best learning rate, chosen by the area under the held-out accuracy curve from "
        f"one grid with {settings['tuning_seeds']} seeds; the tables are of {settings['evaluation_seeds']} other seeds. Area is the "
        f"mean held-out accuracy over the steps ({settings['test_size']} prompts, the same for all); equal time is the same over "
        "the processor seconds of training, until the fastest method has made its steps. Intervals are percentile bootstraps over "
        f"{settings['evaluation_seeds']} paired seeds; with so few they are too narrow rather than too wide.",
        " ".join(_verdicts(record)),
        _grid_table(record),
        *(_table(part, policy, optimizer) for policy, optimizer, part in _parts(record)),
        _collapse_table(record),
    ]
    return "\n\n".join(paragraphs)


def summary(record: dict[str, Any]) -> str:
    """The verdicts and the areas at the best rate."""
    settings = record["settings"]
    paragraphs = [
        f"`make study`: {settings['num_steps']} steps of {settings['num_prompts']} prompts x {settings['num_generations']} "
        f"completions, each method at its own best learning rate of one grid (chosen with {settings['tuning_seeds']} other "
        f"seed{'s' if settings['tuning_seeds'] > 1 else ''}), {settings['evaluation_seeds']} seeds. *Area* is the mean held-out "
        "accuracy over the steps. Final accuracies, equal time, collapse by rate and every difference with its interval: "
        "[docs/results.md](docs/results.md).",
        _best_table(record),
        " ".join(_verdicts(record)),
    ]
    return "\n\n".join(paragraphs)


def _best_table(record: dict[str, Any]) -> str:
    parts = list(_parts(record))
    lines = [
        "| area at the best rate | " + " | ".join(f"{policy}, {OPTIMIZERS[name]}" for policy, name, _ in parts) + " |",
        "|---" * (len(parts) + 1) + "|",
    ]
    for method, label in LABELS.items():
        cells = [part["evaluation"].get(method) for _, _, part in parts]
        if any(cells):
            row = ["" if cell is None else _spread(cell["area"]) for cell in cells]
            lines.append(f"| {label} | {' | '.join(row)} |")
    return "\n".join(lines)


def _grid_table(record: dict[str, Any]) -> str:
    """The mean of the area over the grid of base rates, which the SNR methods multiply by less than 1."""
    parts = list(_parts(record))
    lines = [
        "| area, mean over the grid of base rates | "
        + " | ".join(f"{policy}, {OPTIMIZERS[name]}" for policy, name, _ in parts)
        + " |",
        "|---" * (len(parts) + 1) + "|",
    ]
    for method, label in LABELS.items():
        rows = [part["tuning"].get(method) for _, _, part in parts]
        if any(rows):
            means = ["" if row is None else f"{mean(cell['area'] for cell in row.values()):.3f}" for row in rows]
            lines.append(f"| {label} | {' | '.join(means)} |")
    return "\n".join(lines)


def _parts(record: dict[str, Any]) -> Iterator[tuple[str, str, Part]]:
    for optimizer, policies in record["summary"].items():
        for policy, part in policies.items():
            yield policy, optimizer, part


def _verdicts(record: dict[str, Any]) -> Iterator[str]:
    for optimizer, policies in record["summary"].items():
        parts = list(policies.values())
        name = OPTIMIZERS[optimizer]
        for measure, kind in MEASURES.items():
            yield (
                f"{name}, {kind}: the interval of OBLR-PO minus the best of GRPO, Dr. GRPO and RLOO lies "
                f"{_count(parts, 'rival', measure)}."
            )
        halves = {measure: _tally([part["half_minus_rival"][measure] for part in parts]) for measure in MEASURES}
        yield (
            f"The same for its baseline alone, at a constant rate ({name}): "
            + "; ".join(f"{kind} {halves[measure]}" for measure, kind in MEASURES.items())
            + "."
        )
        for control in CONTROLS:
            yield f"Against the {LABELS[control]} (area, {name}): {_count(parts, control, 'area')}."
    for optimizer, policies in record["summary"].items():
        worse = [
            f"{policy} at {rate}" for policy, part in policies.items() for rate in _collapses_where_grpo_does_not(part)
        ]
        yield (
            f"With {OPTIMIZERS[optimizer]}, OBLR-PO collapses where one of GRPO and Dr. GRPO does not: "
            f"{', '.join(worse) or 'nowhere on the grid'}."
        )
    yield _effective_rates(record)
    yield _times(record)
    edges = [
        f"{LABELS[method]} on {policy} ({OPTIMIZERS[optimizer]})"
        for policy, optimizer, part in _parts(record)
        for method in part["at_edge"]
    ]
    if edges:
        yield f"Best rate at an edge of the grid, so perhaps not the best there is: {', '.join(edges)}."


def _effective_rates(record: dict[str, Any]) -> str:
    """At which rates OBLR-PO really trained while tuning: without this the comparison over the grid would mislead."""
    ranges = {}
    for policy, optimizer, _ in _parts(record):
        chosen = {"stage": "tuning", "method": "oblrpo", "policy": policy, "optimizer": optimizer}
        runs = [run for run in record["runs"] if all(run[name] == value for name, value in chosen.items())]
        multipliers = [run["mean_multiplier"] for run in runs]
        ranges[f"{policy} ({OPTIMIZERS[optimizer]})"] = (min(multipliers), max(multipliers))
    listed = ", ".join(f"{low:.3f} to {high:.3f} on {where}" for where, (low, high) in ranges.items())
    lowest, highest = min(low for low, _ in ranges.values()), max(high for _, high in ranges.values())
    return (
        f"OBLR-PO's mean multiplier over the grid was {listed}, with a floor of {FLOOR}: its effective rates lay {1 / highest:.0f} to "
        f"{1 / lowest:.0f} times below the grid, so neither the mean over the grid nor the collapses show that it is safer; that "
        "needs controls at equal effective rates."
    )


def _times(record: dict[str, Any]) -> str:
    seconds = [
        {method: part["evaluation"][method]["cpu_seconds"]["mean"] for method in ("oblrpo", "dr_grpo")}
        for _, _, part in _parts(record)
    ]
    ratios = [entry["oblrpo"] / entry["dr_grpo"] for entry in seconds]
    return f"A run of OBLR-PO took {min(ratios):.2f} to {max(ratios):.2f} times the processor seconds of Dr. GRPO's."


def _count(parts: list[Part], other: str, measure: str) -> str:
    return _tally([part["ours_minus"][other][measure] for part in parts])


def _tally(intervals: list[dict[str, float]]) -> str:
    above = sum(interval["low"] > 0 for interval in intervals)
    below = sum(interval["high"] < 0 for interval in intervals)
    return f"above zero on {above} of {len(intervals)} tasks, below on {below}"


def _collapses_where_grpo_does_not(part: Part) -> list[str]:
    cells = part["tuning"]
    standards = [cells[method] for method in ("grpo", "dr_grpo") if method in cells]
    return [
        rate
        for rate, cell in cells["oblrpo"].items()
        if any(cell["collapsed"] > standard[rate]["collapsed"] for standard in standards)
    ]


def _table(part: Part, policy: str, optimizer: str) -> str:
    lines = [
        f"**{policy}, {OPTIMIZERS[optimizer]}** (start {part['start_accuracy']:.3f}; equal time: "
        f"{part['equal_time_seconds']:.1f} s)",
        "",
        "| | rate | multiplier | area | OBLR-PO minus it | final | area, equal time | OBLR-PO minus it | seconds | collapsed |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for method, cell in part["evaluation"].items():
        minus = part["ours_minus"].get(method)
        area, timed = ("", "") if minus is None else (_interval(minus["area"]), _interval(minus["area_equal_time"]))
        lines.append(
            f"| {LABELS[method]} | {cell['learning_rate']:.2g} | {cell['mean_multiplier']:.2f} | {_spread(cell['area'])} | {area} | "
            f"{_spread(cell['final'])} | {_spread(cell['area_equal_time'])} | {timed} | {cell['cpu_seconds']['mean']:.1f} | "
            f"{cell['collapsed']} of {cell['num_seeds']} |"
        )
    return "\n".join(lines)


def _collapse_table(record: dict[str, Any]) -> str:
    lines = [
        "**Collapse while tuning**: runs that end below half of their start accuracy, from the lowest rate of the grid to the highest; "
        "in brackets the lowest final accuracy of all.",
    ]
    for policy, optimizer, part in _parts(record):
        rates = [str(rate) for rate in part["learning_rates"]]
        lines += [
            "",
            f"| {policy}, {OPTIMIZERS[optimizer]} | {' | '.join(rates)} |",
            "|---" * (len(rates) + 1) + "|",
        ]
        for method, cells in part["tuning"].items():
            row = [
                f"{cells[rate]['collapsed']} of {cells[rate]['num_seeds']} ({cells[rate]['lowest_final']:.2f})"
                for rate in rates
            ]
            lines.append(f"| {LABELS[method]} | {' | '.join(row)} |")
    return "\n".join(lines)


def _spread(value: dict[str, float | None]) -> str:
    return f"{value['mean']:.3f}" + ("" if value["std"] is None else f" ± {value['std']:.3f}")


def _interval(value: dict[str, float]) -> str:
    return f"{value['mean']:+.3f} [{value['low']:+.3f}, {value['high']:+.3f}]"


def figure(record: dict[str, Any]) -> Figure:
    """Area under the curve against the learning rate while tuning (above), and the curves at the best rates (below)."""
    from matplotlib.figure import Figure

    parts = list(_parts(record))
    canvas = Figure(figsize=(3.3 * len(parts) + 0.5, 6.6), layout="constrained")
    axes = canvas.subplots(2, len(parts), squeeze=False)
    for column, (policy, optimizer, part) in enumerate(parts):
        top, bottom = axes[0, column], axes[1, column]
        top.set_title(f"{policy}, {OPTIMIZERS[optimizer]}", fontsize=10)
        for method in reversed([name for name in _LINES if name in part["tuning"]]):
            _draw(top, method, part["learning_rates"], [cell["area"] for cell in part["tuning"][method].values()])
            cell = part["evaluation"][method]
            _draw(bottom, method, cell["steps"], cell["curve"])
        top.set_xscale("log")
        top.set_xlabel("learning rate", fontsize=9)
        bottom.set_xlabel("step", fontsize=9)
        for axis in (top, bottom):
            axis.axhline(part["start_accuracy"], color="#aaaaaa", linewidth=0.8, linestyle=":")
            axis.tick_params(labelsize=8)
            axis.spines[["top", "right"]].set_visible(False)
    axes[0, 0].set_ylabel("tuning: mean held-out accuracy", fontsize=9)
    axes[1, 0].set_ylabel("best rate: held-out accuracy", fontsize=9)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    canvas.legend(handles[::-1], labels[::-1], loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    return canvas


def _draw(axis: Axes, method: str, across: list[float], values: list[float]) -> None:
    ours = method == "oblrpo"
    axis.plot(
        across,
        values,
        color=_LINES[method],
        linewidth=2.4 if ours else 1.1,
        marker="o" if ours else ".",
        markersize=4,
        label=LABELS[method].replace("`", ""),
    )
