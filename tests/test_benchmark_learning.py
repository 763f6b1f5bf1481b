"""The learning study: its statistics against arithmetic, its runs against TRL's own trainer, its stages with tiny settings."""

import json
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks import learning, learning_runs, learning_summary
from benchmarks.learning_runs import METHODS, Method, RunSpec
from benchmarks.policies import Policy
from benchmarks.sections import learning as section
from examples.tiny_qwen3.model import build_model, build_tokenizer


def finished(method="oblrpo", rate=0.1, seed=0, accuracies=(0.4, 0.6, 0.8), seconds=(0.0, 1.0, 2.0), **more):
    """What a run returns, of two steps."""
    spec = {"policy": "p", "optimizer": "adamw", "method": method, "learning_rate": rate, "seed": seed}
    return {
        "spec": spec,
        "steps": [0, 1, 2],
        "accuracies": list(accuracies),
        "cpu_seconds": list(seconds),
        "wall_seconds": list(seconds),
        "multipliers": [0.5, 1.0],
        "failure": None,
    } | more


@pytest.fixture
def tiny_policy(tmp_path, monkeypatch):
    """An untrained policy in place of the study's, rewarded for what it does produce."""
    torch.manual_seed(0)
    tokenizer = build_tokenizer(
        ["State the final answer to the following arithmetic problem: 1 + 2 ="], vocab_size=130
    )
    for part in (build_model(tokenizer, hidden_size=64, num_hidden_layers=1), tokenizer):
        part.save_pretrained(tmp_path / "model")
    policies = {"tiny": Policy("chain_sum", 0.3)}
    for module in (learning, learning_runs):
        monkeypatch.setattr(module, "POLICIES", policies)
        monkeypatch.setattr(module, "policy_directory", lambda name: tmp_path / "model")
    monkeypatch.setattr(
        learning_runs, "reward_of", lambda policy: lambda completions, **kw: [len(text) / 8 for text in completions]
    )
    return "tiny"


def tiny_spec(method, **settings):
    small = {"num_steps": 3, "num_prompts": 4, "eval_steps": 1, "test_size": 8, "seed": 7}
    return RunSpec(
        **{"policy": "tiny", "optimizer": "adamw", "method": method, "learning_rate": 1e-3} | small | settings
    )


def test_an_area_is_the_trapezoid_over_its_length():
    # (0.4 + 0.6) / 2 x 10 + (0.6 + 0.9) / 2 x 10 = 5 + 7.5, over 20.
    assert learning_summary.area([0.4, 0.6, 0.9], [0, 10, 20]) == pytest.approx(0.625)


def test_an_area_ends_at_its_horizon_inside_and_beyond_the_curve():
    # To 15 the curve reaches 0.75: 5 + (0.6 + 0.75) / 2 x 5 = 8.375. Beyond 20 it stays at 0.9: 12.5 + 0.9 x 5 = 17.
    assert learning_summary.area([0.4, 0.6, 0.9], [0, 10, 20], 15) == pytest.approx(8.375 / 15)
    assert learning_summary.area([0.4, 0.6, 0.9], [0, 10, 20], 25) == pytest.approx(17 / 25)


def test_a_paired_interval_is_that_of_the_resampled_means():
    # Differences 0 and 1: means 0, 1/2, 1 with probabilities 1/4, 1/2, 1/4, so both ends are reached by 2.5 %.
    assert learning_summary.paired_difference([0.5, 1.0], [0.5, 0.0]) == {
        "mean": 0.5,
        "low": 0.0,
        "high": 1.0,
        "seeds_above_zero": 1,
        "num_seeds": 2,
    }
    shifted = learning_summary.paired_difference([0.3, 0.9, 0.4], [0.1, 0.7, 0.2])  # the pairing leaves no spread
    assert (shifted["low"], shifted["high"], shifted["seeds_above_zero"]) == (0.2, 0.2, 3)


def test_a_run_collapses_below_half_of_its_start():
    assert learning_summary.collapsed(finished(accuracies=(0.4, 0.9, 0.19)))
    assert not learning_summary.collapsed(finished(accuracies=(0.4, 0.1, 0.2)))


def summary_of_five_methods():
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
    return learning_summary.summarise(tuning, evaluation)


