"""The commands on whole steps and on the scoring pass at a tiny size, their arithmetic and turn-taking. No timing is asserted."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from trl import TrlParser

from benchmarks import cost, pass_profile, score_memory
from benchmarks.cost import CostArguments, summarise
from benchmarks.cost_trainers import METHODS, Case, PerSequencePass, demo_trainers, random_trainers, save_policy
from benchmarks.interleaving import interleave, ratio_spread
from benchmarks.score_memory import Memory, ScoreMemoryArguments, measure_memory, warm_workload
from benchmarks.score_workload import CPU, Workload, WorkloadArguments, build_model, qwen3_config
from benchmarks.sections import cost as cost_section
from benchmarks.sections import pass_profile as profile_section
from benchmarks.sections import score_memory as memory_section

TINY = Case("", 64, 1, 32, prompt_length=3, completion_length=4, num_prompts=2, num_generations=2)
SMALL = "--hidden_size 64 --num_layers 2 --vocab_size 64 --batch_size 2"
MIB = 2**20


def parse(arguments_class, argv):
    (arguments,) = TrlParser([arguments_class]).parse_args_and_config(argv.split())
    return arguments


def tiny_cost(argv):
    flags = " ".join(f"--{name}={value}" for name, value in vars(TINY).items())
    return parse(CostArguments, f"{flags} --rounds 1 {argv}")


def run_command(module, arguments):
    """Run a command, and read what it wrote and printed."""
    module.main(arguments)
    return json.loads(Path(arguments.output).read_text())


@pytest.fixture
def restored_threads():
    """The command sets the process's number of threads."""
    num_threads = torch.get_num_threads()
    yield
    torch.set_num_threads(num_threads)


def test_ratios_are_taken_within_their_round():
    # 3/2, 2/1 and 10/4 of the control's step: the median is 2, while the medians' ratio is 3/2.
    seconds = {"grpo": [2.0, 1.0, 4.0], "all": [3.0, 2.0, 10.0]}
    summary = summarise({"seconds": seconds, "pass_seconds": {"all": [1.0, 0.5, 1.0]}})
    assert summary["ratios"] == {"all": {"median": 2.0, "lower": 1.75, "upper": 2.25}}
    assert summary["pass_over_control"]["all"]["median"] == 0.5
    assert summary["seconds"] is seconds
    assert ratio_spread([3.0], [2.0]) == {"median": 1.5, "lower": 1.5, "upper": 1.5}


class Recorded:
    """A trainer reduced to its loop: calls its callback as transformers does, and writes down when it works."""

    def __init__(self, name, events, failing=False):
        self.name, self.events, self.failing = name, events, failing
        self.state = SimpleNamespace(log_history=[])

    def add_callback(self, callback):
        self.callback = callback

    def train(self):
        for step in range(3):
            self.callback.on_step_begin()
            self.events.append((self.name, step))
            if self.failing:
                raise FloatingPointError("in the step")
            self.callback.on_step_end()
            self.state.log_history.append({"score/pass_time": float(step)} if self.name == "b" else {})


def test_trainers_take_turns_and_the_first_step_does_not_count():
    events = []
    measured = interleave({name: Recorded(name, events) for name in "ab"}, 2)
    assert events == [("a", 0), ("b", 0), ("b", 1), ("a", 1), ("a", 2), ("b", 2)]  # the order rotates
    assert {name: len(seconds) for name, seconds in measured["seconds"].items()} == {"a": 2, "b": 2}
    assert measured["pass_seconds"] == {"b": [1.0, 2.0]}


def test_an_error_of_a_step_reaches_the_caller():
    with pytest.raises(FloatingPointError, match="in the step"):
        interleave({"a": Recorded("a", [], failing=True)}, 2)


def test_completions_have_their_full_length_and_every_method_its_own_trainer(tmp_path):
    trainers = random_trainers(TINY, ["grpo", "last_k", "exact", "per_sequence"], tmp_path, rounds=1, seed=0)
    measured = interleave(trainers, 1)
    assert set(measured["pass_seconds"]) == {"last_k", "exact", "per_sequence"}
    for trainer in trainers.values():
        lengths = [row["completions/min_length"] for row in trainer.state.log_history if "loss" in row]
        assert lengths == [4, 4]
        assert trainer.state.global_step == 2
    assert trainers["last_k"].args.score_scope == "last_k"
    assert trainers["exact"].args.score_method == "exact"
    assert isinstance(trainers["per_sequence"]._score_pass, PerSequencePass)
    assert type(trainers["grpo"]).__name__ == "GRPOTrainer"


