"""The figure of a comparison of runs, drawn without pyplot, so that the caller's backend and style stay as they are."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from oblr_trl import metrics
from oblr_trl.runs.logs import RunLog, RunLogError
from oblr_trl.runs.summary import seed_curve

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.typing import LineStyleType, RcKeyType

Methods = Mapping[str, Sequence[RunLog]]

# Okabe and Ito's palette, distinguishable under every common colour blindness; its yellow is too pale for a thin line.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
GREY = "#5f5f5f"
STYLE: dict[RcKeyType, Any] = {
    "font.size": 9.5,
    "axes.titlesize": 11.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#9a9a9a",
    "axes.labelcolor": "#333333",
    "xtick.color": "#333333",
    "ytick.color": "#333333",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.7,
    "legend.frameon": False,
}
LINE_STYLES: tuple[LineStyleType, ...] = ("-", "--", ":")
# The legend of the methods has one row if it is no longer than the figure is wide; the label of a panel breaks.
LEGEND_CHARACTERS, PANEL_CHARACTERS = 130, 48
# The moving average spans one logged value in this many of the shortest run, and stays light for long ones.
SMOOTHING_FRACTION, MAX_SMOOTHING = 12, 25
# Title, y-axis, and the name of each metric in the legend of the panel.
PANELS: tuple[tuple[str, str, dict[str, str]], ...] = (
    ("Training reward", "mean reward per completion", {metrics.REWARD: ""}),
    ("Learning-rate multiplier", "learning rate / base schedule", {metrics.LR_MULTIPLIER: ""}),
    (r"$\rho$ = N SNR / (1 + N SNR)", r"$\rho$ (1: all signal, 0: all noise)", {metrics.RHO: ""}),
    (
        "Signal and noise of the gradient",
        "squared norm (bottom: 0 or below)",
        {metrics.SIGNAL: "signal", metrics.NOISE: "noise"},
    ),
    (
        "Variance relative to other baselines",
        "variance ratio (below 1: a gain)",
        {
            metrics.VARIANCE_VS_LEAVE_ONE_OUT: "leave-one-out",
            metrics.VARIANCE_VS_GROUP_MEAN: "group mean",
            metrics.VARIANCE_VS_LENGTH_WEIGHTED: "length-weighted",
        },
    ),
)
HELD_OUT = {
    metrics.EVAL_ACCURACY: ("Held-out accuracy", "fraction correct", {metrics.EVAL_ACCURACY: ""}),
    metrics.EVAL_REWARD: ("Held-out reward", "mean reward per completion", {metrics.EVAL_REWARD: ""}),
}


def write_comparison(methods: Methods, evaluation_metric: str | None, path: Path) -> None:
    """
    Draw the runs of each method, as mean and band over its seeds, and write the figure as PNG.

    Raises:
        `RunLogError`: matplotlib is not installed, or there are more methods than distinguishable colours.
    """
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError as error:
        raise RunLogError(
            f"{path}: not written, the figure needs matplotlib ({error}); run `pip install 'oblr_trl[demo]'`"
        ) from error
    if len(methods) > len(COLOURS):
        raise RunLogError(
            f"{path}: not written, {len(methods)} methods are too many to tell apart; name at most {len(COLOURS)}"
        )
    with rc_context(STYLE):
        figure = Figure(figsize=(12.0, 7.8), dpi=150)
        figure.set_layout_engine("constrained", w_pad=0.08, h_pad=0.08)
        _draw(figure, methods, evaluation_metric)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, format="png")


def smoothing_window(methods: Methods) -> int:
    """Width of the moving average in logged values, odd and the same for all methods."""
    shortest = min(len(run.series(metrics.REWARD)) for runs in methods.values() for run in runs)
    return min(shortest // SMOOTHING_FRACTION, MAX_SMOOTHING) | 1


def _draw(figure: Figure, methods: Methods, evaluation_metric: str | None) -> None:
    """Six panels, the legend of the methods above them, and below them what the lines are."""
    from matplotlib.lines import Line2D

    window = smoothing_window(methods)
    held_out = HELD_OUT[evaluation_metric or metrics.EVAL_ACCURACY]
    panels = list(figure.subplots(2, 3).flat)
    for axes, (title, label, lines) in zip(panels, (PANELS[0], held_out, *PANELS[1:]), strict=True):
        axes.set_ylabel(label)
        draw_panel(axes, methods, lines, title=title, window=window)
    _, _, multiplier, rho, moments, variance = panels
    multiplier.set_ylim(bottom=0.0)
    rho.set_ylim(bottom=0.0)
    if moments.lines:
        moments.set_yscale("log", nonpositive="clip")  # the distance between the two lines is their ratio
    if variance.lines:
        variance.set_ylim(0.0, max(1.2, variance.get_ylim()[1]))
        variance.axhline(1.0, color=GREY, linewidth=1.0, zorder=1)

    texts, handles = [], []
    for (label, runs), colour, marker in zip(methods.items(), COLOURS, MARKERS, strict=False):
        seeds = f"mean of {len(runs)} seeds, band: min to max" if len(runs) > 1 else "1 seed"
        texts.append(f"{label} ({seeds})".replace("$", r"\$"))  # which would begin a formula
        handles.append(Line2D([], [], color=colour, linewidth=2.2, marker=marker, markersize=6))
    columns = len(texts) if sum(map(len, texts)) < LEGEND_CHARACTERS else 1
    figure.legend(handles, texts, loc="outside upper left", ncols=columns, fontsize=10.5)
    caption = "Lines show the values as logged."
    if window > 1:
        averages = f"Lines are moving averages over {window} logged values (evaluations: as measured)"
        caption = f"{averages}; faint: the values of a single seed as logged."
    figure.supxlabel(caption, fontsize=8.5, color=GREY, x=0.01, ha="left")


def draw_panel(axes: Axes, methods: Methods, lines: Mapping[str, str], *, title: str, window: int) -> None:
    """
    Draw metrics over the optimizer steps, a colour for each method and a line style for each metric.

    `lines` holds the metrics, and what the legend calls them if there are several. Evaluations are drawn as measured, others as
    moving averages over `window` values; of a method with one seed the values as logged stay visible. The steps axis names the
    methods whose absence is not an oversight.
    """
    from matplotlib.lines import Line2D
    from matplotlib.ticker import MaxNLocator

    missing = []
    for (label, runs), colour, marker in zip(methods.items(), COLOURS, MARKERS, strict=False):
        num_drawn = len(axes.lines)
        for metric, style in zip(lines, LINE_STYLES, strict=False):
            measured = metric in metrics.EVALUATIONS
            curve = seed_curve(runs, metric, window=1 if measured else window)
            if curve is None:
                continue
            if len(runs) > 1:
                axes.fill_between(curve.steps, curve.low, curve.high, color=colour, alpha=0.16, linewidth=0)
            elif window > 1 and len(lines) == 1 and not measured:
                series = runs[0].series(metric)
                axes.plot(list(series), list(series.values()), color=colour, linewidth=0.8, alpha=0.35)
            # A single point needs a marker to be seen at all.
            shape = marker if measured else "." if len(curve.steps) == 1 else ""
            axes.plot(
                curve.steps, curve.mean, color=colour, linestyle=style, linewidth=1.9, marker=shape, markersize=5.5
            )
        if len(axes.lines) == num_drawn:
            missing.append(label)
    axes.set_title(title, pad=22 if len(lines) > 1 else None)
    if len(missing) == len(methods):
        axes.set(xlabel="optimizer step", xticks=[], yticks=[])
        axes.text(0.5, 0.5, "not logged", transform=axes.transAxes, ha="center", va="center", color=GREY)
        return
    absent = f" (not logged by {', '.join(missing)})" if missing else ""
    axes.set_xlabel(textwrap.fill("optimizer step" + absent, width=PANEL_CHARACTERS), parse_math=False)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True))
    if len(lines) > 1:
        handles = [Line2D([], [], color=GREY, linestyle=style) for _, style in zip(lines, LINE_STYLES, strict=False)]
        narrow = {"columnspacing": 1.0, "handlelength": 1.7, "handletextpad": 0.5, "borderaxespad": 0.1}
        axes.legend(
            handles, lines.values(), loc="lower left", bbox_to_anchor=(-0.02, 1.0), ncols=3, fontsize=8.5, **narrow
        )