def test_the_summary_finds_best_rate_rival_collapse_and_equal_time():
    part = summary_of_five_methods()["adamw"]["p"]
    assert part["best_rate"] == dict.fromkeys(("oblrpo", "baseline_only", "grpo", "rloo", "dr_grpo"), 0.2)
    assert part["at_edge"] == []
    assert [cell["collapsed"] for cell in part["tuning"]["grpo"].values()] == [0, 0, 1]
    assert part["rival"]["area"] == "grpo"
    # Curves differ by 0.1 in the middle of two steps: half of it in the mean, on every seed.
    assert part["ours_minus"]["rival"]["area"]["mean"] == pytest.approx(0.05)
    assert part["ours_minus"]["constant_average"]["area"]["high"] == pytest.approx(-0.05)
    assert part["half_minus_rival"]["area"]["mean"] == pytest.approx(-0.05)
    # GRPO is the fastest method (controls do not count): 2 s, where OBLR-PO's seeds have gone from 0.4 to 0.6 and 0.7.
    assert part["equal_time_seconds"] == 2
    assert part["evaluation"]["oblrpo"]["area_equal_time"]["mean"] == pytest.approx((0.5 + 0.55) / 2)
    assert part["evaluation"]["oblrpo"]["mean_multiplier"] == 0.75


def test_the_section_says_what_the_record_holds():
    record = {
        "settings": {
            "num_steps": 2,
            "num_prompts": 4,
            "num_generations": 4,
            "tuning_seeds": 1,
            "evaluation_seeds": 2,
            "test_size": 8,
        },
        "summary": summary_of_five_methods(),
        "runs": [
            {"stage": stage, "policy": "p", "optimizer": "adamw", "method": method, "mean_multiplier": multiplier}
            for stage, method, multiplier in (
                ("tuning", "oblrpo", 0.05),
                ("tuning", "oblrpo", 0.2),
                ("tuning", "grpo", 1.0),
                ("evaluation", "oblrpo", 0.4),
            )
        ],
    }
    text = section.markdown(record)
    assert (
        "AdamW, equal rollouts: the interval of OBLR-PO minus the best of GRPO, Dr. GRPO and RLOO lies above zero on 1 of 1"
        in text
    )
    assert "Against the control: constant average rate (area, AdamW): above zero on 0 of 1 tasks, below on 1" in text
    assert "| GRPO (TRL's defaults) | 0 of 1 (0.50) | 0 of 1 (0.80) | 1 of 1 (0.10) |" in text
    assert "does not: nowhere on the grid" in text
    assert (
        "its baseline alone, at a constant rate (AdamW): equal rollouts above zero on 0 of 1 tasks, below on 1; equal time"
        in text
    )
    # 1 / 0.2 = 5 and 1 / 0.05 = 20.
    assert "mean multiplier over the grid was 0.050 to 0.200 on p (AdamW), with a floor of 0.05: its effective" in text
    assert "rates lay 5 to 20 times below the grid" in text
    assert "A run of OBLR-PO took 1.33 to 1.33 times the processor seconds of Dr. GRPO's" in text  # 4 s and 3 s
    # Areas of 0.4, 0.4, last: 0.4 + (last - 0.4) / 4, at the three rates 0.425, 0.5 and 0.375 or 0.325.
    grid = section.markdown(record)
    assert "over the grid of" not in section.summary(record)
    assert "| OBLR-PO | 0.433 |" in grid
    assert "| GRPO (TRL's defaults) | 0.417 |" in grid
    record["summary"]["adamw"]["p"]["ours_minus"]["rival"]["area"]["low"] = -0.01
    assert "RLOO lies above zero on 0 of 1 tasks, below on 0" in section.markdown(record)
    collapsing = record["summary"]["adamw"]["p"]["tuning"]["oblrpo"]["0.2"]
    collapsing["collapsed"] = 1
    assert "does not: p at 0.2" in section.markdown(record)
    axes = section.figure(record).axes
    assert [len(axis.lines) for axis in axes] == [6, 6]  # five methods and the start accuracy
    assert axes[0].get_xlabel() == "learning rate"
    assert axes[1].get_xlabel() == "step"


def test_the_group_mean_without_adaptation_has_the_curve_of_dr_grpo(tiny_policy, monkeypatch):
    options = {"baseline": "group_mean", "lr_adaptation": "none"}
    monkeypatch.setitem(METHODS, "plain", Method("oblrpo", options))
    curves = {method: learning_runs.run(tiny_spec(method))["accuracies"] for method in ("dr_grpo", "plain", "rloo")}
    assert curves["dr_grpo"] == curves["plain"]
    assert curves["dr_grpo"] != curves["rloo"]
    assert len(set(curves["dr_grpo"])) == 4


