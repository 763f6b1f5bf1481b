"""The learning study: its statistics against arithmetic, its runs against TRL's own trainer, and its stages."""

import json
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks import learning, learning_runs, learning_summary, policies
from benchmarks.completion_pool import answer_batch, sample_completions
from benchmarks.learning_runs import RunSpec
from benchmarks.sections import learning as section
from tests.tiny_policies import install_tiny_policy


def finished(method="oblrpo", rate=0.1, seed=0, accuracies=(0.4, 0.6, 0.8), seconds=(0.0, 1.0, 2.0)):
    """The result of a run of two steps."""
    spec = {"policy": "p", "optimizer": "adamw", "method": method, "learning_rate": rate, "seed": seed}
    curves = {"accuracies": list(accuracies), "cpu_seconds": list(seconds)}
    return {"spec": spec, **curves, "multipliers": [0.5, 1.0], "failure": None}


@pytest.fixture
def tiny_policy(tmp_path, monkeypatch):
    install_tiny_policy(monkeypatch, tmp_path, vocab_size=130)
    reward = lambda completions, **kwargs: [len(text) / 8 for text in completions]  # noqa: E731
    monkeypatch.setattr(policies.Policy, "reward_function", lambda self: reward)


def tiny_spec(method, **settings):
    small = {"num_steps": 3, "num_prompts": 4, "eval_steps": 1, "test_size": 8, "seed": 7}
    given = {"policy": "tiny", "optimizer": "adamw", "method": method, "learning_rate": 1e-3}
    return RunSpec(**given | small | settings)


@pytest.mark.parametrize(
    ("horizon", "expected"),
    [
        (None, 12.5 / 20),  # (0.4 + 0.6) / 2 x 10 + (0.6 + 0.9) / 2 x 10 = 5 + 7.5
        (15, 8.375 / 15),  # to 15 the curve reaches 0.75: 5 + (0.6 + 0.75) / 2 x 5
        (25, 17 / 25),  # beyond 20 it stays at 0.9: 12.5 + 0.9 x 5
    ],
)
def test_an_area_is_the_trapezoid_over_its_length(horizon, expected):
    assert learning_summary.area([0.4, 0.6, 0.9], [0, 10, 20], horizon) == pytest.approx(expected)


def test_a_paired_interval_is_that_of_the_resampled_means():
    # Differences 0 and 1: means 0, 1/2, 1 with probabilities 1/4, 1/2, 1/4, so both ends are reached by 2.5 %.
    assert learning_summary.paired_difference([0.5, 1.0], [0.5, 0.0]) == {"mean": 0.5, "low": 0.0, "high": 1.0}
    shifted = learning_summary.paired_difference([0.3, 0.9, 0.4], [0.1, 0.7, 0.2])  # the pairing leaves no spread
    assert (shifted["low"], shifted["high"]) == (0.2, 0.2)


def test_a_run_collapses_below_half_of_its_start():
    assert learning_summary.collapsed(finished(accuracies=(0.4, 0.9, 0.19)))
    assert not learning_summary.collapsed(finished(accuracies=(0.4, 0.1, 0.2)))


@pytest.fixture
def record():
    tuning = [
        finished(method, rate, 100, accuracies=(0.4, 0.4, last))
        for method in ("oblrpo", "baseline_only", "grpo", "rloo", "dr_grpo")
        for rate, last in ((0.1, 0.5), (0.2, 0.8), (0.3, 0.1 if method == "grpo" else 0.3))
    ]
    evaluation = [
        finished(method, 0.2, seed, accuracies=(0.4, middle + seed / 10, 0.8), seconds=seconds)
        for seed in (0, 1)
        for method, middle, seconds in (
            ("oblrpo", 0.6, (0.0, 2.0, 4.0)),
            ("baseline_only", 0.4, (0.0, 2.0, 4.0)),
            ("grpo", 0.5, (0.0, 1.0, 2.0)),
            ("rloo", 0.4, (0.0, 1.0, 3.0)),
            ("dr_grpo", 0.3, (0.0, 1.0, 3.0)),
            ("constant_average", 0.7, (0.0, 0.5, 1.0)),
            ("shuffled_multiplier", 0.6, (0.0, 1.0, 3.0)),
        )
    ]
    settings = {"num_steps": 2, "num_prompts": 4, "num_generations": 4, "eval_steps": 1, "test_size": 8}
    settings |= {"tuning_seeds": 1, "evaluation_seeds": 2}
    return {"settings": settings, "summary": learning_summary.summarise(tuning, evaluation)}


