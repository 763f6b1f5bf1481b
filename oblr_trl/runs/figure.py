"""The figure of a comparison of runs, drawn without pyplot, so that the caller's backend and style stay as they are."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from matplotlib.typing import LineStyleType, RcKeyType

from oblr_trl import metrics
from oblr_trl.runs.logs import RunLog
from oblr_trl.runs.summary import seed_curve

Methods = Mapping[str, Sequence[RunLog]]

# Okabe and Ito's palette, distinguishable under every common colour blindness; its yellow is too pale for a thin line.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
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
# The moving average spans one logged value in this many of the shortest run, and stays light for long ones.
SMOOTHING_FRACTION, MAX_SMOOTHING = 12, 25
# Title, y-axis, and the name of each metric in the legend of the panel.
PANELS: tuple[tuple[str, str, dict[str, str]], ...] = (
    ("Training reward", "mean reward per completion", {metrics.REWARD: ""}),
    ("Learning rate", "as applied", {metrics.LEARNING_RATE: ""}),
    (
        "Movement of the policy",
        "KL per batch (nats per completion)",
        {metrics.KL: "measured", metrics.KL_TARGET: "target"},
    ),
    (
        "Signal in the gradient and in the steps",
        "1: all signal, 0: all noise",
        {metrics.RHO: r"$\rho$ = N SNR / (1 + N SNR)", metrics.CORRELATION: "correlation with the advantages"},
    ),
    (
        "Signal and noise of the gradient",
        "squared norm (bottom: 0 or below)",
        {metrics.SIGNAL: "signal", metrics.NOISE: "noise"},
    ),
    (
        "Completions with an advantage",
        "share",
        {metrics.LIVE_FRACTION: "baseline in use", metrics.LIVE_FRACTION_GROUP_MEAN: "group mean"},
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


def write_comparison(
    methods: Methods, evaluation_metric: str, path: Path, *, rollouts_per_step: int | None = None
) -> None:
    """
    Draw the runs of each method, as mean and band over its seeds, in eight panels, and write the figure: over the optimizer steps, or
    over the completions, where each step of all methods has `rollouts_per_step` of them.

    Raises:
        `ValueError`: there are more methods than distinguishable colours.
    """
    if len(methods) > len(COLOURS):
        raise ValueError(
            f"{path}: not written, {len(methods)} methods are too many to tell apart; name at most {len(COLOURS)}"
        )
    shortest = min(len(run.series(metrics.REWARD)) for runs in methods.values() for run in runs)
    window = min(shortest // SMOOTHING_FRACTION, MAX_SMOOTHING) | 1
    with rc_context(STYLE):
        figure = Figure(figsize=(15.5, 7.8), dpi=150, layout="constrained")
        panels = list(figure.subplots(2, 4).flat)
        held_out = (f"Held-out {evaluation_metric.removeprefix('eval_')}", "mean", {evaluation_metric: ""})
        for axes, (title, label, lines) in zip(panels, (PANELS[0], held_out, *PANELS[1:]), strict=True):
            axes.set_ylabel(label)
            draw_panel(axes, methods, lines, title=title, window=window)
            if rollouts_per_step is not None and axes.lines:
                axes.xaxis.set_major_formatter(lambda step, _: f"{step * rollouts_per_step:g}")
                axes.set_xlabel("completions")
        _, _, rate, movement, _, moments, live, variance = panels
        live.set_ylim(0.0, 1.05)
        for axes in (rate, movement, moments):
            if axes.lines:
                axes.set_yscale("log", nonpositive="clip")  # the distance between two lines is their ratio
        if variance.lines:
            variance.set_ylim(0.0, max(1.2, variance.get_ylim()[1]))
            variance.axhline(1.0, color=GREY, linewidth=1.0, zorder=1)
        handles = [Line2D([], [], color=colour, linewidth=2.2) for _, colour in zip(methods, COLOURS, strict=False)]
        texts = [label.replace("$", r"\$") for label in methods]  # which would begin a formula
        figure.legend(handles, texts, loc="outside upper left", ncols=4, fontsize=10.5)
        caption = f"Moving averages over {window} logged values (evaluations: as measured); bands: minimum to maximum of the seeds."
        figure.supxlabel(caption, fontsize=8.5, color=GREY, x=0.01, ha="left")
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)


def draw_panel(axes: Axes, methods: Methods, lines: Mapping[str, str], *, title: str, window: int) -> None:
    """
    Draw metrics over the optimizer steps, a colour for each method and a line style for each metric.

    `lines` holds the metrics, and what the legend calls them if there are several. Evaluations are drawn as measured, others as
    moving averages over `window` values; of a method with one seed the values as logged stay visible.
    """
    for runs, colour in zip(methods.values(), COLOURS, strict=False):
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
            marker = "o" if measured else ""
            axes.plot(curve.steps, curve.mean, color=colour, linestyle=style, linewidth=1.9, marker=marker)
    axes.set_title(title, pad=22 if len(lines) > 1 else None)
    axes.set_xlabel("optimizer step")
    if not axes.lines:
        axes.set(xticks=[], yticks=[])
        axes.text(0.5, 0.5, "not logged", transform=axes.transAxes, ha="center", va="center", color=GREY)
        return
    axes.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True))
    if len(lines) > 1:
        handles = [Line2D([], [], color=GREY, linestyle=style) for _, style in zip(lines, LINE_STYLES, strict=False)]
        place: dict[str, Any] = {"loc": "lower left", "bbox_to_anchor": (-0.02, 1.0), "ncols": 3, "fontsize": 8.5}
        axes.legend(handles, lines.values(), columnspacing=1.0, handlelength=1.7, handletextpad=0.5, **place)
