"""The signatures on logs written by hand: each is found where it is, and only there."""

import json
import math

import pytest

from oblr_trl.diagnosis import diagnose, format_findings
from oblr_trl.scripts import diagnose as script

# What a healthy run logs, at every one of ten steps.
HEALTHY = {
    "reward": 0.5,
    "reward_std": 0.5,
    "frac_reward_zero_std": 0.1,
    "baseline/shift": 0.2,
    "baseline/effective_group_size": 4.0,
    "gradient_snr/ratio": 0.2,
    "lr_multiplier": 0.2,
    "clip_ratio/region_mean": 0.0,
    "sampling/sampling_logp_difference/mean": 0.01,
    "grad_norm": 1.0,
    "score/pass_time": 1.0,
    "step_time": 4.0,
}


def log(num_steps=10, **changed):
    """Rows of a run; `changed` holds a number, or a list with a number for each step."""
    rows = []
    for i in range(num_steps):
        # A ratio that varies, as every baseline's but GRPO's does.
        row = HEALTHY | {"step": i + 1, "variance_ratio/leave_one_out": 0.6 + 0.01 * i}
        for name, value in changed.items():
            row[name] = value[i] if isinstance(value, list) else value
        rows.append(row)
    return rows


def names(rows):
    return [finding.name for finding in diagnose(rows)]


def test_a_healthy_log_has_no_findings():
    assert diagnose(log()) == []
    assert "no proof of health" in format_findings([])


@pytest.mark.parametrize(
    ("changed", "name", "metric"),
    [
        ({"gradient_snr/ratio": 0.0, "lr_multiplier": 0.05}, "Learning-rate collapse", "gradient_snr/ratio"),
        ({"baseline/shift": [0.2] * 9 + [0.7]}, "Exploding baseline", "baseline/shift"),
        ({"grad_norm": [1.0] * 9 + [11.0]}, "Exploding baseline", "grad_norm"),
        (
            {"variance_ratio/leave_one_out": [0.9, 1.3] * 5},
            "A baseline noisier than the plain mean",
            "variance_ratio/leave_one_out",
        ),
        (
            {"variance_ratio/leave_one_out": 0.765625},
            "A baseline that sees its own completion",
            "variance_ratio/leave_one_out",
        ),
        ({"frac_reward_zero_std": 0.6}, "Zero-variance groups", "frac_reward_zero_std"),
        ({"clip_ratio/region_mean": [0.0, 0.2] * 5}, "Off-policy drift", "clip_ratio/region_mean"),
        (
            {"sampling/sampling_logp_difference/mean": 0.5},
            "Off-policy drift",
            "sampling/sampling_logp_difference/mean",
        ),
    ],
)
def test_a_signature_is_found_by_its_metric_and_nothing_else_is(changed, name, metric):
    assert [(finding.name, finding.metric) for finding in diagnose(log(**changed))] == [(name, metric)]


def test_a_reward_that_falls_and_stays_down_is_a_collapse():
    # Means over 3 values: 0.5 at best, 0.1 at the end; 0.4 is more than half of the deviation of 0.5.
    assert names(log(reward=[0.5] * 5 + [0.1] * 5)) == ["Policy collapse"]
    # What else its log shows is a consequence.
    assert names(log(reward=[0.5] * 5 + [0.1] * 5, frac_reward_zero_std=1.0)) == ["Policy collapse"]
    assert names(log(reward=[0.5] * 5 + [0.3] * 5)) == []
    assert names(log(reward=[0.1] * 5 + [0.5] * 5)) == []
    assert names(log(reward=[0.5] * 5 + [0.0] + [0.5] * 4)) == []


def test_a_baseline_that_jumps_within_the_spread_of_the_rewards_does_not_explode():
    assert names(log(**{"baseline/shift": [0.1] * 9 + [0.45]})) == []
    assert names(log(**{"baseline/shift": [0.1] * 9 + [0.55]})) == ["Exploding baseline"]


def test_a_pass_that_takes_most_of_the_step_is_found():
    assert names(log(**{"score/pass_time": 2.1})) == ["Slow scoring pass"]
    # One pass for four optimizer steps: 2.1 / (4 x 4) of the time.
    assert names(log(**{"score/pass_time": [2.1, None, None, None, 2.1] * 2})) == []


def test_the_rate_does_not_collapse_where_it_is_not_adapted():
    rows = [{name: value for name, value in row.items() if name != "lr_multiplier"} for row in log()]
    assert diagnose([row | {"gradient_snr/ratio": 0.0} for row in rows]) == []


def test_the_beginning_of_a_run_does_not_count():
    assert names(log(**{"gradient_snr/ratio": [0.0] * 5 + [0.2] * 5})) == []
    assert names(log(**{"gradient_snr/ratio": [0.2] * 5 + [0.0] * 5})) == ["Learning-rate collapse"]


@pytest.mark.parametrize("undefined", [None, math.nan, math.inf])
def test_undefined_values_are_left_out(undefined):
    assert diagnose(log(**{"gradient_snr/ratio": undefined, "grad_norm": undefined})) == []


def test_few_values_are_no_evidence():
    assert names(log(3, frac_reward_zero_std=1.0)) == []
    assert names(log(4, frac_reward_zero_std=1.0)) == ["Zero-variance groups"]
    assert diagnose([]) == []


def test_the_script_reads_a_runs_log(tmp_path, capsys):
    rows = log(frac_reward_zero_std=1.0, reward=0.0)
    (tmp_path / "trainer_state.json").write_text(json.dumps({"global_step": 10, "log_history": rows}))

    (findings,) = script.main([f"mine={tmp_path}"]).values()

    assert [finding.name for finding in findings] == ["Zero-variance groups"]
    assert "frac_reward_zero_std: mean 1.00, at a mean reward of 0" in capsys.readouterr().out


def test_the_script_refuses_what_is_no_run(tmp_path):
    with pytest.raises(SystemExit, match=r"diagnose: .* holds neither trainer_state\.json"):
        script.main([str(tmp_path)])
