"""`oblr_trl.scripts.compare` and the modules below it, on logs with the keys that TRL 1.16 writes."""

import json
import math
import sys
from pathlib import Path

import pytest

from oblr_trl import metrics
from oblr_trl.runs.logs import RunLog, read_methods
from oblr_trl.runs.summary import seed_curve, smooth
from oblr_trl.runs.tables import markdown_table
from oblr_trl.scripts.compare import compare, format_table, main

matplotlib = pytest.importorskip("matplotlib")

OF_OBLRPO = (metrics.LR_MULTIPLIER, metrics.RHO, metrics.VARIANCE_VS_LEAVE_ONE_OUT)


def evaluated(step, accuracy, reward=0.5):
    """An evaluation row; `eval_accuracy` is there only if it was measured."""
    row = {"eval_reward": reward, "eval_reward_std": 0.43, "eval_runtime": 0.07, "step": step}
    return row if accuracy is None else {**row, "eval_accuracy": accuracy}


def trained(step, reward, *of_oblrpo, learning_rate=8e-7):
    """A training row as GRPO writes it, and with the values of `OF_OBLRPO` as OBLR-PO does."""
    row = {
        "completions/mean_terminated_length": None,  # TRL writes null if no completion of the step terminated
        "learning_rate": learning_rate,
        "reward": reward,
        "reward_std": 0.44,
        "step_time": 1.5,
        "step": step,
    }
    if of_oblrpo:
        row |= {metrics.SIGNAL: 0.01, metrics.NOISE: 1.0, metrics.NOISE_PER_ROLLOUT: 8.0, metrics.LIVE_FRACTION: 0.75}
        row |= {metrics.LIVE_FRACTION_GROUP_MEAN: 0.5, metrics.KL: 0.01, metrics.KL_TARGET: 0.012}
        row |= dict(zip(OF_OBLRPO, of_oblrpo, strict=True))
        row |= dict.fromkeys((metrics.VARIANCE_VS_GROUP_MEAN, metrics.VARIANCE_VS_LENGTH_WEIGHTED), of_oblrpo[2])
    return row


def write_state(directory, rows, num_steps=20):
    directory.mkdir(parents=True, exist_ok=True)
    state = {"best_metric": None, "global_step": num_steps, "log_history": rows, "max_steps": num_steps}
    (directory / "trainer_state.json").write_text(json.dumps(state, indent=2, sort_keys=True))
    return directory


def oblrpo_run(directory, *, final=0.75, num_steps=20):
    """A run from accuracy 0.5 to `final`: reward 0 in the first half of its steps and 0.5 in the second."""
    rows = [evaluated(0, 0.5)]
    for step in range(1, num_steps + 1):
        multiplier = 0.1 if step % 2 else 0.3
        reward = 0.5 if step > num_steps // 2 else 0.0
        rows.append(trained(step, reward, multiplier, 0.2, 0.6, learning_rate=3e-5 * multiplier))
    return write_state(directory, [*rows, evaluated(num_steps, final)], num_steps)


def grpo_run(directory):
    rows = [evaluated(0, 0.5), *(trained(step, 0.4) for step in range(1, 21)), evaluated(20, 0.6)]
    return write_state(directory, rows)


def log(path, num_steps=4, **series):
    """A log in memory; each metric by its steps."""
    rows = [{"step": step, name: value} for name, values in series.items() for step, value in values.items()]
    return RunLog(path=Path(path), num_steps=num_steps, rows=rows)


def compared(*arguments):
    """What `main` does before it draws: the comparison, and the rows of its table by their name."""
    comparison = compare(read_methods([str(argument) for argument in arguments]))
    return comparison, table_cells(format_table(comparison))


def table_cells(text):
    rows = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("|") and "---" not in line]
    return {row[0].strip(): [cell.strip() for cell in row[1:]] for row in rows}


@pytest.fixture
def figure(tmp_path):
    return tmp_path / "compare.png"


# The table


