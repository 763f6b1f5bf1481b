"""The cost study's arithmetic, its turn-taking and its command at a tiny size. No timing is asserted."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from matplotlib.figure import Figure
from tqdm import tqdm

from benchmarks import cost
from benchmarks.cost_steps import interleave
from benchmarks.cost_summary import log_log_slope, ratios, slopes, spread, summarise
from benchmarks.cost_trainers import METHODS, Case, demo_trainers, random_trainers, save_policy
from benchmarks.sections import cost as section
from benchmarks.sections import cost_vllm as vllm_section
from oblr_trl.scores import ScorePass

TINY = Case(64, 1, 32, prompt_length=3, completion_length=4, num_prompts=2, num_generations=2)
TINY_FLAGS = "--hidden_size 64 --num_layers 1 --vocab_size 32 --prompt_length 3 --completion_length 4 --num_prompts 2"
MINIMAL = f"{TINY_FLAGS} --num_generations 2 --group_sizes 2 --hidden_sizes 64 --depths 1 --num_processes 2"


def parse(*argv):
    (arguments,) = cost.make_parser().parse_args_and_config(list(argv))
    return arguments


@pytest.fixture
def fresh_threads():
    """The command sets the number of threads of the process."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_the_slope_of_a_power_is_its_exponent_without_error():
    sizes = [16.0, 32.0, 64.0, 128.0]
    for power in (0.0, 1.0, 1.5, -0.5):
        fit = log_log_slope(sizes, [3 * size**power for size in sizes])
        assert fit["slope"] == pytest.approx(power, abs=1e-12)
        assert fit["standard_error"] == pytest.approx(0.0, abs=1e-12)


def test_the_standard_error_is_that_of_least_squares():
    # x = log e^(-1, 0, 1), y = (0, 3, 0): the slope is 0, the mean 1, residuals (-1, 2, -1), their square 6 on 1 degree of
    # freedom; sum of (x - mean)^2 = 2, so the error is sqrt(6 / 1 / 2) = sqrt(3).
    fit = log_log_slope([math.exp(-1), 1.0, math.exp(1)], [1.0, math.exp(3), 1.0])
    assert fit["slope"] == pytest.approx(0.0, abs=1e-12)
    assert fit["standard_error"] == pytest.approx(math.sqrt(3))


def test_two_sizes_give_a_slope_and_no_error():
    assert log_log_slope([1.0, 2.0], [1.0, 4.0]) == {"slope": pytest.approx(2.0), "standard_error": None}


@pytest.mark.parametrize(
    ("sizes", "costs", "message"), [([2.0, 2.0], [1.0, 1.0], "at least two"), ([1.0, 2.0], [0.0, 1.0], "positive")]
)
def test_a_slope_that_does_not_exist_is_refused(sizes, costs, message):
    with pytest.raises(ValueError, match=message):
        log_log_slope(sizes, costs)


def test_ratios_are_taken_within_their_round():
    # 3/2, 2/1 and 10/4 of the control's step: the median is 2, while the medians' ratio is 3/2.
    seconds = {"grpo": [2.0, 1.0, 4.0], "all": [3.0, 2.0, 10.0]}
    assert ratios(seconds) == {"all": {"median": 2.0, "lower": 1.75, "upper": 2.25}}
    assert spread([1.5]) == {"median": 1.5, "lower": 1.5, "upper": 1.5}
    summary = summarise({"seconds": seconds, "pass_seconds": {"all": [1.0, 0.5, 1.0]}})
    assert summary["pass_over_control"]["all"]["median"] == 0.5
    assert summary["seconds"] is seconds


def test_slopes_follow_medians_of_each_cost():
    # Control x, step 2 x^2, pass x^3: the ratio of steps is 2 x, the pass over the control x^2.
    cases = [
        summarise({"seconds": {"grpo": [x] * 3, "all": [2 * x**2] * 3}, "pass_seconds": {"all": [x**3] * 3}})
        for x in (1.0, 2.0, 4.0)
    ]
    fitted = {name: fit["slope"] for name, fit in slopes([1.0, 2.0, 4.0], cases, "all").items()}
    expected = {"control_step": 1.0, "step": 2.0, "pass": 3.0, "ratio": 1.0, "pass_over_control": 2.0}
    assert fitted == pytest.approx(expected)


