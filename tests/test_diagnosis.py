"""The rules on logs written by hand, each found where it is and only there; the warnings of real runs."""

import json
import math

import pytest
from transformers import TrainerControl, TrainerState
from trl import GRPOConfig, GRPOTrainer

from oblr_trl import OBLRPOConfig, OBLRPOTrainer
from oblr_trl.metrics import BASELINE_SHIFT as SHIFT
from oblr_trl.metrics import (
    CORRELATION,
    EFFECTIVE_GROUP_SIZE,
    KL,
    KL_TARGET,
    LIVE_FRACTION,
    LR_MULTIPLIER,
    NUM_PROMPTS,
    PREDICTED_GAIN,
    RHO,
)
from oblr_trl.metrics import VARIANCE_VS_LEAVE_ONE_OUT as RATIO
from oblr_trl.runs.diagnosis import DiagnosisCallback, diagnose, format_findings
from oblr_trl.scripts import diagnose as script
from tests.tiny_models import train

EQUAL_GROUPS, DRIFT, SAMPLER = (
    "frac_reward_zero_std",
    "clip_ratio/region_mean",
    "sampling/sampling_logp_difference/mean",
)
# What a healthy run logs, at every one of twelve steps.
HEALTHY = {
    "learning_rate": 1e-6,
    "rewards/verifier/mean": 0.5,
    "rewards/verifier/std": 0.5,
    "reward": 0.5,
    "reward_std": 0.5,
    EQUAL_GROUPS: 0.1,
    DRIFT: 0.0,
    SAMPLER: 0.01,
    NUM_PROMPTS: 16,
    SHIFT: 0.2,
    EFFECTIVE_GROUP_SIZE: 4.0,
    RATIO: 0.6,
    RHO: 0.2,
    LR_MULTIPLIER: 0.2,
}


def log(changed=None, num_steps=12, **more):
    """Rows of a run; `changed` and `more` hold numbers, or lists with a number for each step."""
    rows = []
    for i in range(num_steps):
        row = HEALTHY | {"step": i + 1}
        for name, value in ((changed or {}) | more).items():
            row[name] = value[i] if isinstance(value, list) else value
        rows.append(row)
    return rows


def without(name, rows):
    return [{key: value for key, value in row.items() if key != name} for row in rows]


def names(rows):
    return [finding.name for finding in diagnose(rows)]


def found(rows):
    return [(finding.name, finding.metric) for finding in diagnose(rows)]


def test_a_gain_that_the_reward_does_not_show_is_found():
    noise = [0.01, -0.01] * 20
    flat = [0.5 + value for value in noise]
    rising = [0.5 + 0.002 * i + value for i, value in enumerate(noise)]
    gains = {PREDICTED_GAIN: 0.01}  # 0.39 over the run
    assert names(log(gains | {"reward": flat}, num_steps=40)) == ["Gain not realised"]
    assert names(log(gains | {"reward": rising}, num_steps=40)) == []  # a fifth of it
    assert names(log({PREDICTED_GAIN: 0.0001} | {"reward": flat}, num_steps=40)) == []
    assert names(log(gains | {"reward": flat[:19]}, num_steps=19)) == []  # too few to say


def test_groups_of_equal_rewards_are_no_failure_where_a_prior_gives_them_an_advantage():
    assert names(log({EQUAL_GROUPS: 1.0, LIVE_FRACTION: 0.9})) == []  # as with one completion per prompt
    assert names(log({EQUAL_GROUPS: 1.0, LIVE_FRACTION: 0.4})) == ["Zero-variance groups"]
    assert names(log({EQUAL_GROUPS: 0.6, LIVE_FRACTION: [0.1] * 6 + [0.6] * 6})) == []  # the later half counts


def test_a_healthy_log_has_no_findings():
    assert diagnose(log()) == diagnose([]) == []
    assert "no proof of health" in format_findings([])