def test_the_summary_finds_best_rate_differences_collapse_and_equal_time(record):
    part = record["summary"]["adamw"]["p"]
    assert {cell["learning_rate"] for cell in part["evaluation"].values()} == {0.2}
    assert [cell["collapsed"] for cell in part["tuning"]["grpo"].values()] == [0, 0, 1]
    # Curves differ by 0.1 in the middle of two steps: half of it in the mean, on every seed.
    assert part["ours_minus"]["grpo"]["area"]["mean"] == pytest.approx(0.05)
    assert part["ours_minus"]["constant_average"]["area"]["high"] == pytest.approx(-0.05)
    # GRPO is the fastest method (controls do not count): 2 s, where OBLR-PO's seeds have gone from 0.4 to 0.6 and 0.7.
    assert part["equal_time_seconds"] == 2
    assert part["evaluation"]["oblrpo"]["area_equal_time"]["mean"] == pytest.approx((0.5 + 0.55) / 2)
    assert part["evaluation"]["oblrpo"]["mean_multiplier"] == 0.75


def test_the_best_rate_has_the_largest_area():
    runs = [finished(rate=rate, accuracies=(0.4, 0.4, last)) for rate, last in ((0.1, 0.5), (0.2, 0.8), (0.3, 0.3))]
    assert learning_summary.best_rate(runs) == 0.2


def test_the_tables_say_what_the_record_holds(record):
    text = section.markdown(record)
    row = "| GRPO (TRL's defaults) | 0.2 | 0.75 | 0.575 ± 0.035 | +0.050 [+0.050, +0.050] | 0.800 ± 0.000 |"
    assert row in text
    assert "| GRPO (TRL's defaults) | 0.50 | 0.80 | **0.10** |" in text
    assert "| multiplier of OBLR-PO | 0.750 | 0.750 | 0.750 |" in text
    part = record["summary"]["adamw"]["p"]
    part["evaluation"]["grpo"]["learning_rate"] = 0.3
    assert "| GRPO (TRL's defaults) | 0.3 (edge) |" in section.markdown(record)
    (axis,) = section.figure(record).axes
    assert len(axis.lines) == 6  # five methods and the start accuracy
    assert list(axis.lines[-2].get_ydata()) == part["evaluation"]["oblrpo"]["curve"]


def test_the_group_mean_without_adaptation_has_the_curve_of_dr_grpo(tiny_policy, monkeypatch):
    options = {"baseline": "group_mean", "lr_adaptation": "none"}
    monkeypatch.setitem(learning_runs.ALL_METHODS, "plain", ("oblrpo", options))
    curves = {method: learning_runs.run(tiny_spec(method))["accuracies"] for method in ("dr_grpo", "plain", "rloo")}
    assert curves["dr_grpo"] == curves["plain"]
    assert curves["dr_grpo"] != curves["rloo"]
    assert len(set(curves["dr_grpo"])) == 4


def test_evaluating_does_not_change_the_run(tiny_policy):
    often, once = (learning_runs.run(tiny_spec("dr_grpo", eval_steps=steps)) for steps in (1, 3))
    assert (often["accuracies"][0], often["accuracies"][-1]) == tuple(once["accuracies"])


def test_a_run_with_graded_rewards_is_measured_by_their_mean_without_being_changed(tiny_policy, monkeypatch):
    right_or_wrong = learning_runs.run(tiny_spec("dr_grpo"))
    graded = policies.Policy("chain_sum", 0.3, reward="graded")
    monkeypatch.setitem(policies.POLICIES, "tiny", graded)
    run = learning_runs.run(tiny_spec("dr_grpo"))
    assert run["accuracies"] == right_or_wrong["accuracies"]  # sampling for the measure moved no rollout
    assert right_or_wrong["rewards"] == []
    assert learning_summary.held_out(right_or_wrong) == right_or_wrong["accuracies"]

    assert learning_summary.held_out(run) == run["rewards"]
    assert len(set(run["rewards"])) == len(run["accuracies"])
    # The reward is an eighth of the length, of 8 held-out prompts x 2 completions.
    model = AutoModelForCausalLM.from_pretrained(policies.policy_directory("tiny"))
    tokenizer = AutoTokenizer.from_pretrained(policies.policy_directory("tiny"))
    prompts = list(learning_runs._prompts("tiny", 7, 12, 8)["test"])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        repeated = [row["prompt"] for row in prompts for _ in range(2)]
        texts = sample_completions(model, tokenizer, repeated, num_completions=1, max_completion_length=8).texts
    assert run["rewards"][0] == pytest.approx(sum(map(len, texts)) / 16 / 8)

    broken = learning_runs.run(tiny_spec("rloo", optimizer="sgd", learning_rate=1e38))
    assert broken["rewards"][-1] == 0.0
    assert len(broken["rewards"]) == 4


