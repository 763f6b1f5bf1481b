"""The picture of a comparison of runs. It is drawn without pyplot, so it leaves the caller's backend and style alone."""

from __future__ import annotations

import textwrap
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from oblr_trl import metrics
from oblr_trl.runs.logs import RunLog, RunLogError
from oblr_trl.runs.summary import Curve, band_name, seed_curve

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.text import Annotation
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
FIGURE_INCHES = (12.0, 7.8)
DPI = 150
# The key of the methods breaks into rows so that no row has more characters than the picture is wide.
KEY_CHARACTERS = 150
# A longer label of a panel breaks into lines.
PANEL_CHARACTERS = 48
# Room above a panel for a line of its own below the title.
SUBTITLE_PAD = 22
# The moving average spans one logged value in this many of the shortest run, and stays light for long ones.
SMOOTHING_FRACTION = 12
MAX_SMOOTHING = 25
# Written values closer than this fraction of the axis would overlap.
LABEL_SPACING = 0.06


def write_comparison(methods: Methods, evaluation_metric: str | None, path: Path) -> None:
    """
    Draws the runs of each method, as mean and band over its seeds, and writes the picture as PNG.

    Args:
        methods (`Mapping[str, Sequence[RunLog]]`):
            The runs of every method, at most 7 methods.
        evaluation_metric (`str` or `None`):
            The metric of the held-out panel.
        path (`Path`):
            Where to write. Missing folders are made.

    Raises:
        `RunLogError`: matplotlib is not installed, or there are more methods than distinguishable colours.
    """
    try:
        from matplotlib import rc_context
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise RunLogError(
            f"{path}: not written, the picture needs matplotlib ({error}); run `pip install 'oblr_trl[demo]'`"
        ) from error
    if len(methods) > len(COLOURS):
        raise RunLogError(
            f"{path}: not written, {len(methods)} methods are too many to tell apart; name at most {len(COLOURS)}"
        )
    with rc_context(STYLE):
        figure = Figure(figsize=FIGURE_INCHES, dpi=DPI)
        FigureCanvasAgg(figure)
        figure.set_layout_engine("constrained", w_pad=0.08, h_pad=0.08)
        _draw(figure, methods, evaluation_metric)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, format="png")


def _draw(figure: Figure, methods: Methods, evaluation_metric: str | None) -> None:
    """Six panels, one key of the methods above them, and below them what the lines are."""
    window = smoothing_window(methods)
    (reward, evaluation, multiplier), (rho, moments, variance) = figure.subplots(2, 3)
    _line_panel(reward, methods, metrics.REWARD, window)
    reward.set_title("Training reward")
    reward.set_ylabel("mean reward per completion")
    _evaluation_panel(evaluation, methods, evaluation_metric)
    _line_panel(multiplier, methods, metrics.LR_MULTIPLIER, window)
    multiplier.set_title("Learning-rate multiplier")
    multiplier.set_ylabel("learning rate / base schedule")
    multiplier.set_ylim(bottom=0.0)
    _line_panel(rho, methods, metrics.RHO, window)
    rho.set_title(r"$\rho$ = N SNR / (1 + N SNR)", pad=SUBTITLE_PAD)
    subtitle = "1: the gradient is all signal, 0: all noise"
    rho.text(0.0, 1.03, subtitle, transform=rho.transAxes, fontsize=8.5, color=GREY)
    rho.set_ylabel(r"$\rho$")
    rho.set_ylim(bottom=0.0)
    _moments_panel(moments, methods, window)
    _variance_panel(variance, methods, window)
    _draw_key(figure, methods)
    caption = "Lines show the values as logged."
    if window > 1:
        caption = f"Lines are moving averages over {window} logged values (evaluations: as measured); faint: the values of a single seed as logged."
    figure.supxlabel(caption, fontsize=8.5, color=GREY, x=0.01, ha="left")