class Recorded:
    """A trainer reduced to its loop: calls its callback as transformers does, and writes down when it works."""

    def __init__(self, name, events, num_steps, failing=False):
        self.name, self.events, self.num_steps, self.failing = name, events, num_steps, failing
        self.state = SimpleNamespace(log_history=[])

    def add_callback(self, callback):
        self.callback = callback

    def train(self):
        for step in range(self.num_steps):
            self.callback.on_step_begin()
            self.events.append((self.name, step))
            if self.failing:
                raise FloatingPointError("in the step")
            self.callback.on_step_end()
            self.state.log_history.append({"score/pass_time": float(step)} if self.name == "b" else {})


def test_trainers_take_turns_and_the_first_step_does_not_count():
    events = []
    trainers = {name: Recorded(name, events, 3) for name in "ab"}
    with tqdm(disable=True) as progress:
        measured = interleave(trainers, 2, progress)
    assert events == [("a", 0), ("b", 0), ("b", 1), ("a", 1), ("a", 2), ("b", 2)]  # the order rotates
    assert {name: len(seconds) for name, seconds in measured["seconds"].items()} == {"a": 2, "b": 2}
    assert measured["pass_seconds"] == {"b": [1.0, 2.0]}


def test_an_error_of_a_step_reaches_the_caller():
    with tqdm(disable=True) as progress, pytest.raises(FloatingPointError, match="in the step"):
        interleave({"a": Recorded("a", [], 3, failing=True)}, 2, progress)


def test_one_backward_per_sequence_gives_the_norms_of_the_scoring_pass(tmp_path):
    save_policy(TINY, tmp_path / "policy", 0)
    trainer = random_trainers(TINY, ["per_sequence"], tmp_path, rounds=1, seed=0)["per_sequence"]
    input_ids = torch.randint(3, 32, (4, 7), generator=torch.Generator().manual_seed(0))
    output = {"prompt_ids": input_ids[:, :3], "completion_ids": input_ids[:, 3:]}
    output |= {f"{part}_mask": torch.ones_like(output[f"{part}_ids"]) for part in ("prompt", "completion")}
    scores = trainer._score_completions(output, output["completion_mask"])
    inputs = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
    expected = ScorePass(trainer.model, methods=("exact",))(inputs, input_ids[:, 3:], torch.ones(4, 4)).squared_norms
    torch.testing.assert_close(scores.squared_norms, expected, rtol=1e-4, atol=0.0)
    torch.testing.assert_close(scores.sketches.square().sum(dim=1), scores.squared_norms)


def test_completions_have_their_full_length_and_every_method_its_own_trainer(tmp_path):
    save_policy(TINY, tmp_path / "policy", 0)
    methods = ["grpo", "last_k", "exact"]
    trainers = random_trainers(TINY, methods, tmp_path, rounds=1, seed=0)
    with tqdm(disable=True) as progress:
        measured = interleave(trainers, 1, progress)
    assert set(measured["pass_seconds"]) == {"last_k", "exact"}
    for trainer in trainers.values():
        lengths = [row["completions/min_length"] for row in trainer.state.log_history if "loss" in row]
        assert lengths == [4, 4]
        assert trainer.state.global_step == 2
    assert trainers["last_k"].args.score_scope == "last_k"
    assert trainers["exact"].args.score_method == "exact"
    assert type(trainers["grpo"]).__name__ == "GRPOTrainer"


def test_the_demo_is_measured_on_its_task_and_batch(tmp_path):
    save_policy(TINY, tmp_path / "model", 0)
    trainers = demo_trainers(str(tmp_path / "model"), ["grpo", "lm_head"], tmp_path, rounds=1, seed=0)
    with tqdm(disable=True) as progress:
        measured = interleave(trainers, 1, progress)
    assert {name: len(seconds) for name, seconds in measured["seconds"].items()} == {"grpo": 1, "lm_head": 1}
    for trainer in trainers.values():
        (first, second, _) = trainer.state.log_history
        assert "rewards/chain_sum/mean" in first
        # 128 completions of at most 6 tokens each
        assert second["completions/max_length"] <= 6
        assert trainer.args.per_device_train_batch_size == 16 * trainer.args.num_generations


