"""The live plot: how often it draws, that it replaces its figure, and what is in it."""

from types import SimpleNamespace

import pytest

from oblr_trl.runs.live_plot import LivePlot, draw_metrics

ROWS = [{"step": step, "reward": 0.1 * step, "gradient_snr/rho": None} for step in range(1, 8)]


@pytest.fixture
def shown(monkeypatch):
    """What the notebook would have shown, as (display number, PNG)."""
    figures = []

    def display(image, display_id):
        number = len({number for number, _ in figures})
        figures.append((number, image.data))
        return SimpleNamespace(update=lambda image: figures.append((number, image.data)))

    monkeypatch.setattr("IPython.display.display", display)
    return figures


def log(plot, num_rows, *, main_process=True):
    for i in range(num_rows):
        plot.on_log(None, SimpleNamespace(is_world_process_zero=main_process, log_history=ROWS[: i + 1]), None)
    plot.on_train_end(None, SimpleNamespace(is_world_process_zero=main_process, log_history=ROWS[:num_rows]), None)


def test_one_figure_is_replaced_every_few_logs_and_at_the_end(shown):
    plot = LivePlot(every=3)
    log(plot, 7)
    assert [number for number, _ in shown] == [0, 0, 0]  # after 3 and 6 logs, and at the end
    assert len({png for _, png in shown}) == 3
    log(plot, 1)
    assert shown[-1][0] == 1  # another training


def test_only_the_main_process_draws(shown):
    log(LivePlot(every=1), 3, main_process=False)
    assert shown == []


def test_a_panel_holds_the_values_as_logged_and_an_undefined_metric_none(drawn):
    png = draw_metrics(ROWS, ["reward", "gradient_snr/rho"])

    assert png.startswith(b"\x89PNG")
    reward, rho = drawn[0].axes
    assert [axes.get_title(loc="left") for axes in (reward, rho)] == ["reward", "gradient_snr/rho"]
    assert list(reward.lines[0].get_xdata()) == [1, 2, 3, 4, 5, 6, 7]
    assert list(reward.lines[0].get_ydata()) == [row["reward"] for row in ROWS]
    assert [text.get_text() for text in rho.texts] == ["not logged"]
    assert not rho.lines
