"""The benchmark commands at a tiny size, and the variance estimate against explicit gradients. No timing is asserted."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import score_memory, score_pass, start_model_variance
from benchmarks.variance import (
    Method,
    Pool,
    group_gradient_grams,
    mean_variances,
    stream_advantages,
    within_prompt_variances,
)
from oblr_trl.scripts.start_model import build_model, build_tokenizer


def random_pool(num_prompts: int = 4, num_completions: int = 8, num_parameters: int = 30) -> tuple[Pool, Tensor]:
    """A pool in float64, and the scores (P, M, D) behind it."""
    generator = torch.Generator().manual_seed(0)
    shape = (num_prompts, num_completions)
    scores = torch.randn(*shape, num_parameters, generator=generator, dtype=torch.float64)
    scores *= torch.rand(*shape, 1, generator=generator, dtype=torch.float64) * 3
    rewards = torch.randint(0, 2, shape, generator=generator).double()
    norms = scores.square().sum(dim=2)
    pool = Pool(
        rewards, torch.randint(1, 9, shape, generator=generator).double(), scores @ scores.mT, {"exact": norms}
    )
    return pool, scores


def run_command(module: Any, *argv: str) -> dict[str, Any]:
    """Run a benchmark as its command line does, and read what it wrote."""
    (arguments,) = module.make_parser().parse_args_and_config(list(argv))
    module.main(arguments)
    return json.loads(Path(arguments.output).read_text())


def test_the_variance_from_gram_matrices_is_that_of_explicit_gradients():
    pool, scores = random_pool()
    method = Method("paper", "gradient_weighted", "exact", 4.0)
    advantages = stream_advantages(pool, method, num_generations=4, num_prompts=2)  # (P, K, G)
    gradients = (advantages.unsqueeze(3) * scores.unflatten(1, (2, 4))).mean(dim=2)  # (P, K, D)
    grams = group_gradient_grams(pool.grams, advantages)
    torch.testing.assert_close(grams, gradients @ gradients.mT, rtol=1e-9, atol=1e-9)
    expected = gradients.var(dim=1, correction=1).sum(dim=1)
    torch.testing.assert_close(within_prompt_variances(grams), expected, rtol=1e-9, atol=1e-9)


def test_a_rearranged_pool_holds_the_inner_products_of_the_rearranged_scores():
    pool, scores = random_pool()
    prompts = torch.tensor([2, 0, 3, 1])
    order = torch.stack([torch.randperm(8) for _ in range(4)])
    taken = pool.take(prompts, order)
    moved = torch.stack([scores[prompt, places] for prompt, places in zip(prompts, order, strict=True)])
    torch.testing.assert_close(taken.grams, moved @ moved.mT, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(taken.weights["exact"], moved.square().sum(dim=2), rtol=1e-9, atol=1e-9)


def test_the_estimated_variance_is_unbiased_over_fresh_pools():
    # One parameter, scores +-1 and r = s: RLOO's g = mean of (r_i - mean of others) s_i is the sample variance of G signs,
    # whose variance is (mu_4 - sigma^4 (G - 3) / (G - 1)) / G = (1 - 1 / 3) / 4 = 1 / 6 at G = 4.
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, (20000, 8), generator=generator).double() * 2 - 1
    pool = Pool(signs, torch.ones_like(signs), signs.unsqueeze(2) * signs.unsqueeze(1), {})
    variances = mean_variances(
        pool,
        [Method("RLOO", "leave_one_out")],
        num_generations=4,
        num_prompts=20000,
        num_partitions=1,
        generator=generator,
    )
    # The sample variance of two draws has a standard deviation below 0.25: 0.006 is more than three standard errors.
    assert variances["RLOO"] == pytest.approx(1 / 6, abs=0.006)


def test_the_rescaled_group_mean_has_the_variance_of_rloo():
    pool, _ = random_pool()
    methods = [Method("RLOO", "leave_one_out"), Method("mean", "group_mean")]
    generator = torch.Generator().manual_seed(1)
    variances = mean_variances(pool, methods, num_generations=4, num_prompts=2, num_partitions=3, generator=generator)
    assert variances["mean"] == pytest.approx(variances["RLOO"], rel=1e-9)


def test_the_automatic_prior_of_a_batch_comes_from_earlier_batches():
    pool, _ = random_pool()
    fixed = stream_advantages(pool, Method("16", "gradient_weighted", "exact", 16.0), num_generations=4, num_prompts=2)
    automatic = Method("automatic", "gradient_weighted", "exact", None)
    before = stream_advantages(pool, automatic, num_generations=4, num_prompts=2)
    torch.testing.assert_close(before[:2, 0], fixed[:2, 0], rtol=0, atol=0)  # the first batch has no past: 16
    pool.rewards[2:, 4:] = 1 - pool.rewards[2:, 4:]  # the last batch: second groups of the last two prompts
    after = stream_advantages(pool, automatic, num_generations=4, num_prompts=2)
    torch.testing.assert_close(after[:, 0], before[:, 0], rtol=0, atol=0)
    torch.testing.assert_close(after[:2, 1], before[:2, 1], rtol=0, atol=0)
    assert not torch.equal(after[2:, 1], before[2:, 1])


def test_the_variance_command_writes_ratios_and_rloo_is_one_beside_itself(tmp_path, monkeypatch, capsys):
    torch.manual_seed(0)
    tokenizer = build_tokenizer(["What is 12 + 34?"])
    for part in (build_model(tokenizer), tokenizer):
        part.save_pretrained(tmp_path / "model")
    # An untrained model never answers correctly, so its answers are scored by a property that they do have.
    scorer = SimpleNamespace(score_answer=lambda answer, entry: float(len(answer) % 2))
    monkeypatch.setattr(start_model_variance, "make_task", lambda *args, **kwargs: scorer)
    arguments = {
        "model": tmp_path / "model",
        "num_seeds": 2,
        "num_prompts": 4,
        "num_completions": 8,
        "num_partitions": 1,
    }
    arguments |= {"prompts_per_batch": 2, "num_generations": 4, "output": tmp_path / "results" / "variance.json"}
    record = run_command(
        start_model_variance, *(str(part) for pair in arguments.items() for part in (f"--{pair[0]}", pair[1]))
    )
    assert record["settings"]["model"] == "model"  # no path of this machine
    assert set(record) == {"settings", "machine", "default", "relative_to_rloo", "seeds"}
    ratios = record["relative_to_rloo"]["4"]
    assert set(ratios) == {method.label for method in start_model_variance.METHODS}
    assert ratios[start_model_variance.RLOO] == {"mean": 1.0, "std": 0.0, "min": 1.0, "max": 1.0}
    assert ratios[record["default"]]["mean"] > 0
    assert [seed["seed"] for seed in record["seeds"]] == [0, 1]
    assert record["seeds"][0]["sketch_weight_error_median"] < 0.2
    assert "target: default at most 0.7 at G = 4" in capsys.readouterr().out


def test_the_variance_command_names_what_is_missing_or_does_not_divide(tmp_path):
    with pytest.raises(ValueError, match=r"python -m oblr_trl\.scripts\.start_model"):
        start_model_variance.load_policy(str(tmp_path))
    with pytest.raises(ValueError, match="`num_prompts` is 10, which is not a multiple of `prompts_per_batch` 4"):
        start_model_variance.VarianceArguments(num_prompts=10, prompts_per_batch=4)
    with pytest.raises(ValueError, match="`num_completions` is 8, which is not two or more groups of 8"):
        start_model_variance.VarianceArguments(num_completions=8, num_generations=[8])


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