def test_the_command_writes_a_complete_record_that_its_section_reads(tmp_path, capsys, fresh_threads):
    output = tmp_path / "cost.json"
    argv = f"{MINIMAL} --completion_lengths 2 4 --rounds 1 --scaling_rounds 1 --demo_model= --output {output}"
    arguments = parse(*argv.split())
    cost.main(arguments)
    record = json.loads(output.read_text())
    comparison = record["comparisons"]["transformers"]
    assert set(comparison["seconds"]) == set(METHODS)
    assert set(comparison["pass_seconds"]) == set(METHODS) - {"grpo"}
    assert record["settings"]["seed"] == 0
    assert record["machine"]["num_threads"] == 1
    scaling = record["scaling"]
    assert set(scaling) == {*cost.AXES, cost.PROCESSES}
    assert set(scaling["completion length"]["slopes"]) == {
        "control_step",
        "step",
        "pass",
        "ratio",
        "pass_over_control",
    }
    assert scaling["processes"]["cases"][0]["seconds"]["all"][0] > 0
    assert scaling["layers"]["slopes"] == {}  # a single size
    assert "of a GRPO step" in capsys.readouterr().out
    text = section.markdown(record)
    ratio = comparison["ratios"]["lm_head"]["median"]
    assert f"| {METHODS['lm_head']} | {ratio:.2f} [" in text
    assert "| completion length: 2, 4 |" in text
    assert "layers: 1" not in text
    drawn = section.figure(record)
    assert isinstance(drawn, Figure)
    assert [panel.get_xlabel() for panel in drawn.axes] == [*cost.AXES, cost.PROCESSES]
    drawn.savefig(tmp_path / "figure.png")


def test_the_section_of_vllm_shows_every_method_of_the_record():
    steps = {"seconds": {"grpo": [2.0, 2.0], "all": [3.0, 3.0]}, "pass_seconds": {"all": [1.5, 1.5]}}
    comparison = {"case": vars(TINY), **summarise(steps)}
    settings = {"rounds": 2, "seed": 5}
    record = {"methods": METHODS, "comparisons": {"vllm": comparison}, "settings": settings}
    record["machine"] = {"versions": {"vllm": "0.31.0"}}
    text = vllm_section.markdown(record)
    assert f"| {METHODS['all']} | 1.50 [1.50, 1.50] | 0.75 [0.75, 0.75] |" in text
    assert "vLLM 0.31.0" in text
    assert "seed 5" in text
    assert "takes 2.00 s" in text


def test_the_number_of_steps_counts_shared_cases_once():
    # 7 methods x 2 steps, then 2 trainers x 2 steps for each of lengths 2 and 4 (4 is also the base of the other three axes)
    # and for one number of processes.
    argv = f"{MINIMAL} --completion_lengths 2 4 --rounds 1 --scaling_rounds 1"
    arguments = parse(*argv.split(), "--demo_model=")
    assert cost.num_steps(arguments) == 7 * 2 + 2 * 2 * 3


@pytest.mark.parametrize(
    ("argv", "message"),
    [(["--rounds", "0"], "`rounds`"), (["--group_sizes", "1", "2"], "`group_sizes`")],
)
def test_settings_without_a_ratio_are_refused(argv, message):
    with pytest.raises(ValueError, match=message):
        parse(*argv)


def test_a_demo_model_that_is_missing_is_named(tmp_path, fresh_threads):
    with pytest.raises(ValueError, match=r"`demo_model`.*examples.tiny_qwen3"):
        cost.main(parse("--demo_model", str(tmp_path), "--output", str(tmp_path / "cost.json")))
    assert not (tmp_path / "cost.json").exists()
