"""The GPU benchmark at a tiny shape on the CPU, and what it does without a GPU or without enough memory."""

import json

import pytest
import torch
from tqdm import tqdm

from benchmarks import gpu


def parse(*argv):
    (arguments,) = gpu.make_parser().parse_args_and_config(list(argv))
    return arguments


def on_cpu(output, *argv):
    tiny = ["--device", "cpu", "--shape", "tiny", "--sequence_lengths", "16", "--batch_size", "2", "--rounds", "1"]
    return parse(*tiny, "--output", str(output), *argv)


def test_the_command_measures_every_pass_of_every_case(tmp_path, capsys):
    output = tmp_path / "results" / "gpu.json"
    assert gpu.main(on_cpu(output)) == 0
    record = json.loads(output.read_text())
    cases = {(case["lora"], case["checkpointing"]): case for case in record["cases"]}
    assert set(cases) == {(False, True), (False, False), (True, True), (True, False)}
    for case in cases.values():
        assert set(case["passes"]) == set(gpu.PASSES)
        assert all(result["seconds"] > 0 and result["peak"] > 0 for result in case["passes"].values())
        assert set(case["ratios"]) == {"old_logps", "all", "last_k", "lm_head", "per_sequence", "lm_head_riding"}
    text = capsys.readouterr().out
    assert "no goal applies" in text
    assert text.strip() in output.with_suffix(".md").read_text()


def test_without_a_gpu_the_command_says_so_and_fails(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    output = tmp_path / "gpu.json"
    assert gpu.main(parse("--output", str(output))) == 1
    assert "not measured" in capsys.readouterr().err
    assert not output.exists()


def test_what_does_not_fit_is_recorded_and_the_rest_goes_on(tmp_path, monkeypatch):
    def too_large(self):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(gpu.Workload, "train", too_large)
    output = tmp_path / "gpu.json"
    assert gpu.main(on_cpu(output, "--tuning", "full", "--checkpointing", "off")) == 0
    (case,) = json.loads(output.read_text())["cases"]
    assert case["passes"]["train"] == {"error": "out of memory"}
    assert case["passes"]["all"]["seconds"] > 0
    assert case["ratios"] == {}  # there is nothing to compare with
    assert "out of memory" in output.with_suffix(".md").read_text()


def test_a_model_that_does_not_fit_costs_its_case_alone():
    def too_large():
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with tqdm(total=4, disable=True) as progress:
        results = gpu.measure(too_large, ["train", "all"], 1, torch.device("cpu"), progress)
    assert results == {name: {"error": "out of memory"} for name in ("train", "all")}


def test_ratios_and_verdicts():
    # Riding: (0.5 - 0.4) / 2 of training; scope all takes 1.6 / 2 = 0.8 of its time, more than the goal of 0.75.
    measured = {"train": (2.0, 100), "old_logps": (0.4, 40), "all": (1.6, 90), "lm_head": (0.5, 50)}
    passes = {name: {"seconds": seconds, "peak": peak} for name, (seconds, peak) in measured.items()}
    ratios = gpu.ratios(passes | {"last_k": {"error": "out of memory"}})
    assert ratios["all"] == {"time": pytest.approx(0.8), "peak": pytest.approx(0.9)}
    assert ratios["lm_head_riding"]["time"] == pytest.approx(0.05)
    assert "last_k" not in ratios
    assert gpu._verdicts("all", ratios["all"], "cuda").endswith("goal time 0.75, peak 1.00: MISSED")
    assert gpu._verdicts("lm_head_riding", ratios["lm_head_riding"], "cuda").endswith("met")
    assert "goal" not in gpu._verdicts("all", ratios["all"], "cpu")