def test_table_of_one_run_equals_the_numbers_worked_by_hand(tmp_path, figure, capsys):
    json_path = tmp_path / "not" / "there" / "compare.json"
    runs = [f"OBLR-PO={oblrpo_run(tmp_path / 'a')}", f"GRPO={grpo_run(tmp_path / 'b')}"]
    comparison = main([*runs, "--output", str(figure), "--json", str(json_path)])
    assert table_cells(capsys.readouterr().out) == {
        "": ["OBLR-PO", "GRPO"],
        "seeds (±: deviation)": ["1", "1"],
        "steps": ["20", "20"],
        "held-out accuracy, start": ["0.500", "0.500"],
        "held-out accuracy, final": ["0.750", "0.600"],
        "gain": ["0.250", "0.100"],
        # Steps 11 to 20 of 20: 0.5 each, and none of the zeros of steps 1 to 10.
        "training reward, last 10 steps": ["0.500", "0.400"],
        # 3e-5 times 0.1 at the 10 odd steps and 0.3 at the 10 even ones: (3e-6 + 9e-6) / 2; GRPO's is 8e-7 throughout.
        "effective learning rate, mean": ["6.00e-06", "8.00e-07"],
        # GRPO does not log any of the next five.
        "learning-rate multiplier, mean": ["0.200", ""],
        "rho, mean": ["0.200", ""],
        "completions with an advantage, mean": ["0.750", ""],
        "noise per completion, mean": ["8", ""],
        "variance / leave-one-out's, mean": ["0.600", ""],
        "time per step (s), mean": ["1.50", "1.50"],
    }
    assert json.loads(json_path.read_text()) == comparison
    assert comparison["evaluation_metric"] == "eval_accuracy"
    assert comparison["methods"]["OBLR-PO"]["logs"] == [str(tmp_path / "a" / "trainer_state.json")]


def test_seeds_are_summarised_by_mean_and_sample_standard_deviation(tmp_path):
    for seed, final in enumerate((0.6, 0.7, 0.8)):
        oblrpo_run(tmp_path / "oblrpo" / f"seed-{seed}", final=final)
    comparison, cells = compared(tmp_path / "oblrpo")
    entry = comparison["methods"]["oblrpo"]
    assert entry["num_seeds"] == 3
    assert entry["final_evaluation"]["values"] == [0.6, 0.7, 0.8]
    # Mean 0.7; squared deviations 0.01 + 0 + 0.01 over n - 1 = 2 give 0.01, whose root is 0.1.
    assert entry["final_evaluation"]["mean"] == pytest.approx(0.7)
    assert entry["final_evaluation"]["std"] == pytest.approx(0.1)
    assert (cells["held-out accuracy, final"], cells["gain"]) == (["0.700 ± 0.100"], ["0.200 ± 0.100"])


def test_a_quantity_that_only_one_seed_knows_has_no_spread(tmp_path):
    _, cells = compared(f"M={oblrpo_run(tmp_path / 'a')}", f"M={grpo_run(tmp_path / 'b')}")
    assert cells["rho, mean"] == ["0.200"]


def test_nulls_and_non_finite_numbers_count_as_not_logged(tmp_path, figure, capsys):
    rows = [
        evaluated(1, 0.5),  # not the start
        trained(1, 0.2, 0.1, None, math.nan),
        trained(2, None, None, None, math.inf),
        trained(3, 0.4, 0.3, None, 0.5),
        {**evaluated(3, None), "eval_accuracy": None},
    ]
    run = write_state(tmp_path / "run", rows, num_steps=3)
    comparison = main([str(run), "--output", str(figure), "--json", str(tmp_path / "compare.json")])
    entry = comparison["methods"]["run"]
    assert entry["final_reward"]["mean"] == pytest.approx(0.3)  # (0.2 + 0.4) / 2
    assert entry["lr_multiplier"]["mean"] == pytest.approx(0.2)  # (0.1 + 0.3) / 2
    assert entry["variance_ratio"]["mean"] == 0.5
    assert entry["rho"] == {"mean": None, "std": None, "values": [None]}
    evaluations = ("start_evaluation", "final_evaluation", "evaluation_gain")
    assert [entry[name]["mean"] for name in evaluations] == [None, 0.5, None]
    output = capsys.readouterr().out
    assert table_cells(output)["rho, mean"] == table_cells(output)["gain"] == [""]
    assert "nan" not in (output + (tmp_path / "compare.json").read_text()).lower()
    assert "None" not in output


def test_of_two_evaluations_at_one_step_the_later_stands():
    rows = [{"step": 5, "eval_accuracy": 0.1}, {"step": 0, "eval_accuracy": 0.3}, {"step": 5, "eval_accuracy": 0.2}]
    assert list(RunLog(path=Path("a"), num_steps=5, rows=rows).series("eval_accuracy").items()) == [(0, 0.3), (5, 0.2)]


def test_without_accuracy_in_every_evaluated_run_the_reward_is_compared_and_named(tmp_path, figure, capsys, drawn):
    rows = [evaluated(0, None, reward=0.1), trained(1, 0.2), evaluated(1, None, reward=0.4)]
    write_state(tmp_path / "plain", rows, num_steps=1)
    comparison = main([str(tmp_path / "plain"), str(oblrpo_run(tmp_path / "ours")), "--output", str(figure)])
    assert comparison["evaluation_metric"] == "eval_reward"
    output = capsys.readouterr().out
    assert table_cells(output)["held-out reward, start"] == ["0.100", "0.500"]
    assert table_cells(output)["held-out reward, final"] == ["0.400", "0.500"]
    assert drawn[0].axes[1].get_title(loc="left") == "Held-out reward"


