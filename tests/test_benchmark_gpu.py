"""The GPU benchmark at a tiny shape on the CPU, and what it does without a GPU or without enough memory."""

import json

import pytest
import torch
from trl import TrlParser

from benchmarks import gpu
from benchmarks.gpu import REUSED, Workload


def run_on_cpu(output, argv=""):
    """Rehearse the command, and read its cases."""
    tiny = "--device cpu --shape tiny --sequence_lengths 16 --batch_size 2 --rounds 1 --profiled tiny"
    (arguments,) = TrlParser([gpu.GpuArguments]).parse_args_and_config(f"{tiny} {argv} --output {output}".split())
    assert gpu.main(arguments) == 0
    return json.loads(output.read_text())["cases"]


def too_large(*args):
    raise torch.OutOfMemoryError("CUDA out of memory.")


def test_the_command_measures_every_pass_of_every_case(tmp_path, capsys):
    output = tmp_path / "results" / "gpu.json"
    argv = "--tuning full lora --checkpointing on off"
    cases = {(case["lora"], case["checkpointing"]): case for case in run_on_cpu(output, argv)}
    assert set(cases) == {(False, True), (False, False), (True, True), (True, False)}
    for case in cases.values():
        assert set(case["passes"]) == set(gpu.PASSES)
        assert all(result["seconds"] > 0 and result["peak"] > 0 for result in case["passes"].values())
        assert set(case["ratios"]) == {"old_logps", "all", "last_k", "lm_head", "per_sequence", REUSED}
        assert set(case["planned"]) == {"train", "all"}
        assert set(case["limits"]) == (set() if case["lora"] else set(gpu.PASSES) - {"per_sequence"})
    profiled = [case["kernels"] for case in cases.values()]
    assert set(profiled[0]) == {"train", "all"}
    assert not any(profiled[1:])  # the first case alone
    assert 0 < sum(kernel["share"] for kernel in profiled[0]["all"]) <= 1 + 1e-6
    text = capsys.readouterr().out
    assert "the goals are for a GPU" in text
    assert text == output.with_suffix(".md").read_text()


def test_without_a_gpu_the_command_says_so_and_fails(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main(gpu.GpuArguments(output=str(tmp_path / "gpu.json"))) == 1
    assert "not measured" in capsys.readouterr().err
    assert not (tmp_path / "gpu.json").exists()


def test_what_does_not_fit_is_recorded_and_the_rest_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(Workload, "train", too_large)
    (case,) = run_on_cpu(tmp_path / "gpu.json", "--tuning full --checkpointing off")
    assert case["passes"]["train"] == {"error": "out of memory"}
    assert case["passes"]["all"]["seconds"] > 0
    assert case["ratios"] == {}  # there is nothing to compare with
    assert "out of memory" in (tmp_path / "gpu.md").read_text()


def test_a_model_that_does_not_fit_costs_its_case_alone():
    assert gpu.measure(too_large, 1, torch.device("cpu")) == {name: {"error": "out of memory"} for name in gpu.PASSES}


def test_ratios_are_relative_to_training():
    # `lm_head` beyond the forward that it replaces: (0.5 - 0.4) / 2 of training.
    measured = {"train": (2.0, 100), "old_logps": (0.4, 40), "all": (1.6, 90), "lm_head": (0.5, 50)}
    passes = {name: {"seconds": seconds, "peak": peak} for name, (seconds, peak) in measured.items()}
    ratios = gpu.ratios(passes | {"last_k": {"error": "out of memory"}})
    assert ratios["all"] == {"time": pytest.approx(0.8), "peak": pytest.approx(0.9)}
    assert ratios[REUSED] == {"time": pytest.approx(0.05), "peak": pytest.approx(0.5)}
    assert "last_k" not in ratios
    case = {"shape": "tiny", "batch_size": 2, "sequence_length": 16, "lora": False, "checkpointing": False}
    case |= {"passes": passes, "ratios": ratios, "kernels": {}}
    case |= {"limits": {"all": 0.8}, "planned": {"all": 90_000_000}}
    text = gpu.table({"cases": [case], "product_rate": 7e14})
    assert "| scope all | 1.600 | 0.00 | 0.80 | 0.75 | 0.90 | 2.00 | 0.09 |" in text
    assert "700 TFLOP/s" in text


def test_the_default_cases_can_be_planned_and_have_a_limit():
    arguments = gpu.GpuArguments()
    assert len(arguments.cases()) == len(gpu.DEFAULT_CASES)
    for shape, case in arguments.cases():
        limits = gpu.limits(arguments, shape, case, rate=6e14)
        assert case.lora or limits["lm_head"] < limits["last_k"] < limits["all"] < limits["train"]
        planned = gpu.planned_peaks(arguments, shape, case, torch.device("cuda"))
        assert 1e9 < planned["all"] <= planned["train"] < 80e9


def test_no_case_is_begun_beyond_the_budget(tmp_path, capsys):
    arguments = gpu.GpuArguments(device="cpu", shape=["tiny"], budget=-1.0, output=str(tmp_path / "gpu.json"))
    assert gpu.main(arguments) == 0
    assert "for lack of time: tiny" in capsys.readouterr().err
