"""The benchmark commands of the scoring pass at a tiny size. No timing is asserted."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import score_memory, score_pass


def run_command(module: Any, *argv: str) -> dict[str, Any]:
    """Run a benchmark as its command line does, and read what it wrote."""
    (arguments,) = module.make_parser().parse_args_and_config(list(argv))
    module.main(arguments)
    return json.loads(Path(arguments.output).read_text())


def test_the_score_pass_command_writes_every_ratio_and_all_timings(tmp_path, capsys):
    output = tmp_path / "results" / "score_pass.json"
    tiny = "--hidden_size 64 --num_layers 2 --vocab_sizes 64 --batch_size 2 --sequence_lengths 8 16 --rounds 2"
    record = run_command(score_pass, *tiny.split(), "--output", str(output))
    assert set(record) == {"settings", "machine", "passes", "cases"}
    assert {"cpu", "num_cores", "load_average", "versions", "git_revision"} <= set(record["machine"])
    assert [case["sequence_length"] for case in record["cases"]] == [8, 16]
    for case in record["cases"]:
        assert set(case["ratios"]) == set(score_pass.RATIOS)
        assert {name: len(seconds) for name, seconds in case["seconds"].items()} == dict.fromkeys(score_pass.PASSES, 2)
    assert "sketching adds" in capsys.readouterr().out


def test_the_timed_passes_compute_the_same_norms():
    args = score_pass.ScorePassArguments(hidden_size=64, num_layers=2, batch_size=3)
    model = score_pass.build_model(args, 64, torch.device("cpu"))
    passes = score_pass.Passes(model, args, torch.randint(0, 64, (3, 16)))
    exact = passes.score("exact").squared_norms
    assert exact is not None
    torch.testing.assert_close(torch.stack(passes.per_sequence()), exact, rtol=1e-4, atol=0)


def test_timing_leaves_the_model_trainable_and_without_gradients():
    args = score_pass.ScorePassArguments(hidden_size=64, num_layers=2, batch_size=2)
    model = score_pass.build_model(args, 64, torch.device("cpu"))
    forward = model.forward
    passes = score_pass.Passes(model, args, torch.randint(0, 64, (2, 16)))
    for name in score_pass.PASSES:
        assert passes.run(name) > 0
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert model.forward == forward
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


MIB = 2**20


def memory_of_a_pass_that_holds(num_mib: int) -> score_memory.Memory:
    """A scoring pass of a small model, with a buffer of known size alive meanwhile."""
    args = score_memory.ScoreMemoryArguments(hidden_size=64, num_layers=2, vocab_size=64, batch_size=2)
    workload = score_memory.Workload(args, score_memory.Case(16, lora=False, checkpointing=False), torch.device("cpu"))
    workload.warm_up()

    def run() -> None:
        buffer = torch.ones(num_mib * MIB, dtype=torch.uint8)
        workload.run("all")
        del buffer

    return score_memory.measure_memory(run, torch.device("cpu"))


def test_a_buffer_that_a_pass_holds_shows_in_its_peak_and_not_in_what_it_keeps():
    plain, holding = (memory_of_a_pass_that_holds(num_mib) for num_mib in (0, 64))
    difference = (holding.peak - holding.before) - (plain.peak - plain.before)
    assert difference == pytest.approx(64 * MIB, abs=4 * MIB)
    assert holding.after - holding.before < 16 * MIB


def test_an_earlier_high_water_mark_does_not_count():
    # Above 32 MiB malloc always asks the kernel; below, it may hand out what earlier tests in this process gave back.
    torch.ones(256 * MIB, dtype=torch.uint8)
    memory = score_memory.measure_memory(lambda: torch.ones(96 * MIB, dtype=torch.uint8), torch.device("cpu"))
    assert memory.peak - memory.before == pytest.approx(96 * MIB, abs=4 * MIB)


def test_memory_ratios_are_those_of_median_increments():
    def memories(*increments: int) -> list[score_memory.Memory]:
        return [score_memory.Memory(100, 100 + increment, 100) for increment in increments]

    measured = {name: memories(30) for name in score_memory.PASSES}
    measured |= {"train": memories(50, 40, 90), "train_accumulating": memories(40), "train_floor": memories(20)}
    summary = score_memory.summarize(measured)
    assert summary["train"]["increment"] == 50
    assert summary["train"]["increment_spread"] == 50  # 90 - 40
    # 130 of 150; 30 of 50, of 40 and of 20.
    expected = {"peak": 130 / 150, "increment": 0.6, "activations": 0.75, "floor": 1.5}
    assert summary["all"]["ratios"] == pytest.approx(expected)


@pytest.mark.slow
def test_the_score_memory_command_writes_every_pass_of_every_case(tmp_path, monkeypatch, capsys):
    kept = ("train", "train_accumulating", "train_floor", "all")  # the others differ by their settings only
    monkeypatch.setattr(score_memory, "PASSES", {name: score_memory.PASSES[name] for name in kept})
    monkeypatch.setattr(score_memory, "SCORE_PASSES", {"all": score_memory.SCORE_PASSES["all"]})
    output = tmp_path / "results" / "score_memory.json"
    tiny = "--hidden_size 64 --num_layers 2 --vocab_size 64 --batch_size 2 --sequence_lengths 16 --repeats 1"
    record = run_command(score_memory, *tiny.split(), "--output", str(output))
    assert set(record) == {"settings", "machine", "passes", "target", "cases"}
    assert record["settings"]["seed"] == 0
    assert {"cpu", "num_cores", "versions", "git_revision"} <= set(record["machine"])
    cases = {(case["lora"], case["checkpointing"]): case for case in record["cases"]}
    assert set(cases) == {(False, False), (False, True), (True, False), (True, True)}
    for case in cases.values():
        assert set(case["passes"]) == set(score_memory.PASSES)
        for name, result in case["passes"].items():
            assert result["peak"] >= result["before"] > 0
            assert ("ratios" in result) == (name in score_memory.SCORE_PASSES)
    assert "Target of every scoring pass" in capsys.readouterr().out
