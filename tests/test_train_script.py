"""The training script: strict parsing, checks before the model is loaded, and real runs of two or three steps."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig

from oblr_trl.scripts.train import main, parse
from tests import recipe_stand_ins

ROOT = Path(__file__).parent.parent
OBLRPO, GRPO = (str(ROOT / "recipes/tiny-Qwen3" / method / "config_chain_sum.yaml") for method in ("oblrpo", "grpo"))
NO_EVALUATION = ("--eval_strategy", "no", "--eval_on_start", "false")


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    """A start model that was taught nothing."""
    return recipe_stand_ins.write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def small(model_dir, tmp_path):
    """Command line that shrinks a tiny recipe to two steps of two prompts."""
    sizes = {"train_size": 32, "test_size": 8, "per_device_train_batch_size": 16, "per_device_eval_batch_size": 8}
    places = {"model_name_or_path": model_dir, "output_dir": tmp_path / "run"}
    return recipe_stand_ins.flags(places | sizes | {"max_steps": 2, "disable_tqdm": True})


@pytest.fixture
def train(small):
    """A function that trains a shrunk recipe, with more arguments of the command line."""
    return lambda *arguments, recipe=OBLRPO: main(*parse(["--config", recipe, *small, *arguments]))


def history(output_dir):
    return json.loads((Path(output_dir) / "trainer_state.json").read_text())["log_history"]


def steps_with(rows, key):
    return [row["step"] for row in rows if key in row]


@pytest.mark.parametrize("separator", [" ", "="])
def test_the_command_line_overrides_the_recipe(separator):
    tokens = f"--config{separator}{OBLRPO} --learning_rate{separator}0.5 --max-steps{separator}7".split()

    _, training_args, _, data_args, _ = parse([*tokens, f"--task_params={json.dumps({'min_terms': 4})}"])

    assert (training_args.learning_rate, training_args.max_steps) == (0.5, 7)
    assert training_args.num_generations == 8  # from the recipe
    assert data_args.task_params == {"min_terms": 4}


def test_of_a_trainer_that_is_given_twice_the_last_one_counts_everywhere():
    script_args, training_args, *_ = parse(["--config", GRPO, "--trainer", "oblrpo", "--trainer", "grpo"])
    assert script_args.trainer == "grpo"
    assert type(training_args) is GRPOConfig
    with pytest.raises(ValueError, match="`snr_ema_decay` belongs to OBLR-PO, but `trainer` is 'grpo'"):
        parse(["--config", GRPO, "--trainer", "oblrpo", "--trainer=grpo", "--snr_ema_decay", "0.5"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        # An abbreviation too.
        (["--learning_rat", "1e-3"], r"Unknown key `learning_rat`; the nearest name is 'learning_rate'"),
        (["--learning_rtae=1e-3"], r"Unknown key `learning_rtae`; the nearest name is 'learning_rate'"),
        (["--qqqqq", "1"], r"Unknown key `qqqqq`\."),
        (["--trainer", "gropo"], r"`trainer` is 'gropo'; use one of oblrpo, grpo"),
        (
            ["--trainer", "grpo", "--snr_ema_decay", "1"],
            r"`baseline` belongs to OBLR-PO, but `trainer` is 'grpo': remove it, or set trainer",
        ),
        (["--task_params", "{"], r"`task_params` is '{', which is not a JSON object"),
        (["--dataset_name", "x"], r"Exactly one source of prompts is needed"),
        (["stray"], r"not used by the HfArgumentParser: \['stray'\]"),
        (["--baseline", "gradient_weigted"], r"argument --baseline: invalid choice: 'gradient_weigted' \(choose from"),
        (["--max_steps", "many"], r"argument --max_steps/--max-steps: invalid int value: 'many'"),
        (["--trainer"], r"`trainer` is ''; use one of oblrpo, grpo"),
    ],
)
def test_a_wrong_command_line_is_refused_by_name(arguments, message):
    with pytest.raises(ValueError, match=message):
        parse(["--config", OBLRPO, *arguments])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_generation": 8}, r"Unknown key `num_generation`; the nearest name is 'num_generations'"),
        ({"trainer": "grpo"}, r"`baseline` belongs to OBLR-PO, but `trainer` is 'grpo'"),
        ({"baseline": "rloo"}, r"baseline='rloo'"),
        ({"save_strategy": False}, r"False is not a valid SaveStrategy"),  # an unquoted `no` in YAML
    ],
)
def test_a_wrong_key_or_value_of_a_recipe_is_refused_by_name(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        parse(["--config", recipe_stand_ins.write_recipe(tmp_path / "r.yaml", Path(OBLRPO), **changes)])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a\n", r"The recipe .* must hold `key: value` lines, got list"),
        ("a: [\n", r"(?s)The recipe .*r.yaml' is not YAML: .*line 2"),
        (None, r"`--config` names .*r.yaml', but there is no such file"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused(tmp_path, text, message):
    if text is not None:
        (tmp_path / "r.yaml").write_text(text)

    with pytest.raises(ValueError, match=message):
        parse(["--config", str(tmp_path / "r.yaml")])


@pytest.mark.parametrize("arguments", ["", "--config", "--config --max_steps 3", "--max_steps 3 --config"])
def test_a_command_without_a_recipe_is_refused(arguments):
    with pytest.raises(ValueError, match=r"No recipe is given: write `--config FILE.yaml`"):
        parse(arguments.split())


def test_the_help_has_an_example_that_works_and_every_option(capsys):
    with pytest.raises(SystemExit, match="0"):
        parse(["--help"])

    text = capsys.readouterr().out
    assert parse(text.splitlines()[1].split()[4:])[1].max_steps == 10
    words = set(text.split())
    assert {"--baseline", "--lr_adaptation", "--task", "--reward_funcs", "--lora_r"} <= words


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "tokens", "start"),
    [
        ("train", ["--config", OBLRPO, "--baseline", "rlo"], "train: argument --baseline: invalid choice: 'rlo'"),
        ("evaluate", ["--config"], "evaluate: No recipe is given: write"),
    ],
)
def test_a_wrong_command_line_prints_one_line(script, tokens, start):
    command = [sys.executable, "-m", f"oblr_trl.scripts.{script}", *tokens]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)

    assert result.returncode == 1
    assert [line[: len(start)] for line in result.stderr.splitlines()] == [start]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        # Data and rewards are checked before the model.
        ("--model_name_or_path ./none --task chain_sun", r"`task` is 'chain_sun'.*the nearest name is 'chain_sum'"),
        ("--model_name_or_path ./none --reward_funcs tusk", r"'tusk', which is unknown; the nearest name is 'task'"),
        ("--model_name_or_path ./none", r"is './none', but there is no such directory.*python -m examples.tiny_qwen3"),
        ("--model_name_or_path modles/tiny", r"`model_name_or_path` is 'modles/tiny', but there is no such directory"),
        ("--model_name_or_path runs/x/checkpoint-9/", r"'runs/x/checkpoint-9/', but there is no such directory"),
        ("--resume_from_checkpoint true", r"is true, but .* holds no complete checkpoint: leave it out"),
        ("--resume_from_checkpoint nowhere", r"`resume_from_checkpoint` is nowhere, but there is none: leave it out"),
    ],
)
def test_what_training_needs_is_checked_before_the_model_is_loaded(train, arguments, message):
    with pytest.raises(ValueError, match=message):
        train(*arguments.split())


def test_a_recipe_without_a_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"`model_name_or_path` is not set: give a hub id or a local directory"):
        main(
            *parse(
                ["--config", recipe_stand_ins.write_recipe(tmp_path / "r.yaml", Path(OBLRPO), model_name_or_path=None)]
            )
        )


@pytest.mark.slow
def test_the_launch_line_trains_saves_and_evaluates_at_start_and_end(small, tmp_path):
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1"]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    command += ["-m", "oblr_trl.scripts.train", "--config", OBLRPO, *small]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}

    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)

    assert result.returncode == 0, result.stderr[-3000:]
    run = tmp_path / "run"
    assert f"Diagnosis of {run}\n\n" in result.stdout
    assert steps_with(history(run), "eval_accuracy") == [0, 2]  # the recipe's eval_steps is more than two
    assert all(0 <= row.get(name, 0) <= 1 for row in history(run) for name in ("accuracy", "eval_accuracy"))
    for metric in ("loss", "reward", "accuracy", "lr_multiplier", "gradient_snr/rho", "baseline/shift"):
        assert steps_with(history(run), metric) == [1, 2], metric
    assert AutoModelForCausalLM.from_pretrained(run).num_parameters() < 1_000_000
    assert AutoTokenizer.from_pretrained(run)("1").input_ids


@pytest.mark.parametrize("resume", ["true", "path"])
def test_a_checkpoint_of_oblr_po_is_refused_for_the_control(train, tmp_path, resume):
    train("--save_strategy", "steps", "--save_steps", "2", *NO_EVALUATION)
    checkpoint = str(tmp_path / "run" / "checkpoint-2") if resume == "path" else "true"

    message = r"written by `OBLRPOTrainer`, and `trainer` is 'grpo'.*trainer: oblrpo.*model_name_or_path: "
    with pytest.raises(ValueError, match=message):
        train("--resume_from_checkpoint", checkpoint, recipe=GRPO)