def test_evaluating_does_not_change_the_run(tiny_policy):
    often, once = (learning_runs.run(tiny_spec("dr_grpo", eval_steps=steps)) for steps in (1, 3))
    assert (often["accuracies"][0], often["accuracies"][-1]) == tuple(once["accuracies"])


def test_given_multipliers_set_the_rate_of_every_step(tiny_policy):
    given = (0.5, 0.0, 2.0)
    run = learning_runs.run(tiny_spec("shuffled_multiplier", multipliers=given))
    assert run["multipliers"] == list(given)
    assert run["accuracies"][1] == run["accuracies"][2] != run["accuracies"][3]


def test_a_run_whose_weights_explode_counts_as_wrong_from_there_on(tiny_policy):
    run = learning_runs.run(tiny_spec("rloo", optimizer="sgd", learning_rate=1e38))
    assert run["failure"] is not None
    assert run["accuracies"][-1] == 0.0
    assert run["steps"] == [0, 1, 2, 3]
    assert len(run["accuracies"]) == len(run["cpu_seconds"]) == 4


@pytest.mark.slow
def test_a_stopped_study_goes_on_where_it_was(tiny_policy, tmp_path, monkeypatch):
    few = {name: METHODS[name] for name in ("oblrpo", "rloo")}
    for module in (learning, learning_summary):
        monkeypatch.setattr(module, "METHODS", few)
    options = "--policies tiny --sgd_policies tiny --adamw_rates 1e-4 1e-3 --sgd_rates 0.1 --tuning_seeds 1 --evaluation_seeds 1"
    options += " --num_steps 2 --eval_steps 1 --num_prompts 4 --test_size 8 --num_workers 0"
    monkeypatch.setattr(learning, "SGD_METHODS", ())
    monkeypatch.setattr(
        learning.LearningArguments, "cases", lambda self: [("adamw", "tiny", tuple(few), [1e-4, 1e-3])]
    )
    runs, output = tmp_path / "runs.jsonl", tmp_path / "learning.json"
    argv = [*options.split(), "--runs", str(runs), "--output", str(output)]
    started = []
    run = learning_runs.run
    monkeypatch.setattr(learning_runs, "run", lambda spec: started.append(spec.method) or run(spec))
    (args,) = learning.make_parser().parse_args_and_config(argv)
    learning.main(args)
    assert started == ["oblrpo", "rloo"] * 3 + ["constant_average", "shuffled_multiplier"]
    first = json.loads(output.read_text())
    assert set(first["summary"]["adamw"]["tiny"]["evaluation"]) == {*few, "constant_average", "shuffled_multiplier"}
    assert len(first["runs"]) == 8

    text = runs.read_text()
    runs.write_text(text[: len(text) - 40])  # the last run was cut short
    started.clear()
    learning.main(args)
    assert started == ["shuffled_multiplier"]
    started.clear()
    args.test_size = 9
    learning.complete(learning.tuning_specs(args)[:1], Path(args.runs), 0, "again")
    assert started == ["oblrpo"]  # a changed setting is another run


def test_settings_that_cannot_be_are_named():
    with pytest.raises(ValueError, match=r"`policies` names \['chain'\], which do not exist: choose of chain_sum"):
        learning.LearningArguments(policies=["chain"])
    with pytest.raises(ValueError, match="`num_steps` is 25, not a multiple of `eval_steps` 10"):
        learning.LearningArguments(num_steps=25)


def test_the_held_out_accuracy_is_what_sampling_gives_in_expectation(tiny_policy):
    directory = learning_runs.policy_directory(tiny_policy)
    tokenizer, model = AutoTokenizer.from_pretrained(directory), AutoModelForCausalLM.from_pretrained(directory)
    prompts = Dataset.from_dict({"prompt": ["1 + 2 =", "State the final answer: 1 ="], "solution": ["3", "12"]})

    held_out = learning_runs.HeldOut(prompts, tokenizer)(model)

    # One sequence at a time, token by token, no padding.
    expected = []
    for row in prompts:
        ids = tokenizer(row["prompt"])["input_ids"]
        probability = 1.0
        for token in [*tokenizer(row["solution"])["input_ids"], tokenizer.eos_token_id]:
            probability *= model(torch.tensor([ids])).logits[0, -1].softmax(-1)[token].item()
            ids = [*ids, token]
        expected.append(probability)
    assert held_out == pytest.approx(sum(expected) / 2, rel=1e-4)
    assert held_out > 0