def test_differing_numbers_of_steps_are_seen_and_a_bar_splits_no_column(tmp_path):
    for seed, num_steps in enumerate((20, 30)):
        oblrpo_run(tmp_path / "a" / f"seed-{seed}", num_steps=num_steps)
    comparison, cells = compared(tmp_path / "a", f"b|c={grpo_run(tmp_path / 'b')}")
    assert format_table(comparison).splitlines()[0].endswith(r" b\|c |")
    assert cells["steps"] == ["25 ± 7", "20"]
    assert comparison["methods"]["a"]["steps"]["values"] == [20.0, 30.0]


# Which logs are read


@pytest.mark.parametrize(
    ("steps", "arguments", "expected"),
    [
        # Runs with the same label are seeds of one method, in the order given; folders are in the order of their numbers.
        ({"x": 20, "y": 20, "z": 20}, ["A=y", "z", "A=x"], {"A": ["y", "x"], "z": ["z"]}),
        ({"o/seed-10": 20, "o/seed-2": 20, "o/seed-1": 20}, ["o"], {"o": ["seed-1", "seed-2", "seed-10"]}),
        # A run named by its seed is called after the method; a label ends at the first equals sign.
        ({"o/seed-0": 20}, ["o/seed-0"], {"o": ["seed-0"]}),
        ({"lr=1e-3": 20}, ["SGD=lr=1e-3"], {"SGD": ["lr=1e-3"]}),
        # The newest checkpoint (as text, "5" is the largest) under a name that a trainer gives, where no state was saved.
        ({"o/checkpoint-5": 5, "o/checkpoint-100": 100, "o/checkpoint-best": 300}, ["o"], {"o": ["checkpoint-100"]}),
        ({"o": 20, "o/checkpoint-20": 20}, ["o"], {"o": ["o"]}),
    ],
)
def test_methods_seeds_and_checkpoints_are_found_by_their_folders(tmp_path, monkeypatch, steps, arguments, expected):
    monkeypatch.chdir(tmp_path)
    for folder, num_steps in steps.items():
        oblrpo_run(Path(folder), num_steps=num_steps)
    Path("o/checkpoint-200").mkdir(parents=True)  # interrupted while it was saved
    methods = read_methods(arguments)
    assert {label: [run.path.parent.name for run in runs] for label, runs in methods.items()} == expected
    assert list(methods) == list(expected)


# The figure


def test_each_panel_shows_the_metrics_that_were_logged_in_the_colour_of_the_method(tmp_path, drawn):
    figure = tmp_path / "new" / "folder" / "compare.png"
    with matplotlib.rc_context({"font.size": 7.0, "axes.grid": False}):
        settings = dict(matplotlib.rcParams)
        main([f"OBLR-PO={oblrpo_run(tmp_path / 'a')}", f"GRPO={grpo_run(tmp_path / 'b')}", "--output", str(figure)])
        assert dict(matplotlib.rcParams) == settings  # the caller's are left alone
    assert figure.read_bytes().startswith(b"\x89PNG")
    reward, evaluation, _, movement, _, moments, live, variance = drawn[0].axes
    blue, vermillion = "#0072B2", "#D55E00"
    colours = [{line.get_color() for line in axes.get_lines()} - {"#5f5f5f"} for axes in drawn[0].axes]
    assert colours == [{blue, vermillion}] * 3 + [{blue}] * 5
    assert list(evaluation.get_lines()[0].get_xydata().flatten()) == [0, 0.5, 20, 0.75]
    assert moments.get_yscale() == "log"
    assert [text.get_text() for text in moments.get_legend().get_texts()] == ["signal", "noise"]
    assert [len(axes.get_lines()) for axes in (movement, moments, live)] == [2, 2, 2]
    assert [1.0, 1.0] in [list(line.get_ydata()) for line in variance.get_lines()]
    assert reward.get_title(loc="left") == "Training reward"
    assert all(axes.get_ylabel() for axes in drawn[0].axes)
    assert {axes.get_xlabel() for axes in drawn[0].axes} == {"optimizer step"}


def test_the_figure_counts_completions_where_it_is_told_how_many_a_step_has(tmp_path, figure, drawn):
    main([str(oblrpo_run(tmp_path / "a")), "--rollouts_per_step", "128", "--output", str(figure)])
    drawn[0].canvas.draw()
    for axes in drawn[0].axes:
        assert axes.get_xlabel() == "completions"
        assert [label.get_text() for label in axes.get_xticklabels()] == [
            f"{128 * step:g}" for step in axes.get_xticks()
        ]