def test_given_multipliers_set_the_rate_of_every_step(tiny_policy):
    given = (0.5, 0.0, 2.0)
    run = learning_runs.run(tiny_spec("shuffled_multiplier", multipliers=given))
    assert run["multipliers"] == list(given)
    assert run["accuracies"][1] == run["accuracies"][2] != run["accuracies"][3]


def test_a_run_whose_weights_explode_counts_as_wrong_from_there_on(tiny_policy):
    run = learning_runs.run(tiny_spec("rloo", optimizer="sgd", learning_rate=1e38))
    assert run["failure"] is not None
    assert run["accuracies"][-1] == 0.0
    assert len(run["accuracies"]) == len(run["cpu_seconds"]) == 4


@pytest.mark.slow
def test_a_stopped_study_resumes(tiny_policy, tmp_path, monkeypatch, capsys):
    few = ("oblrpo", "baseline_only", "rloo")
    monkeypatch.setattr(learning.LearningArguments, "cases", lambda self: [("adamw", "tiny", few, [1e-4, 1e-3])])
    options = {
        "policies": ["tiny"],
        "sgd_policies": ["tiny"],
        "tuning_seeds": 1,
        "evaluation_seeds": 1,
        "num_steps": 2,
    }
    options |= {"eval_steps": 1, "num_prompts": 4, "test_size": 8, "num_workers": 0}
    options |= {"runs": str(tmp_path / "runs"), "output": str(tmp_path / "learning.json")}
    started = []
    run = learning_runs.run
    monkeypatch.setattr(learning_runs, "run", lambda spec: started.append(spec.method) or run(spec))
    args = learning.LearningArguments(**options)
    learning.main(args)
    assert started == [*few * 3, "constant_average", "shuffled_multiplier"]
    first = json.loads((tmp_path / "learning.json").read_text())
    evaluation = first["summary"]["adamw"]["tiny"]["evaluation"]
    assert set(evaluation) == {*few, "constant_average", "shuffled_multiplier"}
    assert section.markdown(first) in capsys.readouterr().out
    rows = [dict(zip(first["run_columns"], row, strict=True)) for row in first["runs"]]
    assert [row["stage"] for row in rows] == ["tuning"] * 6 + ["evaluation"] * 5
    curve = [float(accuracy) for accuracy in rows[6]["accuracies"].split()]
    assert evaluation["oblrpo"]["curve"] == pytest.approx(curve, abs=1e-4)

    (last,) = Path(args.runs).glob("tiny-shuffled_multiplier-*")
    last.unlink()  # the study was stopped before its last run
    started.clear()
    learning.main(args)
    assert started == ["shuffled_multiplier"]
    started.clear()
    args.test_size = 9
    learning.complete(learning.tuning_specs(args)[:1], args.runs, 0, "again")
    assert started == ["oblrpo"]  # a changed setting is another run


def test_settings_that_cannot_be_are_named():
    with pytest.raises(ValueError, match=r"`policies` has 'chain', which does not exist\. Choose from: chain_sum"):
        learning.LearningArguments(policies=["chain"])
    with pytest.raises(ValueError, match="`num_steps` is 25, not a multiple of `eval_steps` 10"):
        learning.LearningArguments(num_steps=25)


def test_the_held_out_accuracy_is_that_of_sampling_in_expectation(tiny_policy):
    directory = policies.policy_directory("tiny")
    tokenizer, model = AutoTokenizer.from_pretrained(directory), AutoModelForCausalLM.from_pretrained(directory)
    prompts = Dataset.from_dict({"prompt": ["1 + 2 =", "State the final answer: 1 ="], "solution": ["3", "12"]})

    batch = answer_batch(tokenizer, prompts["prompt"], prompts["solution"])
    held_out = learning_runs.held_out_accuracies(model, batch)

    # One sequence at a time, token by token, no padding.
    expected = []
    for row in prompts:
        ids = tokenizer(row["prompt"])["input_ids"]
        probability = 1.0
        for token in [*tokenizer(row["solution"])["input_ids"], tokenizer.eos_token_id]:
            probability *= model(torch.tensor([ids])).logits[0, -1].softmax(-1)[token].item()
            ids = [*ids, token]
        expected.append(probability)
    assert held_out.tolist() == pytest.approx(expected, rel=1e-4)
    assert held_out.min() > 0


def test_only_infinities_count_as_a_lost_run():
    lost = RuntimeError("CUDA error: device-side assert triggered\nfor debugging consider ...")
    assert learning_runs.divergence(lost) == "CUDA error: device-side assert triggered"
    with pytest.raises(RuntimeError, match="out of memory"):
        learning_runs.divergence(RuntimeError("CUDA out of memory."))