def test_the_demo_is_measured_on_its_task_and_batch(tmp_path):
    save_policy(TINY, tmp_path / "model", 0)
    trainers = demo_trainers(str(tmp_path / "model"), ["grpo", "lm_head"], tmp_path, rounds=1, seed=0)
    assert {name: len(seconds) for name, seconds in interleave(trainers, 1)["seconds"].items()} == {
        "grpo": 1,
        "lm_head": 1,
    }
    for trainer in trainers.values():
        (first, second, _) = trainer.state.log_history
        assert "rewards/chain_sum/mean" in first
        # 128 completions of at most 6 tokens each
        assert second["completions/max_length"] <= 6
        assert trainer.args.per_device_train_batch_size == 16 * trainer.args.num_generations


def test_the_cost_command_writes_a_complete_record_that_its_section_reads(tmp_path, capsys, restored_threads):
    record = run_command(cost, tiny_cost(f"--demo_model= --output {tmp_path / 'cost.json'}"))
    comparison = record["comparisons"]["transformers"]
    assert set(comparison["seconds"]) == set(METHODS)
    assert set(comparison["pass_seconds"]) == set(METHODS) - {"grpo"}
    assert record["settings"]["seed"] == 0
    assert record["machine"]["num_threads"] == 1
    text = cost_section.markdown(record)
    assert capsys.readouterr().out.strip() in text
    assert f"| {METHODS['lm_head'][0]} | {comparison['ratios']['lm_head']['median']:.2f} [" in text

    # The same record as vLLM's.
    record["comparisons"] = {"vllm": comparison}
    record["machine"]["versions"]["vllm"] = "0.31.0"
    text = cost_section.markdown(record)
    assert "completions come from vLLM 0.31.0" in text
    assert "| vLLM: step / GRPO's | pass / GRPO's step |" in text


@pytest.mark.parametrize("has_weights", [True, False])
def test_any_model_can_be_measured_and_its_weights_are_used_where_it_has_some(tmp_path, has_weights):
    saved = build_model(qwen3_config(64, 2, 40), 1, CPU)
    (saved if has_weights else saved.config).save_pretrained(tmp_path / "model")
    case = replace(TINY, model=str(tmp_path / "model"))
    trainers = random_trainers(case, ["grpo"], tmp_path, rounds=1, seed=0)
    trained = trainers["grpo"].model
    assert trained.config.num_hidden_layers == 2
    assert torch.equal(trained.get_input_embeddings().weight, saved.get_input_embeddings().weight) == has_weights
    assert len(interleave(trainers, 1)["seconds"]["grpo"]) == 1


def test_the_shape_of_smollm2_is_that_of_135_million_parameters():
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained("benchmarks/shapes/SmolLM2-135M"))
    assert model.num_parameters() == 134_515_008


def test_a_demo_model_that_is_missing_is_named(tmp_path, restored_threads):
    arguments = parse(CostArguments, f"--demo_model {tmp_path} --output {tmp_path / 'cost.json'}")
    with pytest.raises(ValueError, match=r"`demo_model`.*examples.tiny_qwen3"):
        cost.main(arguments)
    assert not (tmp_path / "cost.json").exists()


def test_the_profile_counts_the_arithmetic_of_both_passes(tmp_path, restored_threads):
    config = qwen3_config(64, 2, 64)
    config.tie_word_embeddings = False  # of which the products are those of one use
    build_model(config, 0, CPU).save_pretrained(tmp_path / "model")
    sizes = "--num_sequences 2 --prompt_length 3 --completion_length 5 --num_operations 4"
    arguments = parse(
        pass_profile.ProfileArguments, f"--model {tmp_path / 'model'} {sizes} --output {tmp_path / 'profile.json'}"
    )
    record = run_command(pass_profile, arguments)

    score, train = record["passes"].values()
    # Of 2 layers: queries, keys, values, their output and the three of the MLP at 2 x 8 positions; the head at 2 x 6 of them.
    forward = 2 * (2 * 8 * 2 * (4 * 64 * 64 + 3 * 64 * 192) + 2 * 6 * 64 * 64)
    assert train["gflop"] * 1e9 == pytest.approx(3 * forward, rel=0.1)  # attention itself is the rest
    assert score["gflop"] > 2 / 3 * train["gflop"]
    assert all(len(of["operations"]) == 4 for of in (score, train))
    for of in (score, train):
        assert 0 < sum(seconds for _, seconds, _ in of["operations"]) <= of["profiled_seconds"]
    name, seconds, calls = score["operations"][0]
    share = seconds / score["profiled_seconds"]
    assert f"| 1 | {name}, {share:.1%} in {calls} calls |" in profile_section.markdown(record)


