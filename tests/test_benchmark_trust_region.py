"""The study of the trust region: its statistics against arithmetic, its grid, its optimizer, and real runs of an untrained policy."""

import json
from dataclasses import asdict

import pytest
import torch

from benchmarks import deltas, kl_measures, trust_region, trust_region_summary
from benchmarks.learning_runs import METHODS, TRUST_REGION_METHODS, Lion
from benchmarks.sections import deltas as deltas_section
from benchmarks.sections import kl_measures as kl_section
from benchmarks.sections import trust_region as section
from tests.tiny_policies import install_tiny_policy


@pytest.fixture
def tiny_settings(tmp_path, monkeypatch):
    install_tiny_policy(monkeypatch, tmp_path, vocab_size=130)
    small = {"policy": "tiny", "num_prompts": 4, "num_steps": 10}
    settings = {"AdamW": (small, 1e-3), "Lion": (small | {"optimizer": "lion"}, 1e-4)}
    settings["LoRA"] = (small | {"lora_rank": 2}, 1e-3)
    monkeypatch.setattr(trust_region, "SETTINGS", settings)
    monkeypatch.setattr(trust_region, "BATCH_SIZES", ["AdamW"])
    return trust_region.TrustRegionArguments(
        settings=list(settings),
        tuning_seeds=1,
        evaluation_seeds=1,
        num_workers=0,
        test_size=8,
        runs=str(tmp_path / "runs"),
    )


def test_a_share_is_the_ratio_of_mean_gains_over_paired_seeds():
    # (0.1 + 0.3) / (0.2 + 0.2); resampling picks 0.1 / 0.2 twice, or 0.3 / 0.2 twice, in more than 2.5 % of the cases.
    assert trust_region_summary.share([0.1, 0.3], [0.2, 0.2]) == pytest.approx({"mean": 1.0, "low": 0.5, "high": 1.5})


def test_a_grid_is_extended_until_its_best_rate_has_neighbours(monkeypatch):
    gains = {1.0: 0.1, 2.0: 0.2, 4.0: 0.3, 8.0: 0.5, 16.0: 0.4, 0.5: 0.05}
    asked = []

    def tuned(args, method, rates):
        asked.append(list(rates["one"]))
        return {"one": {rate: gains[rate] for rate in rates["one"]}}

    monkeypatch.setattr(trust_region, "SETTINGS", {"one": ({}, 2.0)})
    monkeypatch.setattr(trust_region, "tuned", tuned)
    found = trust_region.best_constant_rates(trust_region.TrustRegionArguments(settings=["one"]))
    assert asked == [[1.0, 2.0, 4.0], [1.0, 2.0, 4.0, 8.0], [1.0, 2.0, 4.0, 8.0, 16.0]]
    assert found["one"] == {rate: gains[rate] for rate in (1.0, 2.0, 4.0, 8.0, 16.0)}


def test_the_tuning_of_an_earlier_record_is_taken_over_but_where_it_is_asked_for_anew(monkeypatch, tmp_path):
    part = {"tuning": {"1": 0.1}, "methods": {"linear": {"learning_rate": 7.0}}}
    record = {"settings": {"tuning_seeds": 2}, "summary": {"one": part, "two": part}}
    (tmp_path / "record.json").write_text(json.dumps(record))
    monkeypatch.setattr(trust_region, "SETTINGS", {"one": ({}, 2.0), "two": ({}, 2.0)})
    monkeypatch.setattr(
        trust_region, "tuned", lambda args, method, rates: {s: {r: -abs(r - 2.0) for r in g} for s, g in rates.items()}
    )
    args = trust_region.TrustRegionArguments(
        settings=["one", "two"], tuned_by=str(tmp_path / "record.json"), retuned=["two"]
    )
    gains = trust_region.best_constant_rates(args)
    assert gains == {"one": {1.0: 0.1}, "two": {1.0: -1.0, 2.0: 0.0, 4.0: -2.0}}
    assert args.tuning_seeds == 2
    assert trust_region.best_multiples(args, "linear", {"one": 1.0, "two": 2.0}) == {"one": 7.0, "two": 2.0}
    # Nothing is known of this one: the better of four and eight times the rate.
    assert trust_region.best_multiples(args, "snr", {"one": 1.0, "two": 0.25}) == {"one": 4.0, "two": 2.0}