@pytest.mark.parametrize(
    ("changed", "name", "metric"),
    [
        ({RHO: 0.0, LR_MULTIPLIER: 0.05}, "Learning-rate collapse", RHO),
        ({CORRELATION: 0.0, RHO: 0.01, LR_MULTIPLIER: 0.05}, "Learning-rate collapse", CORRELATION),
        ({KL: [0.02, 0.0] * 6, KL_TARGET: 9e-4}, "Policy moved too far", KL),
        ({SHIFT: [0.2] * 11 + [0.7]}, "Exploding baseline", SHIFT),
        ({RATIO: [0.9, 1.3] * 6}, "A baseline noisier than the plain mean", RATIO),
        ({EQUAL_GROUPS: 0.6}, "Zero-variance groups", EQUAL_GROUPS),
        ({LIVE_FRACTION: 0.4}, "Zero-variance groups", LIVE_FRACTION),
        ({NUM_PROMPTS: 15}, "Too few prompts per step", NUM_PROMPTS),
        ({"rewards/verifier/std": 0.0}, "Constant rewards", "rewards/verifier/mean"),
        ({"reward": 1.0, "reward_std": 0.0}, "Constant rewards", "reward"),
        ({DRIFT: [0.0, 0.2] * 6}, "Off-policy drift", DRIFT),
        ({SAMPLER: 0.5}, "Off-policy drift", SAMPLER),
        ({"reward": [0.5] * 6 + [0.1] * 6}, "Policy collapse", "reward"),
    ],
)
def test_a_signature_is_found_by_its_metric_and_nothing_else_is(changed, name, metric):
    assert found(log(changed)) == [(name, metric)]


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        # Means over 3 values: 0.5 at best, 0.1 at the end; 0.4 is more than half of the deviation of 0.5. What else the log
        # shows is a consequence.
        ({"reward": [0.5] * 6 + [0.1] * 6, EQUAL_GROUPS: 1.0}, ["Policy collapse"]),
        ({"reward": [0.5] * 6 + [0.3] * 6}, []),
        ({"reward": [0.1] * 6 + [0.5] * 6}, []),
        ({"reward": [0.5] * 6 + [0.0] + [0.5] * 5}, []),
        # Batches of two prompts, each solved always or never: the mean of three falls from 1 to 0.17, more than half a
        # deviation. But neighbours differ by 5 / 11 on average, which makes the error of such a mean 0.23, and 6 of them 1.4.
        ({"reward": [0.5, 1.0, 1.0, 1.0, 0.0, 0.5, 1.0, 0.0, 0.5, 0.0, 0.0, 0.5]}, []),
        # The same fall without the jumps is one: neighbours differ by 0.1.
        ({"reward": [1 - 0.1 * i for i in range(11)] + [0.0]}, ["Policy collapse"]),
        # Penalties: of what lay above the lowest, -3, 1.4 of 2 is left, more than half; -1 to -0.8 is a gain.
        ({"reward": [-1.0, -3.0, *[-1.6] * 10], "reward_std": 2.0}, []),
        ({"reward": [-1.0] + [-0.8] * 11}, []),
        # What stays above half of the start in a single batch of the later half is not lost: 0.25 is half of 0.5.
        ({"reward": [0.5] + [0.05] * 10 + [0.25]}, []),
        # Nor is a lucky first batch: 0.12 less 0.02 is below a quarter of the deviation of 0.5.
        ({"reward": [0.12] + [0.02] * 11}, []),
        # One right completion, once, or groups of equal rewards that differ from one another, are a difficulty and no fault.
        (
            {"reward": [0.0] * 11 + [0.01], "reward_std": [0.0] * 11 + [0.1], EQUAL_GROUPS: 0.99},
            ["Zero-variance groups"],
        ),
        ({"reward": [0.0, 1.0] * 6, "reward_std": 0.0, EQUAL_GROUPS: 1.0}, ["Zero-variance groups"]),
        # Within the spread of the rewards, 0.5, the baseline may jump.
        ({SHIFT: [0.1] * 11 + [0.45]}, []),
        ({SHIFT: [0.1] * 11 + [0.55]}, ["Exploding baseline"]),
        # A run's beginning does not count.
        ({RHO: [0.0] * 6 + [0.2] * 6}, []),
        ({RHO: [0.2] * 6 + [0.0] * 6}, ["Learning-rate collapse"]),
        # Undefined values are left out.
        ({RHO: None, SHIFT: None}, []),
        ({RHO: math.nan, SHIFT: math.inf}, []),
        # Few values are no evidence, nor is a rho of so few prompts that it is noise.
        ({RHO: [0.0] * 10 + [None] * 2}, []),
        ({RHO: 0.0, NUM_PROMPTS: 15}, ["Too few prompts per step"]),
        # Under a trust region neither alone: steps that overshoot end at a correlation of 0 also where they gain.
        ({RHO: 0.0, NUM_PROMPTS: 15, CORRELATION: 0.03}, []),
        ({CORRELATION: -0.05}, []),
        ({RHO: 0.01, CORRELATION: [0.1] * 6 + [0.0] * 6}, ["Learning-rate collapse"]),
        ({RHO: None, CORRELATION: [0.1] * 6 + [0.0] * 6}, ["Learning-rate collapse"]),
    ],
)
def test_what_looks_like_a_failure_is_told_from_it(changed, expected):
    assert names(log(changed)) == expected


def test_a_policy_that_is_lost_within_the_first_steps_is_judged_by_where_it_started():
    # Means over 3 values: 0.2 at best, 0.05 at the end, which is no fall of half a deviation; 0.5 to 0.05 is.
    (finding,) = diagnose(log(reward=[0.5] + [0.05] * 11, learning_rate=3e-3))
    assert (finding.name, finding.metric) == ("Policy collapse", "reward")
    assert finding.evidence == "0.5 at first, later at most 0.05 (last 6 logged), at learning rates of up to 0.003"
    assert "divide `trust_region_kl`" in finding.remedy


