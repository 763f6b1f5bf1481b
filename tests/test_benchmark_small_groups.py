"""The study of small groups: its statistics against arithmetic, its grids, and real runs of an untrained policy."""

import json
import math

import pytest

from benchmarks import rate_grids, small_groups, small_groups_summary
from benchmarks.sections import small_groups as section
from tests.tiny_policies import install_tiny_policy


def made(curve, pass_at_8=None, learning_rate=1e-6):
    return {
        "accuracies": curve,
        "pass_at_8": pass_at_8 or curve,
        "cpu_seconds": [0.0, 10.0 * curve[-1]],
        "logged": {"advantage/live_fraction": curve[0]},
        "spec": {"learning_rate": learning_rate},
    }


@pytest.mark.parametrize(
    ("level", "expected"),
    [(0.1, 0.0), (0.2, 0.0), (0.3, 0.25), (0.35, 0.375), (0.4, 0.5), (0.5, 1.0), (0.51, math.inf)],
)
def test_the_part_until_a_level_is_interpolated(level, expected):
    assert small_groups_summary.part_until([0.2, 0.4, 0.5], level) == pytest.approx(expected)


def test_a_curve_that_falls_again_has_had_its_level():
    assert small_groups_summary.part_until([0.2, 0.6, 0.1], 0.4) == pytest.approx(0.25)


def test_the_part_of_the_rollouts_is_that_of_mean_curves_over_paired_seeds():
    ours, theirs = [made([0.0, 0.4]), made([0.0, 0.8])], [made([0.0, 0.3]), made([0.0, 0.3])]
    # 0.3 of 0.6; one seed alone gives 0.3 / 0.4 or 0.3 / 0.8.
    expected = {"mean": 0.5, "low": 0.375, "high": 0.75}
    assert small_groups_summary.part_of_rollouts(ours, theirs) == pytest.approx(expected)
    # The first seed alone does not get to 0.5.
    higher = [made([0.0, 0.5]), made([0.0, 0.5])]
    found = small_groups_summary.part_of_rollouts(ours, higher)
    assert found["high"] is None
    assert (found["mean"], found["low"]) == pytest.approx((0.5 / 0.6, 0.5 / 0.8))


def test_pass_at_8_is_read_where_the_accuracy_is_equal():
    runs = [made([0.2, 0.4, 0.6], pass_at_8=[0.5, 0.7, 0.8])]
    assert small_groups_summary.pass_at_8_when(runs, 0.5) == pytest.approx(0.75)
    assert small_groups_summary.pass_at_8_when(runs, 0.7) is None


def test_the_strongest_control_ends_highest():
    cells = {
        ("ours", 1): [made([0.1, 0.9])],
        ("rloo_kl", 2): [made([0.1, 0.3])],
        ("grpo", 4): [made([0.1, 0.5])],
    }
    summary = small_groups_summary.summarise(cells)
    assert summary["strongest"] == ["grpo", 4]
    assert [row["part_of_rollouts"]["mean"] for row in summary["rows"]] == [pytest.approx(0.5), None, 1.0]
    assert [row["cpu_seconds"]["mean"] for row in summary["rows"]] == [9.0, 3.0, 5.0]
    assert section.markdown(
        {"summary": {"task": summary}, "settings": {"num_steps": 1, "evaluation_seeds": 1, "tuning_seeds": 1, "test_size": 1}}
    ).count("\n| ") == 5  # fmt: skip


def test_graded_rewards_are_compared_by_their_mean_and_shown_with_the_accuracy():
    cells = {
        ("ours", 1): [made([0.1, 0.5]) | {"rewards": [0.2, 0.9]}],
        ("grpo", 4): [made([0.1, 0.7]) | {"rewards": [0.2, 0.6]}],
    }
    summary = small_groups_summary.summarise(cells)
    assert (summary["measure"], summary["start"]) == ("mean reward", 0.2)
    assert summary["rows"][0]["part_of_rollouts"]["mean"] == pytest.approx(0.4 / 0.7)
    settings = {"num_steps": 1, "evaluation_seeds": 1, "tuning_seeds": 1, "test_size": 1}
    table = section.markdown({"summary": {"task": summary}, "settings": settings})
    assert "| final mean reward |" in table
    assert "| final accuracy |" in table
    assert "| OBLR-PO | 64 x 1 | 0.900 | 0.550 |" in table
    assert "| 0.500 | 0.10 |" in table  # the accuracy, then the live rollouts


def test_grids_are_extended_until_their_best_rates_have_neighbours():
    asked = []

    def measure(rates):
        asked.append({case: list(grid) for case, grid in rates.items()})
        peaks = {"one": 3.5, "two": 1.1}
        return {case: {rate: -abs(rate - peaks[case]) for rate in grid} for case, grid in rates.items()}

    found = rate_grids.extended({"one": rate_grids.around(1.0), "two": rate_grids.around(1.0)}, measure)

    assert asked == [
        {"one": [0.5, 1.0, 2.0], "two": [0.5, 1.0, 2.0]},
        {"one": [0.5, 1.0, 2.0, 4.0], "two": [0.5, 1.0, 2.0]},
        {"one": [0.5, 1.0, 2.0, 4.0, 8.0], "two": [0.5, 1.0, 2.0]},
    ]
    assert {case: rate_grids.best(gains) for case, gains in found.items()} == {"one": 4.0, "two": 1.0}


@pytest.mark.slow
def test_the_study_runs_and_resumes(tmp_path, monkeypatch):
    install_tiny_policy(monkeypatch, tmp_path, vocab_size=130)
    monkeypatch.setattr(small_groups, "ROLLOUTS", 8)
    monkeypatch.setattr(
        small_groups, "TASKS", {"new": {"policy": "tiny"}, "graded": {"policy": "tiny", "train_size": 8}}
    )
    monkeypatch.setattr(small_groups, "GROUP_SIZES", dict.fromkeys(small_groups.GROUP_SIZES, (2, 4)))
    args = small_groups.SmallGroupsArguments(
        tasks=["new", "graded"],
        evaluation_seeds=1,
        num_steps=10,
        num_workers=0,
        test_size=8,
        runs=str(tmp_path / "runs"),
        output=str(tmp_path / "record.json"),
    )

    small_groups.main(args)
    record = json.loads((tmp_path / "record.json").read_text())

    methods = {task: {row["method"] for row in part["rows"]} for task, part in record["summary"].items()}
    assert methods["graded"] == {*small_groups.GROUP_SIZES, *small_groups.TUNED.values()}
    assert methods["graded"] - methods["new"] == {"ours_scaled"}
    assert section.figure(record).axes
    monkeypatch.setattr("benchmarks.learning_runs.run", lambda spec: pytest.fail("made again"))
    small_groups.main(args)
    assert json.loads((tmp_path / "record.json").read_text())["summary"] == record["summary"]