def smoothing_window(methods: Methods) -> int:
    """Width of the moving average in logged values, odd and the same for all methods."""
    shortest = min(len(run.series(metrics.REWARD)) for runs in methods.values() for run in runs)
    return min(shortest // SMOOTHING_FRACTION, MAX_SMOOTHING) | 1


def _draw_key(figure: Figure, methods: Methods) -> None:
    """One entry per method above the panels: its colour and marker, its seeds, and what its band shows."""
    from matplotlib.lines import Line2D

    texts, handles = [], []
    for index, (label, runs) in enumerate(methods.items()):
        seeds = f"mean of {len(runs)} seeds, band: {band_name(len(runs))}" if len(runs) > 1 else "1 seed"
        texts.append(f"{label} ({seeds})")
        handles.append(Line2D([], [], color=COLOURS[index], linewidth=2.2, marker=MARKERS[index], markersize=6))
    columns = max(1, min(len(texts), KEY_CHARACTERS // (max(map(len, texts)) + 8)))
    key = figure.legend(handles, ["method"] * len(texts), loc="outside upper left", ncols=columns, fontsize=10.5)
    for entry, text in zip(key.get_texts(), texts, strict=True):
        # Set afterwards, because matplotlib would drop a label with a leading underscore and read dollars as mathematics.
        entry.set_parse_math(False)
        entry.set_text(text)


def _line_panel(axes: Axes, methods: Methods, metric: str, window: int) -> None:
    """One training metric over the steps."""
    missing = []
    for colour, (label, runs) in zip(COLOURS, methods.items(), strict=False):
        curve = seed_curve(runs, metric, window=window)
        if curve is None:
            missing.append(label)
            continue
        if window > 1 and len(runs) == 1:
            series = runs[0].series(metric)
            axes.plot(list(series), list(series.values()), color=colour, linewidth=0.8, alpha=0.35)
        _draw_curve(axes, curve, colour, num_seeds=len(runs))
    _finish_panel(axes, missing, methods)


def _moments_panel(axes: Axes, methods: Methods, window: int) -> None:
    """Signal and noise of the gradient on one logarithmic axis: the distance between the two lines is their ratio."""
    axes.set_title("Signal and noise of the gradient", pad=SUBTITLE_PAD)
    axes.set_ylabel("squared norm (gaps: 0 or below)")
    axes.set_yscale("log", nonpositive="mask")
    missing = _styled_curves(
        axes, methods, {metrics.SIGNAL: ("signal", "-"), metrics.NOISE: ("noise", "--")}, window
    )
    _finish_panel(axes, missing, methods)


def _variance_panel(axes: Axes, methods: Methods, window: int) -> None:
    """Variance under the baseline in use relative to three others; the line at 1 is no gain."""
    axes.set_title("Variance relative to other baselines", pad=SUBTITLE_PAD)
    axes.set_ylabel("variance ratio (below 1: a gain)")
    styles: dict[str, tuple[str, LineStyleType]] = {
        metrics.VARIANCE_VS_LEAVE_ONE_OUT: ("leave-one-out", "-"),
        metrics.VARIANCE_VS_GROUP_MEAN: ("group mean", "--"),
        metrics.VARIANCE_VS_LENGTH_WEIGHTED: ("length-weighted", ":"),
    }
    missing = _styled_curves(axes, methods, styles, window)
    if len(missing) < len(methods):
        axes.set_ylim(0.0, max(1.2, axes.get_ylim()[1]))
        axes.axhline(1.0, color=GREY, linewidth=1.0, zorder=1)
        transform = axes.get_yaxis_transform()
        axes.text(0.99, 1.01, "no gain", transform=transform, ha="right", va="bottom", fontsize=8.5, color=GREY)
    _finish_panel(axes, missing, methods)


def _styled_curves(
    axes: Axes, methods: Methods, styles: Mapping[str, tuple[str, LineStyleType]], window: int
) -> list[str]:
    """Several metrics in one panel, told apart by line style; returns the methods that logged none of them."""
    from matplotlib.lines import Line2D

    missing = []
    for colour, (label, runs) in zip(COLOURS, methods.items(), strict=False):
        curves = [(seed_curve(runs, metric, window=window), style) for metric, (_, style) in styles.items()]
        if all(curve is None for curve, _ in curves):
            missing.append(label)
        for curve, style in curves:
            if curve is not None:
                _draw_curve(axes, curve, colour, num_seeds=len(runs), style=style)
    if len(missing) < len(methods):
        key = [Line2D([], [], color=GREY, linestyle=style, label=name) for name, style in styles.values()]
        axes.legend(
            handles=key,
            loc="lower left",
            bbox_to_anchor=(-0.02, 1.0),
            ncols=len(key),
            fontsize=8.5,
            borderaxespad=0.1,
            columnspacing=1.0,
            handlelength=1.7,
            handletextpad=0.5,
        )
    return missing


def _evaluation_panel(axes: Axes, methods: Methods, metric: str | None) -> None:
    """The held-out metric at each evaluation, with its first and last value written beside the curve."""
    is_reward = metric == metrics.EVAL_REWARD
    axes.set_title("Held-out reward (eval_reward)" if is_reward else "Held-out accuracy")
    axes.set_ylabel("mean reward per completion" if is_reward else "fraction correct")
    curves, missing = {}, []
    for index, (label, runs) in enumerate(methods.items()):
        curve = None if metric is None else seed_curve(runs, metric)
        if curve is None:
            missing.append(label)
            continue
        _draw_curve(axes, curve, COLOURS[index], num_seeds=len(runs), marker=MARKERS[index])
        curves[COLOURS[index]] = curve
    _finish_panel(axes, missing, methods)
    if curves:
        _leave_room_beside(axes, curves.values())
        _label_values(axes, {colour: (curve.steps[0], curve.mean[0]) for colour, curve in curves.items()}, side="left")
        longer = {colour: curve for colour, curve in curves.items() if len(curve.steps) > 1}
        _label_values(axes, {c: (curve.steps[-1], curve.mean[-1]) for c, curve in longer.items()}, side="right")


def _leave_room_beside(axes: Axes, curves: Collection[Curve]) -> None:
    """Widens the steps axis for values written at both ends of the curves; steps that no run has get no tick."""
    from matplotlib.ticker import MaxNLocator

    first, last = min(curve.steps[0] for curve in curves), max(curve.steps[-1] for curve in curves)
    width = max(last - first, 1)
    axes.set_xlim(first - 0.3 * width, last + 0.25 * width)
    axes.set_xticks(
        [step for step in MaxNLocator(nbins=6, integer=True).tick_values(first, last) if first <= step <= last]
    )


def _label_values(axes: Axes, points: Mapping[str, tuple[int, float]], *, side: str) -> None:
    """Writes the values beside their points: equal ones once and in grey, close ones moved apart."""
    low, high = axes.get_ylim()
    height = -float("inf")
    written: dict[str, Annotation] = {}
    for colour, (step, value) in sorted(points.items(), key=lambda item: item[1][1]):
        text = f"{value:.3f}"
        if text in written:
            written[text].set_color(GREY)
            continue
        height = max(value, height + LABEL_SPACING * (high - low))
        written[text] = axes.annotate(
            text,
            (step, height),
            xytext=(-8 if side == "left" else 8, 0),
            textcoords="offset points",
            ha="right" if side == "left" else "left",
            va="center",
            color=colour,
            fontweight="bold",
            annotation_clip=False,  # a value moved apart may leave the axes
        )


def _draw_curve(
    axes: Axes, curve: Curve, colour: str, *, num_seeds: int, style: LineStyleType = "-", marker: str = ""
) -> None:
    """A mean and, for more than one seed, its band; a single point needs a marker to be seen at all."""
    marker = marker or ("." if len(curve.steps) == 1 else "")
    axes.plot(curve.steps, curve.mean, color=colour, linestyle=style, linewidth=1.9, marker=marker, markersize=5.5)
    if num_seeds > 1:
        axes.fill_between(curve.steps, curve.low, curve.high, color=colour, alpha=0.16, linewidth=0)


def _finish_panel(axes: Axes, missing: Sequence[str], methods: Methods) -> None:
    """Names the steps axis, and the methods whose absence from the panel is not an oversight."""
    from matplotlib.ticker import MaxNLocator

    absent = f" (not logged by {', '.join(missing)})" if missing else ""
    axes.set_xlabel(textwrap.fill("optimizer step" + absent, width=PANEL_CHARACTERS), parse_math=False)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True))
    if len(missing) == len(methods):
        axes.set_xlabel("optimizer step")
        axes.set_yscale("linear")
        axes.set(xticks=[], yticks=[])
        axes.text(0.5, 0.5, "not logged by any run", transform=axes.transAxes, ha="center", va="center", color=GREY)