def test_the_legend_names_the_methods_and_several_seeds_have_a_band(tmp_path, figure, drawn):
    for name, seed in (("three", 0), ("three", 1), ("three", 2), ("_two$", 0), ("_two$", 1)):
        oblrpo_run(tmp_path / name / f"seed-{seed}")
    grpo_run(tmp_path / "one")
    main([*(str(tmp_path / name) for name in ("three", "_two$", "one")), "--output", str(figure)])
    texts = [text.get_text().replace("\\", "") for text in drawn[0].legends[0].get_texts()]
    assert texts == ["three", "_two$", "one"]
    bands = [len(axes.collections) for axes in drawn[0].axes]
    # Two methods with several seeds, times one, two and three metrics.
    assert bands == [2, 2, 2, 4, 2, 4, 4, 6]


def test_panels_that_nothing_was_logged_for_say_so(tmp_path, figure, drawn):
    main([str(grpo_run(tmp_path / "grpo")), "--output", str(figure)])
    texts = [[text.get_text() for text in axes.texts] for axes in drawn[0].axes]
    assert ["not logged" in text for text in texts] == [False] * 3 + [True] * 5


def test_smoothing_is_a_centred_mean_of_the_values_that_exist():
    # (0 + 3) / 2, (0 + 3 + 6) / 3, (3 + 6 + 0) / 3, (6 + 0) / 2
    assert smooth([0.0, 3.0, 6.0, 0.0], window=3) == [1.5, 3.0, 3.0, 3.0]
    assert smooth([0.0, 3.0, 6.0, 0.0], window=1) == [0.0, 3.0, 6.0, 0.0]


def test_a_curve_is_mean_and_range_over_seeds_until_the_first_of_them_ends():
    runs = [
        log("a", reward=dict.fromkeys((1, 2, 3, 4), 0.0)),
        log("b", reward={1: 1.0, 3: 1.0}),
        log("c", loss={3: 0.0}),
    ]
    curve = seed_curve(runs, "reward")
    assert (curve.steps, curve.mean) == ([1, 2, 3], [0.5, 0.0, 0.5])
    assert (curve.low, curve.high) == ([0.0, 0.0, 0.0], [1.0, 0.0, 1.0])
    assert seed_curve(runs, "lr_multiplier") is None


# Errors


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"global_step": 3, "log_history": [{"st', "not the state of a trainer .*; restore it, or remove it"),
        ("[]", "not the state of a trainer"),
        ('{"global_step": 3}', "not the state of a trainer .*log_history"),
        ('{"global_step": 0, "log_history": []}', "log_history is empty; train for at least `logging_steps` steps"),
    ],
)
def test_a_broken_state_is_an_error_with_path_reason_and_remedy(tmp_path, figure, content, message):
    (tmp_path / "trainer_state.json").write_text(content)
    with pytest.raises(SystemExit, match=rf"^compare: .*trainer_state\.json: {message}"):
        main([str(tmp_path), "--output", str(figure)])
    assert not figure.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing"], "missing: holds neither"),
        (["empty"], r"empty: holds neither trainer_state\.json nor checkpoint-\*.*call `trainer\.save_state\(\)`"),
        (["partial"], "seed-1: holds neither"),
        (["run", "--output", "run/trainer_state.json/compare.png"], "compare: .*trainer_state.json"),
    ],
)
def test_what_cannot_be_compared_is_an_error_with_path_reason_and_remedy(tmp_path, monkeypatch, arguments, message):
    for folder in ("run", "partial/seed-0"):
        oblrpo_run(tmp_path / folder)
    for folder in ("empty/checkpoint-5", "partial/seed-1"):
        (tmp_path / folder).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=message):
        main(arguments)


def test_more_methods_than_colours_are_refused_after_the_table(tmp_path, figure, capsys):
    with pytest.raises(SystemExit, match="8 methods are too many to tell apart; name at most 7"):
        main([*(str(grpo_run(tmp_path / f"m{index}")) for index in range(8)), "--output", str(figure)])
    assert table_cells(capsys.readouterr().out)["gain"] == ["0.100"] * 8


def test_without_matplotlib_the_table_is_printed_all_the_same(tmp_path, figure, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "oblr_trl.runs.figure", None)
    with pytest.raises(SystemExit, match="compare: "):
        main([str(oblrpo_run(tmp_path / "run")), "--output", str(figure)])
    assert table_cells(capsys.readouterr().out)["gain"] == ["0.250"]


def test_a_column_of_single_characters_is_still_a_table():
    """A delimiter needs a hyphen: without one the whole table is not rendered."""
    assert markdown_table([["benchmark", "k"], ["gsm8k", "1"]]).splitlines()[1] == "| --------- | -: |"
