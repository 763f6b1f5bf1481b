"""Curves of chosen metrics in a notebook, redrawn during the run, in addition to the trainer's table of numbers."""

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure
from transformers import TrainerCallback

from oblr_trl import metrics
from oblr_trl.runs.figure import STYLE, draw_panel
from oblr_trl.runs.logs import RunLog

# Values that one point of the bold line averages; the faint line has them as logged.
SMOOTHING = 5


class LivePlot(TrainerCallback):
    """
    Draws metrics in the notebook while the trainer runs, one panel each, and leaves the last figure in the output.

    Pass it as `callbacks=[LivePlot()]`. A metric that has not been logged has an empty panel. Needs matplotlib and IPython;
    only the main process draws.

    Args:
        metrics (`Sequence[str]`, *optional*):
            Names as logged. Defaults to reward, rho and the variance relative to RLOO's.
        every (`int`, *optional*, defaults to `5`):
            Logging events between two figures.
    """

    def __init__(
        self,
        metrics: Sequence[str] = (metrics.REWARD, metrics.RHO, metrics.VARIANCE_VS_LEAVE_ONE_OUT),
        *,
        every: int = 5,
    ) -> None:
        self.metrics = metrics
        self.every = every
        self._display: Any = None

    def on_log(self, args, state, control, **kwargs):
        if state.is_world_process_zero and len(state.log_history) % self.every == 0:
            self._show(state.log_history)

    def on_train_end(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            self._show(state.log_history)
        self._display = None  # another training gets a figure of its own

    def _show(self, rows: Sequence[dict[str, Any]]) -> None:
        from IPython.display import Image, display

        image = Image(data=draw_metrics(rows, self.metrics))
        if self._display is None:
            self._display = display(image, display_id=True)
        else:
            self._display.update(image)


def draw_metrics(rows: Sequence[dict[str, Any]], metrics: Sequence[str]) -> bytes:
    """One panel per metric over the optimizer steps, as PNG; `rows` is `trainer.state.log_history`."""
    runs = {"": [RunLog(path=Path(), num_steps=len(rows), rows=list(rows))]}
    with rc_context(STYLE | {"axes.titlesize": 10}):
        figure = Figure(figsize=(3.3 * len(metrics), 2.5), dpi=90, layout="constrained")
        for axes, metric in zip(figure.subplots(1, len(metrics), squeeze=False).flat, metrics, strict=True):
            draw_panel(axes, runs, {metric: ""}, title=metric, window=SMOOTHING)
        stream = BytesIO()
        figure.savefig(stream, format="png")
    return stream.getvalue()