def test_fresh_settings_are_asked_for_in_a_word_and_none_of_them_chose_the_rule():
    fresh = trust_region.TrustRegionArguments(settings=["fresh"])
    assert fresh.settings == list(trust_region.FRESH)
    assert not trust_region.FRESH.keys() & trust_region.SETTINGS.keys()
    assert fresh.spec(fresh.settings[0], "trust_region", 1e-6, 0).policy == "decimal_chain_sum"
    with pytest.raises(ValueError, match=r"`settings` has \['fesh'\].*; 9 M parameters, 16 x 4"):
        trust_region.TrustRegionArguments(settings=["fesh"])


def test_the_seeds_that_did_not_choose_the_rule_have_a_row_of_their_own():
    def cell(*gains):
        return {
            "gain": {"mean": 0.0, "std": 0.0},
            "gains": gains,
            "share": dict.fromkeys(("mean", "low", "high"), 1.0),
        }

    cells = {"constant": cell(0.1, 0.2, 0.2), "trust_region": cell(0.9, 0.1, 0.2)}
    cells = {method: part | {"learning_rate": 1e-3, "found_rate": 1e-3} for method, part in cells.items()}
    settings = {"num_steps": 100, "tuning_seeds": 1, "evaluation_seeds": 3, "test_size": 8}
    record = {"settings": settings, "summary": {"one": {"start": 0.0, "tuning": {"0.001": 0.1}, "methods": cells}}}
    assert section.markdown(record).splitlines()[-1] == "| **mean** |  |  |  | 1.00 |  |"
    last = section.markdown(record | {"choosing_seeds": 1}).splitlines()[-1]
    assert last == "| mean of seeds 1 to 2, which had no part in the choice of the rule |  |  |  | 0.75 |  |"
    last = section.markdown(record | {"choosing_seeds": 2}).splitlines()[-1]
    assert last == "| mean of seed 2, which had no part in the choice of the rule |  |  |  | 1.00 |  |"


def test_lion_steps_by_the_sign_of_its_interpolated_momentum():
    parameter = torch.nn.Parameter(torch.zeros(2))
    optimizer = Lion([parameter], 0.5)
    for gradient in ([1.0, -1.0], [-0.05, -1.0]):
        parameter.grad = torch.tensor(gradient)
        optimizer.step()
    # Momentum after one step 0.01 x (1, -1); then 0.9 x 0.01 - 0.1 x 0.05 = 0.004 > 0 although the gradient is negative.
    assert parameter.tolist() == [-1.0, 1.0]


def test_one_value_for_all_settings_is_compared_by_its_mean_gain_over_them():
    gains = {
        ("trust_region", 1e-6): {"small": [0.1, 0.2], "large": [0.3, 0.4]},
        ("constant", 1e-4): {"small": [0.2, 0.1], "large": [0.0, 0.1]},
    }
    ours, constant = trust_region_summary.compare_one_value(gains)
    assert (ours["mean"], constant["mean"]) == pytest.approx((0.25, 0.1))
    # Of the seeds: (0.2, 0.3) - (0.1, 0.1).
    assert constant["ours_minus"] == pytest.approx({"mean": 0.15, "low": 0.1, "high": 0.2})
    assert [value["mean"] for value in constant["gains"]] == pytest.approx([0.15, 0.05])


@pytest.mark.slow
def test_the_study_runs_and_resumes(tiny_settings, tmp_path, monkeypatch):
    tiny_settings.output = str(tmp_path / "record.json")
    trust_region.main(tiny_settings)
    record = json.loads((tmp_path / "record.json").read_text())
    methods = record["summary"]["LoRA"]["methods"]
    assert set(methods) == {"constant", "trust_region", "minimum", "linear", "snr"}
    assert [row["method"] for row in record["batch_sizes"]["rows"]][:2] == ["trust_region", "constant"]
    assert methods["trust_region"]["learning_rate"] == 1e-6
    assert methods["trust_region"]["found_rate"] > 1e-5  # which is not where it was told to start
    assert methods["constant"]["share"]["mean"] == 1.0
    assert set(record["collapse"]["curves"]) == {"grpo", "trust_region"}
    assert len(record["collapse"]["curves"]["grpo"]) == 2
    table = section.markdown(record)
    assert record["choosing_seeds"] == 2
    assert table.count("\n| ") == 2 + len(tiny_settings.settings) + 1 + 2 + 1 + len(trust_region.ONE_VALUE)
    assert section.figure(record).axes

    monkeypatch.setattr("benchmarks.learning_runs.run", lambda spec: pytest.fail("made again"))
    trust_region.main(tiny_settings)
    assert json.loads((tmp_path / "record.json").read_text())["summary"] == record["summary"]