@pytest.mark.parametrize("metric", ["eval_accuracy", "eval_reward"])
def test_an_evaluation_tells_a_lost_policy_where_the_rewards_are_noise(metric):
    def evaluated(*values, **changed):
        rows = [{"step": 0, metric: values[0], "eval_reward_std": 0.5}]
        return rows + log(changed) + [{"step": 13 + i, metric: value} for i, value in enumerate(values[1:])]

    assert found(evaluated(0.48, 0.06, frac_reward_zero_std=1.0)) == [("Policy collapse", metric)]
    assert names(evaluated(0.48, 0.3)) == []
    assert names(evaluated(0.48, 0.06, 0.3)) == []
    assert names(evaluated(0.1, 0.01)) == []  # ten problems more or less, of a hundred


def test_few_values_are_no_evidence():
    for num_steps, equal, lost in ((3, [], []), (4, ["Zero-variance groups"], ["Policy collapse"])):
        assert names(log({EQUAL_GROUPS: 1.0}, num_steps)) == equal
        # As soon as any consequence can be seen, so that none of them is warned of first.
        assert names(log({EQUAL_GROUPS: 1.0, "reward": [0.5] + [0.05] * 3}, num_steps)) == lost


@pytest.mark.parametrize("value", [0.0, 1.0, 0.1])
def test_rewards_that_are_always_the_same_are_a_fault_and_not_a_difficulty(value):
    (finding,) = diagnose(log({"reward": value, "reward_std": 1e-9, EQUAL_GROUPS: 1.0}))
    assert finding.evidence == f"{value:g} for every completion of 12 logged values"
    assert "fault of the verifier" in finding.remedy


def test_a_reward_function_that_never_varies_is_named_among_others_that_do():
    constant = {"rewards/format/mean": 0.0, "rewards/format/std": 0.0}
    assert found(log(constant)) == [("Constant rewards", "rewards/format/mean")]
    # The other rewards still teach something, so that the rest of the log is judged.
    assert names(log(constant | {EQUAL_GROUPS: 1.0})) == ["Constant rewards", "Zero-variance groups"]


def test_the_prior_needs_two_prompts_and_the_snr_more():
    for num_prompts, with_snr, without_snr in ((16, 0, 0), (15, 1, 0), (2, 1, 0), (1, 1, 1)):
        rows = log({NUM_PROMPTS: num_prompts})
        assert (len(diagnose(rows)), len(diagnose(without(LR_MULTIPLIER, rows)))) == (with_snr, without_snr)
    # It is a setting, not a consequence: a collapse does not hide it.
    lost = log({"reward": [0.5] + [0.05] * 11, NUM_PROMPTS: 2})
    assert names(lost) == ["Policy collapse", "Too few prompts per step"]


def test_the_rate_does_not_collapse_where_it_is_not_adapted():
    assert diagnose(without(LR_MULTIPLIER, log({RHO: 0.0}))) == []


def test_the_script_reads_a_runs_log_and_refuses_what_is_none(tmp_path, capsys):
    rows = log({EQUAL_GROUPS: 1.0, "reward": 0.0})
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "trainer_state.json").write_text(json.dumps({"global_step": 10, "log_history": rows}))
    (findings,) = script.main([f"mine={tmp_path / 'run'}"]).values()
    assert [finding.name for finding in findings] == ["Zero-variance groups"]
    assert "frac_reward_zero_std: mean 1, at a mean reward of 0" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"diagnose: .* holds neither trainer_state\.json"):
        script.main([str(tmp_path)])


# Real runs


def warnings(caplog):
    return [record.getMessage() for record in caplog.records if record.name == "oblr_trl.runs.diagnosis"]


# 32 completions are 4 prompts, of which GRPO says nothing.
@pytest.mark.parametrize(
    ("trainer", "config", "others"),
    [(OBLRPOTrainer, OBLRPOConfig, ["Step 4: Too few prompts per step"]), (GRPOTrainer, GRPOConfig, [])],
)
def test_a_failure_is_warned_of_once_while_training_and_told_at_the_end(
    tmp_path, caplog, capsys, trainer, config, others
):
    def always_zero(completions, **kwargs):
        return [0.0] * len(completions)

    train(trainer, config, tmp_path, reward=always_zero, max_steps=6, callbacks=[DiagnosisCallback()])
    # Four values are the first that prove something.
    warning, *rest = warnings(caplog)
    assert [other.split("\n")[0] for other in rest] == others
    assert warning.startswith("Step 4: Constant rewards\n  reward: 0 for every completion of 4 logged values\n")
    summary = capsys.readouterr().out.split(f"Diagnosis of {tmp_path}\n\n")[1]
    assert summary.startswith("Constant rewards\n  reward: 0 for every completion of 6 logged values\n  remedy: ")


@pytest.mark.parametrize("is_zero", [False, True])
def test_one_process_of_several_warns(caplog, is_zero):
    rows = log(reward=0.0, reward_std=0.0)
    state = TrainerState(global_step=12, max_steps=12, log_history=rows, is_world_process_zero=is_zero)
    DiagnosisCallback().on_log(GRPOConfig(use_cpu=True, bf16=False), state, TrainerControl())
    assert bool(warnings(caplog)) == is_zero