@pytest.fixture
def workload():
    scores = score_memory.SCORES | {"exact": {"methods": ("exact",)}}
    return Workload(WorkloadArguments(batch_size=3), qwen3_config(64, 2, 64), score_memory.Case(16), scores)


def test_the_measured_passes_compute_the_same_norms(workload):
    norms = workload.run("exact").squared_norms
    torch.testing.assert_close(torch.stack(workload.run("per_sequence")), norms, rtol=1e-4, atol=0)
    inputs = {"input_ids": workload.input_ids, "attention_mask": torch.ones_like(workload.input_ids)}
    scores = PerSequencePass(workload.model)(inputs, workload.input_ids[:, -12:], torch.ones(3, 12))
    torch.testing.assert_close(scores.squared_norms, norms, rtol=1e-4, atol=0)
    torch.testing.assert_close(scores.sketches.square().sum(dim=1), scores.squared_norms)


def test_passes_leave_the_model_trainable_and_without_gradients(workload):
    forward = workload.model.forward
    for name in ("old_logps", "per_sequence", *score_memory.SCORES):
        workload.run(name)
    assert all(parameter.requires_grad and parameter.grad is None for parameter in workload.model.parameters())
    assert workload.model.forward == forward
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in workload.model.modules())


def memory_of_a_pass_that_holds(num_mib):
    """A scoring pass of a small model, with a buffer of known size alive meanwhile."""
    workload = warm_workload(parse(ScoreMemoryArguments, SMALL), score_memory.Case(16))

    def run():
        buffer = torch.ones(num_mib * MIB, dtype=torch.uint8)
        workload.run("all")
        del buffer

    return measure_memory(run, CPU)


def test_a_buffer_that_a_pass_holds_shows_in_its_peak():
    plain, holding = (memory_of_a_pass_that_holds(num_mib) for num_mib in (0, 64))
    difference = (holding.peak - holding.before) - (plain.peak - plain.before)
    assert difference == pytest.approx(64 * MIB, abs=4 * MIB)


def test_an_earlier_high_water_mark_does_not_count():
    # Above 32 MiB malloc always asks the kernel; below, it may hand out what earlier tests in this process gave back.
    torch.ones(256 * MIB, dtype=torch.uint8)
    memory = measure_memory(lambda: torch.ones(96 * MIB, dtype=torch.uint8), CPU)
    assert memory.peak - memory.before == pytest.approx(96 * MIB, abs=4 * MIB)


def test_memory_ratios_are_those_of_median_increments():
    increments = {name: [30] for name in score_memory.PASSES} | {"train": [50, 40, 90], "train_floor": [20]}
    summary = score_memory.summarize(
        {name: [Memory(100, 100 + number) for number in numbers] for name, numbers in increments.items()}
    )
    assert summary["train"]["increment"] == 50
    assert summary["all"]["ratios"] == pytest.approx({"increment": 0.6, "floor": 1.5})


@pytest.mark.slow
def test_the_score_memory_command_writes_every_pass_of_every_case(tmp_path, monkeypatch, capsys):
    for name, value in score_memory.ENVIRONMENT.items():
        monkeypatch.setenv(name, value)  # the command sets them; restored afterwards
    kept = ("train", "train_floor", "all", "lm_head")  # `last_k` differs by its settings only
    monkeypatch.setattr(score_memory, "PASSES", {name: score_memory.PASSES[name] for name in kept})
    monkeypatch.setattr(score_memory, "SCORES", {name: score_memory.SCORES[name] for name in kept[2:]})
    output = tmp_path / "results" / "score_memory.json"
    argv = f"{SMALL} --sequence_lengths 16 --repeats 1 --output {output}"
    record = run_command(score_memory, parse(ScoreMemoryArguments, argv))
    assert set(record) == {"settings", "machine", "passes", "target", "cases"}
    assert record["settings"]["seed"] == 0
    assert {"cpu", "num_cores", "versions", "git_revision"} <= set(record["machine"])
    cases = {(case["lora"], case["checkpointing"]): case for case in record["cases"]}
    assert set(cases) == {(False, False), (False, True), (True, False), (True, True)}
    for case in cases.values():
        assert set(case["passes"]) == set(kept)
        for name, result in case["passes"].items():
            assert result["increment"] > 0
            assert ("ratios" in result) == (name in score_memory.SCORES)
    assert capsys.readouterr().out.strip() in memory_section.markdown(record)
