"""`oblr_trl.scripts.compare` and the modules below it, on logs with the keys that TRL 1.16 writes."""

import json
import math
import runpy
import struct
import sys
from pathlib import Path
from typing import Any

import pytest

from oblr_trl.runs.figure import smoothing_window
from oblr_trl.runs.logs import RunLog, read_methods
from oblr_trl.runs.summary import band, band_name, seed_curve, smooth
from oblr_trl.scripts.compare import compare, format_table, main

matplotlib = pytest.importorskip("matplotlib")


def evaluation_row(step: int, accuracy: float | None, reward: float = 0.5) -> dict[str, Any]:
    """An evaluation row of a real log; `eval_accuracy` is there only if it was measured."""
    row = {
        "epoch": 0.1 * step,
        "eval_completions/mean_length": 4.0,
        "eval_frac_reward_zero_std": 0.25,
        "eval_loss": -8.7e-09,
        "eval_num_tokens": 127.0,
        "eval_reward": reward,
        "eval_reward_std": 0.43,
        "eval_runtime": 0.07,
        "step": step,
    }
    return row if accuracy is None else {**row, "eval_accuracy": accuracy}


def training_row(step: int, reward: float | None, **metrics: float | None) -> dict[str, Any]:
    """A training row of a real log, as GRPO writes it; `metrics` are what OBLR-PO adds."""
    return {
        "clip_ratio/high_max": 0.0,
        "completions/mean_terminated_length": None,  # TRL writes null if no completion of the step terminated
        "entropy": 2.77,
        "epoch": 0.1 * step,
        "frac_reward_zero_std": 0.25,
        "grad_norm": 0.99,
        "learning_rate": 8e-07,
        "loss": -3.8e-09,
        "num_tokens": 127.0,
        "reward": reward,
        "reward_std": 0.44,
        "step": step,
        "step_time": 0.017,
        **metrics,
    }


def oblrpo_metrics(multiplier: float | None, rho: float | None, ratio: float | None) -> dict[str, float | None]:
    return {
        "lr_multiplier": multiplier,
        "gradient_snr/signal": 0.01,
        "gradient_snr/noise": 1.0,
        "gradient_snr/rho": rho,
        "variance_ratio/leave_one_out": ratio,
        "variance_ratio/group_mean": ratio,
        "variance_ratio/length_weighted": ratio,
        "baseline/mean": 0.5,
        "score/norm/mean": 3.0,
    }


def final_row(step: int, runtime: float, steps_timed: int | None = None) -> dict[str, Any]:
    """The row that closes a training; it times `steps_timed` steps, all of them unless the run was resumed."""
    steps_per_second = round((step if steps_timed is None else steps_timed) / runtime, 3)
    speed = {"train_runtime": runtime, "train_samples_per_second": 138.8, "train_steps_per_second": steps_per_second}
    return {"epoch": 1.0, "step": step, "total_flos": 0.0, "train_loss": -0.01, **speed}


def write_state(directory: Path, rows: list[dict[str, Any]], num_steps: int = 20) -> Path:
    """Writes `trainer_state.json` as transformers does, and returns the directory."""
    directory.mkdir(parents=True, exist_ok=True)
    state: dict[str, Any] = {
        "best_metric": None,
        "epoch": 1.0,
        "global_step": num_steps,
        "is_world_process_zero": True,
        "log_history": rows,
        "logging_steps": 1,
        "max_steps": num_steps,
        "stateful_callbacks": {"TrainerControl": {"args": {}, "attributes": {}}},
        "train_batch_size": 8,
    }
    (directory / "trainer_state.json").write_text(json.dumps(state, indent=2, sort_keys=True) + "\n")
    return directory


def oblrpo_run(directory: Path, *, final: float = 0.75, reward: float = 0.5, num_steps: int = 20) -> Path:
    """A run from accuracy 0.5 to `final`: reward 0 in the first half of its steps and `reward` in the second."""
    rows = [evaluation_row(0, 0.5)]
    for step in range(1, num_steps + 1):
        value = reward if step > num_steps // 2 else 0.0
        multiplier = 0.1 if step % 2 else 0.3
        metrics = oblrpo_metrics(multiplier, 0.2, 0.6) | {"learning_rate": 3e-5 * multiplier}
        rows.append(training_row(step, value, **metrics))
    rows += [evaluation_row(num_steps, final), final_row(num_steps, runtime=40.0)]
    return write_state(directory, rows, num_steps)