def test_other_deltas_are_compared_with_the_default_on_the_same_seeds(tiny_settings, tmp_path, monkeypatch):
    ends = {"trust_region": (0.4, 0.6), "trust_region_0.125": (0.4, 0.4), "trust_region_1": (0.8, 0.4)}

    def run(spec):
        assert spec.policy == "tiny"
        return {"spec": asdict(spec), "accuracies": [0.2, ends[spec.method][spec.seed]]}

    monkeypatch.setattr("benchmarks.learning_runs.run", run)
    fields = {name: getattr(tiny_settings, name) for name in ("settings", "num_workers", "runs")}
    methods = ["trust_region_0.125", "trust_region_1"]
    arguments = deltas.DeltasArguments(
        **fields, methods=methods, evaluation_seeds=2, output=str(tmp_path / "record.json")
    )
    deltas.main(arguments)
    record = json.loads((tmp_path / "record.json").read_text())

    # Gains of 0.1 and 0.2; 0.1 twice; 0.3 and 0.1.
    shares = record["parts"]["Lion"]["shares"]
    assert list(record["means"]) == ["0.125", "0.25", "1"]
    assert record["means"] == pytest.approx({"0.125": 2 / 3, "0.25": 1.0, "1": 4 / 3})
    assert shares["1"] == pytest.approx({"mean": 4 / 3, "low": 0.5, "high": 3.0})
    lines = deltas_section.markdown(record).splitlines()
    assert "| Lion | 0.150 ± 0.071 | 0.67 [0.50, 1.00] | 1.33 [0.50, 3.00] |" in lines
    assert lines[-1] == "| **mean** |  | 0.67 | 1.33 |"


def test_a_method_of_another_delta_is_the_default_but_for_it():
    trainer, options = TRUST_REGION_METHODS["trust_region_0.125"]
    default = TRUST_REGION_METHODS["trust_region"]
    assert (trainer, options) == (default[0], default[1] | {"trust_region_kl": 0.125})
    assert not METHODS.keys() & TRUST_REGION_METHODS.keys()


def test_measures_of_kl_agree_on_a_real_run(tiny_settings, monkeypatch):
    monkeypatch.setattr(kl_measures, "NUM_SEARCH_STEPS", 4)
    result = kl_measures.measure("AdamW", 10)
    assert result["sketches"] == pytest.approx(result["float32"], rel=0.5)
    assert result["float32, few"] > 0
    rows = [{"float32": kl, "sketches": 2 * kl, "float32, few": kl, "seconds of few": 1.0} for kl in (1.0, 3.0)]
    untimed = kl_measures.summarise(rows, [0.5, 0.1, 0.2]) | {"bfloat16": 0.0, "own batch": 0.0}
    assert (untimed["float32"], untimed["sketches"], untimed["found rate"]) == (2.0, 4.0, 0.2)
    assert untimed["sketches: spread"] == pytest.approx(2**0.5 / 2)  # of errors of 1 and 3, halved
    table = kl_section.markdown({"results": {"AdamW": result, "untimed": untimed}})
    assert f"{result['float32']:.2g}" in table
    assert table.splitlines()[-1].split(" | ")[-3:] == ["", "", "0.2 |"]
    zero = {"float32": [1e-4, 2e-4], "bfloat16 weights": [1.1e-4, 1.8e-4]}
    assert kl_section.markdown({"results": {}, "zero": zero}).splitlines()[-1] == "| ratio | 1.10 | 0.90 |"