def grpo_run(directory: Path, *, final: float = 0.6) -> Path:
    rows = [evaluation_row(0, 0.5), *(training_row(step, 0.4) for step in range(1, 21)), evaluation_row(20, final)]
    return write_state(directory, [*rows, final_row(20, runtime=30.0)])


def compared(*arguments: object) -> tuple[dict[str, Any], str]:
    """What `main` does before it draws: the comparison and the text of its table."""
    comparison = compare(read_methods([str(argument) for argument in arguments]))
    return comparison, format_table(comparison)


def table_cells(text: str) -> dict[str, list[str]]:
    """The rows of the printed Markdown table by their name."""
    rows = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("|") and "---" not in line]
    return {row[0].strip(): [cell.strip() for cell in row[1:]] for row in rows}


@pytest.fixture
def picture(tmp_path):
    return tmp_path / "compare.png"


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were written, to look at their contents."""
    from matplotlib.figure import Figure

    figures = []
    savefig = Figure.savefig

    def keep_and_save(self, *args, **kwargs):
        figures.append(self)
        savefig(self, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", keep_and_save)
    return figures


def test_table_of_one_run_equals_the_numbers_worked_by_hand(tmp_path, picture, capsys):
    main([f"OBLR-PO={oblrpo_run(tmp_path / 'a')}", f"GRPO={grpo_run(tmp_path / 'b')}", "--output", str(picture)])
    assert table_cells(capsys.readouterr().out) == {
        "": ["OBLR-PO", "GRPO"],
        "seeds": ["1", "1"],
        "steps": ["20", "20"],
        "held-out accuracy, start": ["0.500", "0.500"],
        "held-out accuracy, final": ["0.750", "0.600"],
        "gain": ["0.250", "0.100"],
        # Steps 11 to 20 of 20: 0.5 each, and none of the zeros of steps 1 to 10.
        "training reward, last 10 steps": ["0.500", "0.400"],
        # 3e-5 times 0.1 at the 10 odd steps and 0.3 at the 10 even ones: (3e-6 + 9e-6) / 2; GRPO's is 8e-7 throughout.
        "effective learning rate, mean": ["6.00e-06", "8.00e-07"],
        "effective learning rate, last": ["9.00e-06", "8.00e-07"],
        # GRPO does not log any of the next three.
        "learning-rate multiplier, mean": ["0.200", ""],
        "rho, mean": ["0.200", ""],
        "variance / leave-one-out's, mean": ["0.600", ""],
        "training and evaluation time (s)": ["40.0", "30.0"],
    }


def test_seeds_are_summarised_by_mean_and_sample_standard_deviation(tmp_path):
    for seed, final in enumerate((0.6, 0.7, 0.8)):
        oblrpo_run(tmp_path / "oblrpo" / f"seed-{seed}", final=final)
    comparison, output = compared(tmp_path / "oblrpo")
    entry = comparison["methods"]["oblrpo"]
    assert entry["num_seeds"] == 3
    assert entry["final_evaluation"]["values"] == [0.6, 0.7, 0.8]
    # Mean 0.7; squared deviations 0.01 + 0 + 0.01 over n - 1 = 2 give 0.01, whose root is 0.1.
    assert entry["final_evaluation"]["mean"] == pytest.approx(0.7)
    assert entry["final_evaluation"]["std"] == pytest.approx(0.1)
    assert table_cells(output)["held-out accuracy, final"] == ["0.700 ± 0.100"]
    assert table_cells(output)["gain"] == ["0.200 ± 0.100"]
    assert "sample standard deviation over seeds" in output


def test_runs_with_the_same_label_are_seeds_of_one_method_in_the_order_given(tmp_path):
    first, second, other = (oblrpo_run(tmp_path / name) for name in ("x", "y", "z"))
    methods = read_methods([f"OBLR-PO={second}", str(other), f"OBLR-PO={first}"])
    assert list(methods) == ["OBLR-PO", "z"]
    assert [run.path.parent.name for run in methods["OBLR-PO"]] == ["y", "x"]


def test_seed_folders_are_read_in_the_order_of_their_numbers(tmp_path):
    for seed in (10, 2, 1):
        oblrpo_run(tmp_path / "oblrpo" / f"seed-{seed}")
    runs = read_methods([str(tmp_path / "oblrpo")])["oblrpo"]
    assert [run.path.parent.name for run in runs] == ["seed-1", "seed-2", "seed-10"]


@pytest.mark.parametrize("inside", ["seed-0", "checkpoint-20", "seed-0/checkpoint-20"])
def test_a_run_named_by_its_seed_or_checkpoint_folder_is_called_after_the_method(tmp_path, inside):
    assert list(read_methods([str(oblrpo_run(tmp_path / "oblrpo" / inside))])) == ["oblrpo"]


def test_a_folder_with_an_equals_sign_in_its_name_is_a_path(tmp_path):
    assert list(read_methods([str(oblrpo_run(tmp_path / "lr=1e-3"))])) == ["lr=1e-3"]
    assert list(read_methods([f"SGD={tmp_path / 'lr=1e-3'}"])) == ["SGD"]


def test_the_newest_checkpoint_is_read_where_the_run_saved_no_state(tmp_path):
    for step in (5, 10, 100):  # as text, "5" is the largest
        oblrpo_run(tmp_path / f"checkpoint-{step}", num_steps=step)
    (tmp_path / "checkpoint-200").mkdir()  # interrupted while it was saved
    oblrpo_run(tmp_path / "checkpoint-best", num_steps=300)  # not a name that a trainer gives
    [[run]] = read_methods([str(tmp_path)]).values()
    assert (run.path.parent.name, run.num_steps) == ("checkpoint-100", 100)


@pytest.mark.parametrize(("saved_steps", "folder"), [(20, "run"), (30, "run"), (10, "checkpoint-20")])
def test_the_state_with_most_steps_is_read_and_the_saved_one_at_equal_steps(tmp_path, saved_steps, folder):
    oblrpo_run(tmp_path / "run", num_steps=saved_steps)
    oblrpo_run(tmp_path / "run" / "checkpoint-20", num_steps=20)
    [[run]] = read_methods([str(tmp_path / "run")]).values()
    assert run.path.parent.name == folder


def test_nulls_and_non_finite_numbers_count_as_not_logged(tmp_path, picture, capsys):
    rows = [
        evaluation_row(0, 0.5),
        training_row(1, 0.2, **oblrpo_metrics(0.1, None, math.nan)),
        training_row(2, None, **oblrpo_metrics(None, None, math.inf)),
        training_row(3, 0.4, **oblrpo_metrics(0.3, None, 0.5)),
        {**evaluation_row(3, None), "eval_accuracy": None},
    ]
    run = write_state(tmp_path / "run", rows, num_steps=3)
    comparison = main([str(run), "--output", str(picture), "--json", str(tmp_path / "compare.json")])
    entry = comparison["methods"]["run"]
    assert entry["final_reward"]["mean"] == pytest.approx(0.3)  # (0.2 + 0.4) / 2
    assert entry["lr_multiplier"]["mean"] == pytest.approx(0.2)  # (0.1 + 0.3) / 2
    assert entry["variance_ratio"]["mean"] == 0.5
    assert entry["rho"] == {"mean": None, "std": None, "values": [None]}
    assert (
        entry["final_evaluation"]["mean"] is entry["evaluation_gain"]["mean"] is entry["train_runtime"]["mean"] is None
    )
    output = capsys.readouterr().out
    assert table_cells(output)["rho, mean"] == table_cells(output)["gain"] == [""]
    assert "nan" not in (output + (tmp_path / "compare.json").read_text()).lower()
    assert "None" not in output


def test_a_quantity_that_only_one_seed_knows_has_no_spread(tmp_path):
    oblrpo_run(tmp_path / "a")
    grpo_run(tmp_path / "b")
    _, output = compared(f"M={tmp_path / 'a'}", f"M={tmp_path / 'b'}")
    assert table_cells(output)["rho, mean"] == ["0.200"]


def test_without_accuracy_in_every_evaluated_run_the_reward_is_compared_and_named(tmp_path, picture, capsys, drawn):
    rows = [evaluation_row(0, None, reward=0.1), training_row(1, 0.2), evaluation_row(1, None, reward=0.4)]
    write_state(tmp_path / "plain", rows, num_steps=1)
    comparison = main([str(tmp_path / "plain"), str(oblrpo_run(tmp_path / "ours")), "--output", str(picture)])
    assert comparison["evaluation_metric"] == "eval_reward"
    output = capsys.readouterr().out
    assert table_cells(output)["held-out reward, start"] == ["0.100", "0.500"]
    assert table_cells(output)["held-out reward, final"] == ["0.400", "0.500"]
    assert "not every evaluated run logs eval_accuracy, so the held-out rows show eval_reward" in output
    assert drawn[0].axes[1].get_title(loc="left") == "Held-out reward (eval_reward)"


def test_start_is_blank_without_an_evaluation_before_the_first_step(tmp_path):
    rows = [training_row(5, 0.2), evaluation_row(5, 0.6), training_row(8, 0.2), final_row(9, 1.0)]
    _, output = compared(write_state(tmp_path / "run", rows, num_steps=9))
    assert [table_cells(output)[f"held-out accuracy, {when}"] for when in ("start", "final")] == [[""], ["0.600"]]
    assert "was first evaluated at step 5; `eval_on_start=True` would give the start" in output
    assert "was last evaluated at step 5 of 9" in output


def test_a_run_that_was_never_evaluated_is_compared_by_the_rest(tmp_path, picture, capsys):
    main([str(write_state(tmp_path / "run", [training_row(20, 0.2)])), "--output", str(picture)])
    output = capsys.readouterr().out
    assert table_cells(output)["training reward, last 10 steps"] == ["0.200"]
    assert "no run was evaluated: set `eval_strategy`" in output


def test_the_time_of_a_resumed_run_is_left_out(tmp_path):
    # 5 of the 20 steps were timed, in 10 s: 0.5 steps a second.
    rows = [evaluation_row(0, 0.5), training_row(20, 0.2), evaluation_row(20, 0.5), final_row(20, 10.0, steps_timed=5)]
    _, output = compared(write_state(tmp_path / "run", rows))
    assert table_cells(output)["training and evaluation time (s)"] == [""]
    assert "was resumed and timed only from there, so its time is left out" in output


def test_the_time_of_a_slow_run_survives_the_rounding_of_its_speed(tmp_path):
    # 20 steps in 13500 s are 0.00148 steps a second, which the trainer writes as 0.001: 13.5 steps.
    rows = [evaluation_row(0, 0.5), training_row(20, 0.2), evaluation_row(20, 0.5), final_row(20, 13500.0)]
    comparison, _ = compared(write_state(tmp_path / "run", rows))
    assert comparison["methods"]["run"]["train_runtime"]["mean"] == 13500.0


def test_differing_numbers_of_steps_are_a_warning(tmp_path):
    for seed, num_steps in enumerate((20, 30)):
        oblrpo_run(tmp_path / "a" / f"seed-{seed}", num_steps=num_steps)
    comparison, output = compared(tmp_path / "a", grpo_run(tmp_path / "b"))
    assert "warning: the runs differ in their number of steps (a 20 to 30, b 20)" in output
    assert table_cells(output)["steps"] == ["20 to 30", "20"]
    assert comparison["methods"]["a"]["steps"]["values"] == [20.0, 30.0]


def test_runs_that_can_be_compared_draw_no_note(tmp_path):
    comparison, _ = compared(oblrpo_run(tmp_path / "a"), grpo_run(tmp_path / "b"))
    assert comparison["notes"] == []


def test_json_holds_what_main_returns(tmp_path, picture):
    json_path = tmp_path / "not" / "there" / "compare.json"
    comparison = main([str(oblrpo_run(tmp_path / "a")), "--output", str(picture), "--json", str(json_path)])
    assert json.loads(json_path.read_text()) == comparison
    assert comparison["methods"]["a"]["logs"] == [str(tmp_path / "a" / "trainer_state.json")]


def test_the_picture_is_a_png_in_a_folder_that_is_made(tmp_path):
    picture = tmp_path / "new" / "folder" / "compare.png"
    main([str(oblrpo_run(tmp_path / "a")), str(grpo_run(tmp_path / "b")), "--output", str(picture)])
    header = picture.read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", header[16:24]) == (1800, 1170)  # 12 x 7.8 inches at 150 dots an inch
    assert 50_000 < picture.stat().st_size < 1_000_000


def test_drawing_leaves_the_settings_of_the_caller_alone(tmp_path, picture):
    with matplotlib.rc_context({"font.size": 7.0, "axes.grid": False}):
        settings = dict(matplotlib.rcParams)
        main([str(oblrpo_run(tmp_path / "a")), "--output", str(picture)])
        assert dict(matplotlib.rcParams) == settings


def test_a_bar_in_a_label_does_not_split_a_column_of_the_table(tmp_path):
    _, output = compared(f"a|b={oblrpo_run(tmp_path / 'a')}")
    assert output.splitlines()[0].endswith(r" a\|b |")


def test_each_panel_shows_the_metrics_that_were_logged_in_the_colour_of_the_method(tmp_path, picture, drawn):
    main([f"OBLR-PO={oblrpo_run(tmp_path / 'a')}", f"GRPO={grpo_run(tmp_path / 'b')}", "--output", str(picture)])
    reward, evaluation, multiplier, rho, moments, variance = drawn[0].axes
    blue, vermillion = "#0072B2", "#D55E00"
    colours = [{line.get_color() for line in axes.get_lines()} - {"#5f5f5f"} for axes in drawn[0].axes]
    assert colours == [{blue, vermillion}] * 2 + [{blue}] * 4
    absent = [axes for axes in drawn[0].axes if axes.get_xlabel() == "optimizer step (not logged by GRPO)"]
    assert absent == [multiplier, rho, moments, variance]
    assert [text.get_text() for text in evaluation.texts] == ["0.500", "0.600", "0.750"]
    assert list(evaluation.get_lines()[0].get_xydata().flatten()) == [0, 0.5, 20, 0.75]
    assert moments.get_yscale() == "log"
    assert len(moments.get_lines()) == 2
    assert [1.0, 1.0] in [list(line.get_ydata()) for line in variance.get_lines()]
    assert reward.get_title(loc="left") == "Training reward"
    assert all(axes.get_ylabel() for axes in drawn[0].axes)


def test_close_final_values_are_written_apart_and_equal_ones_once_in_grey(tmp_path, picture, drawn):
    finals = {"a": 0.750, "b": 0.751, "c": 0.752, "d": 0.752}
    main([*(str(grpo_run(tmp_path / name, final=final)) for name, final in finals.items()), "--output", str(picture)])
    texts = drawn[0].axes[1].texts
    assert [text.get_text() for text in texts] == ["0.500", "0.750", "0.751", "0.752"]
    assert [text.get_color() == "#5f5f5f" for text in texts] == [True, False, False, True]
    boxes = [text.get_window_extent() for text in texts[1:]]
    assert boxes[0].y1 <= boxes[1].y0
    assert boxes[1].y1 <= boxes[2].y0
    assert not any(text.get_annotation_clip() for text in texts)  # the uppermost may be above the axes


@pytest.mark.parametrize(("num_values", "window"), [(5, 1), (24, 3), (60, 5), (6000, 25)])
def test_the_moving_average_is_odd_and_follows_the_shortest_run(num_values, window):
    rows = [{"step": step, "reward": 0.0} for step in range(num_values)]
    short = RunLog(path=Path("a"), num_steps=num_values, rows=rows)
    long = RunLog(
        path=Path("b"),
        num_steps=num_values + 100,
        rows=[{"step": step, "reward": 0.0} for step in range(num_values + 100)],
    )
    assert smoothing_window({"long": [long], "short": [short]}) == window


def test_the_key_says_what_the_band_of_each_method_is(tmp_path, picture, drawn):
    for seed in range(5):
        oblrpo_run(tmp_path / "five" / f"seed-{seed}")
    for seed in range(2):
        oblrpo_run(tmp_path / "_two$" / f"seed-{seed}")
    main(
        [
            *(str(tmp_path / name) for name in ("five", "_two$")),
            str(grpo_run(tmp_path / "one")),
            "--output",
            str(picture),
        ]
    )
    assert [text.get_text() for text in drawn[0].legends[0].get_texts()] == [
        "five (mean of 5 seeds, band: 95 % bootstrap interval)",
        "_two$ (mean of 2 seeds, band: min to max)",
        "one (1 seed)",
    ]
    bands = [len(axes.collections) for axes in drawn[0].axes]
    assert bands == [2, 2, 2, 2, 4, 6]  # two methods with several seeds, times one, two and three metrics


def test_panels_that_nothing_was_logged_for_say_so(tmp_path, picture, drawn):
    main([str(grpo_run(tmp_path / "grpo")), "--output", str(picture)])
    texts = [[text.get_text() for text in axes.texts] for axes in drawn[0].axes]
    assert ["not logged by any run" in text for text in texts] == [False, False, True, True, True, True]


def test_the_band_of_few_seeds_is_their_range_and_of_many_a_bootstrap_interval():
    assert band([0.3, 0.1, 0.2], num_seeds=3) == (0.1, 0.3)
    # The mean of 5 draws from (0, 0, 0, 0, 1) is X / 5 with X binomial (5, 0.2): P(X = 0) = 0.33, P(X <= 2) = 0.94 and
    # P(X <= 3) = 0.99, so its 2.5 % and 97.5 % quantiles are 0 and 3 / 5.
    assert band([0.0, 0.0, 0.0, 0.0, 1.0], num_seeds=5) == pytest.approx((0.0, 0.6))
    assert [band_name(4), band_name(5)] == ["min to max", "95 % bootstrap interval"]


def test_smoothing_is_a_centred_mean_of_the_values_that_exist():
    # (0 + 3) / 2, (0 + 3 + 6) / 3, (3 + 6 + 0) / 3, (6 + 0) / 2
    assert smooth([0.0, 3.0, 6.0, 0.0], window=3) == [1.5, 3.0, 3.0, 3.0]
    assert smooth([0.0, 3.0, 6.0, 0.0], window=1) == [0.0, 3.0, 6.0, 0.0]


def test_a_curve_is_the_mean_over_seeds_until_the_first_of_them_ends():
    runs = [
        RunLog(path=Path("a"), num_steps=4, rows=[{"step": step, "reward": 0.0} for step in (1, 2, 3, 4)]),
        RunLog(path=Path("b"), num_steps=3, rows=[{"step": step, "reward": 1.0} for step in (1, 3)]),
        RunLog(path=Path("c"), num_steps=3, rows=[{"step": 3, "loss": 0.0}]),
    ]
    curve = seed_curve(runs, "reward")
    assert curve is not None
    assert curve.steps == [1, 2, 3]
    assert curve.mean == [0.5, 0.0, 0.5]
    assert (curve.low, curve.high) == ([0.0, 0.0, 0.0], [1.0, 0.0, 1.0])
    assert seed_curve(runs, "lr_multiplier") is None


def test_of_two_evaluations_at_one_step_the_later_stands():
    rows = [{"step": 5, "eval_accuracy": 0.1}, {"step": 0, "eval_accuracy": 0.3}, {"step": 5, "eval_accuracy": 0.2}]
    assert list(RunLog(path=Path("a"), num_steps=5, rows=rows).series("eval_accuracy").items()) == [(0, 0.3), (5, 0.2)]


def test_no_runs_is_an_error_with_an_example():
    with pytest.raises(
        SystemExit, match="no runs given: name at least one output directory of a trainer, for example"
    ):
        main([])


BROKEN_STATES = {
    "": r"not valid JSON \(Expecting value.*\), perhaps cut off while it was written; restore it, or remove it",
    '{"global_step": 3, "log_history": [{"st': "not valid JSON .* perhaps cut off while it was written",
    "[]": "not the state of a trainer, it has no list `log_history`; restore it",
    '{"global_step": 3}': "not the state of a trainer, it has no list `log_history`",
    '{"log_history": [{"step": 1}]}': "not the state of a trainer, it has no whole number `global_step`",
    '{"global_step": 3, "log_history": [{"step": 1}, {"reward": 1}]}': "row 1 of log_history has no `step`",
    '{"global_step": 0, "log_history": []}': "log_history is empty, so .*; train for at least `logging_steps` steps",
}


@pytest.mark.parametrize("content", BROKEN_STATES)
def test_a_broken_state_is_an_error_with_path_reason_and_remedy(tmp_path, picture, content):
    (tmp_path / "trainer_state.json").write_text(content)
    with pytest.raises(SystemExit, match=rf"^compare: .*trainer_state\.json: {BROKEN_STATES[content]}"):
        main([str(tmp_path), "--output", str(picture)])
    assert not picture.exists()


def test_bytes_that_are_not_text_are_an_error(tmp_path):
    (tmp_path / "trainer_state.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(SystemExit, match=r"trainer_state\.json: not valid JSON \('utf-8' codec can't decode"):
        main([str(tmp_path)])


def test_a_folder_without_a_state_is_an_error_that_says_how_to_get_one(tmp_path):
    (tmp_path / "checkpoint-5").mkdir()
    with pytest.raises(
        SystemExit, match=r"holds neither trainer_state\.json nor checkpoint-\*.*call `trainer\.save_state\(\)`"
    ):
        main([str(tmp_path)])


def test_a_seed_without_a_state_is_an_error_that_names_it(tmp_path):
    oblrpo_run(tmp_path / "seed-0")
    (tmp_path / "seed-1").mkdir()
    with pytest.raises(SystemExit, match="seed-1: holds neither"):
        main([str(tmp_path)])


def test_a_run_beside_seeds_is_refused_as_ambiguous(tmp_path):
    oblrpo_run(tmp_path)
    oblrpo_run(tmp_path / "seed-0")
    with pytest.raises(
        SystemExit, match=r"holds both a run of its own and `seed-\*` runs; name the one that is meant"
    ):
        main([str(tmp_path)])


def test_paths_that_are_not_folders_are_refused(tmp_path):
    run = oblrpo_run(tmp_path / "run")
    with pytest.raises(SystemExit, match="missing: does not exist; name a directory"):
        main([str(tmp_path / "missing")])
    with pytest.raises(SystemExit, match=r"trainer_state\.json: is a file; name a directory"):
        main([str(run / "trainer_state.json")])


def test_a_run_given_twice_is_refused(tmp_path):
    run = oblrpo_run(tmp_path / "run")
    with pytest.raises(SystemExit, match="given twice, it would count as two seeds; name every run once"):
        main([f"A={run}", f"B={run}/../run"])


@pytest.mark.parametrize("argument", ["=runs/a", " =runs/a", "A="])
def test_an_empty_label_or_path_is_refused(argument):
    with pytest.raises(SystemExit, match="an empty label or path; write `LABEL=PATH`, or the path alone"):
        main([argument])


def test_more_methods_than_colours_are_refused_after_the_table(tmp_path, picture, capsys):
    with pytest.raises(SystemExit, match="8 methods are too many to tell apart; name at most 7"):
        main([*(str(grpo_run(tmp_path / f"m{index}")) for index in range(8)), "--output", str(picture)])
    assert table_cells(capsys.readouterr().out)["gain"] == ["0.100"] * 8


def test_without_matplotlib_the_table_is_printed_and_the_error_names_the_extra(tmp_path, picture, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit, match=r"the picture needs matplotlib .*; run `pip install 'oblr_trl\[demo\]'`"):
        main([str(oblrpo_run(tmp_path / "run")), "--output", str(picture)])
    assert table_cells(capsys.readouterr().out)["gain"] == ["0.250"]


def test_an_output_that_is_not_a_png_is_refused_before_anything_is_read(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main([str(tmp_path / "missing"), "--output", str(tmp_path / "compare.pdf")])
    assert "the picture is a PNG file; give it a name that ends in .png" in capsys.readouterr().err


def test_an_output_below_a_file_is_an_error_with_a_remedy(tmp_path):
    run = oblrpo_run(tmp_path / "run")
    with pytest.raises(
        SystemExit, match=r"trainer_state\.json.*; give --output and --json names in a folder that can be"
    ):
        main([str(run), "--output", str(run / "trainer_state.json" / "compare.png")])


def test_the_module_runs_as_a_script_and_writes_beside_the_caller(tmp_path, monkeypatch, capsys):
    oblrpo_run(tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["compare", "run"])
    monkeypatch.delitem(sys.modules, "oblr_trl.scripts.compare")
    runpy.run_module("oblr_trl.scripts.compare", run_name="__main__")
    assert capsys.readouterr().out.endswith("picture: compare.png\n")
    assert (tmp_path / "compare.png").is_file()
