"""The training script: strict parsing, checks before the model is loaded, and real runs of two or three steps."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from peft import PeftConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer, ModelConfig

from examples.tiny_qwen3.model import build_model, build_tokenizer
from oblr_trl import OBLRPOConfig, OBLRPOTrainer
from oblr_trl.data.prompt_sets import DataArguments
from oblr_trl.data.rewards import RewardArguments
from oblr_trl.scripts.train import TrainScriptArguments, main, make_parser, parse

ROOT = Path(__file__).parent.parent
RECIPES = ROOT / "recipes" / "tiny-Qwen3"
OBLRPO = str(RECIPES / "oblrpo" / "config_chain_sum.yaml")
GRPO = str(RECIPES / "grpo" / "config_chain_sum.yaml")


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    """A start model that was taught nothing."""
    path = tmp_path_factory.mktemp("model")
    tokenizer = build_tokenizer(["State the final answer to the following arithmetic problem: 1 + 2 - 3 ="] * 8)
    build_model(tokenizer).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


@pytest.fixture
def small(model_dir, tmp_path):
    """Command line that shrinks a tiny recipe to two steps of two prompts."""
    settings = {
        "model_name_or_path": model_dir,
        "output_dir": str(tmp_path / "run"),
        "train_size": 32,
        "test_size": 8,
        "per_device_train_batch_size": 16,
        "per_device_eval_batch_size": 8,
        "max_steps": 2,
        "disable_tqdm": True,
    }
    return [token for key, value in settings.items() for token in (f"--{key}", str(value))]


def write_recipe(path, base=OBLRPO, **changes):
    """A copy of a recipe with some keys changed, or left out where the change is None."""
    recipe = yaml.safe_load(Path(base).read_text()) | changes
    path.write_text(yaml.safe_dump({key: value for key, value in recipe.items() if value is not None}))
    return str(path)


def history(output_dir):
    return json.loads((Path(output_dir) / "trainer_state.json").read_text())["log_history"]


def steps_with(rows, key):
    return [row["step"] for row in rows if key in row]


def test_the_parser_returns_the_arguments_of_main():
    arguments = make_parser().parse_args_and_config(["--config", OBLRPO])

    kinds = [TrainScriptArguments, OBLRPOConfig, ModelConfig, DataArguments, RewardArguments]
    assert [type(argument) for argument in arguments] == kinds


@pytest.mark.parametrize("separator", [" ", "="])
def test_the_command_line_overrides_the_recipe(separator):
    tokens = f"--config{separator}{OBLRPO} --learning_rate{separator}0.5 --max-steps{separator}7".split()

    training_args = parse(tokens)[1]

    assert (training_args.learning_rate, training_args.max_steps) == (0.5, 7)
    assert training_args.num_generations == 8  # from the recipe


def test_task_parameters_can_be_given_on_the_command_line():
    assert parse(["--config", OBLRPO, "--task_params", '{"min_terms": 4, "max_terms": 5}'])[3].task_params == {
        "min_terms": 4,
        "max_terms": 5,
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--learning_rat", "1e-3"],
            r"Unknown key `learning_rat`; the nearest name is 'learning_rate'",
        ),  # a prefix too
        (["--learning_rtae=1e-3"], r"Unknown key `learning_rtae`; the nearest name is 'learning_rate'"),
        (["--qqqqq", "1"], r"Unknown key `qqqqq`\."),
        (["--trainer", "gropo"], r"`trainer` is 'gropo'; use one of oblrpo, grpo"),
        (["--trainer", "grpo"], r"`baseline` belongs to OBLR-PO, but `trainer` is 'grpo': remove it, or set trainer"),
        (["--task_params", "{"], r"`task_params` is '{', which is not a JSON object"),
        (["--dataset_name", "x"], r"Exactly one source of prompts is needed"),
        (["stray"], r"not used by the HfArgumentParser: \['stray'\]"),
        (["--baseline", "gradient_weigted"], r"argument --baseline: invalid choice: 'gradient_weigted' \(choose from"),
        (["--max_steps", "many"], r"argument --max_steps/--max-steps: invalid int value: 'many'"),
        (["--trainer"], r"argument --trainer: expected one argument"),
    ],
)
def test_a_wrong_command_line_is_refused_by_name(arguments, message):
    with pytest.raises(ValueError, match=message):
        parse(["--config", OBLRPO, *arguments])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_generation": 8}, r"Unknown key `num_generation`; the nearest name is 'num_generations'"),
        ({"score_sketch_dims": 64}, r"Unknown key `score_sketch_dims`; the nearest name is 'score_sketch_dim'"),
        ({"trainr": "grpo"}, r"Unknown key `trainr`; the nearest name is 'trainer'"),
        ({"trainer": "grpo"}, r"`baseline` belongs to OBLR-PO, but `trainer` is 'grpo'"),
        ({"baseline": "rloo"}, r"baseline='rloo'"),
        ({"save_strategy": False}, r"False is not a valid SaveStrategy"),  # an unquoted `no` in YAML
    ],
)
def test_a_wrong_key_or_value_of_a_recipe_is_refused_by_name(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        parse(["--config", write_recipe(tmp_path / "r.yaml", **changes)])


def test_a_key_of_oblr_po_is_refused_for_the_control_also_on_the_command_line():
    with pytest.raises(ValueError, match=r"`snr_ema_decay` belongs to OBLR-PO, but `trainer` is 'grpo'"):
        parse(["--config", GRPO, "--snr_ema_decay", "0.5"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a\n", r"The recipe .* must hold `key: value` lines, got list"),
        ("a: [\n", r"The recipe .*r.yaml' is not YAML: .*line 2"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused(tmp_path, text, message):
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(ValueError, match=f"(?s){message}"):
        parse(["--config", str(tmp_path / "r.yaml")])


def test_a_recipe_that_does_not_exist_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"`--config` names .*none.yaml', but there is no such file"):
        parse(["--config", str(tmp_path / "none.yaml")])


@pytest.mark.parametrize(
    "tokens", [[], ["--config"], ["--config", "--max_steps", "3"], ["--max_steps", "3", "--config"]]
)
def test_a_command_without_a_recipe_is_refused(tokens):
    with pytest.raises(ValueError, match=r"No recipe is given: write `--config FILE.yaml`"):
        parse(tokens)


def test_the_help_begins_with_config_an_example_and_our_own_options(capsys):
    with pytest.raises(SystemExit, match="0"):
        parse(["--help"])

    text = capsys.readouterr().out
    lines = text.splitlines()
    assert lines[0] == "usage: python -m oblr_trl.scripts.train --config RECIPE [--KEY VALUE ...]"
    (example,) = [line for line in lines[:8] if line.startswith("  python -m oblr_trl.scripts.train --config ")]
    assert parse(example.split()[3:])[1].max_steps == 10  # the example is a command that works
    order = [
        "--config RECIPE",
        "--trainer",
        "--baseline ",
        "--lr_adaptation",
        "--task ",
        "--reward_funcs",
        "--max_steps",
    ]
    places = [text.index(f"\n  {option}") for option in order if option != "--config RECIPE"]
    assert text.index("--config RECIPE ") < places[0]
    assert places == sorted(places)
    assert text.index("\n  --max_steps") < text.index(
        "\n  --model_name_or_path"
    )  # TRL's own classes come after our options too
    for parser in (make_parser(), make_parser(trainer="grpo")):  # every option is there, whoever declares it
        words = set(parser.format_help().replace(",", " ").split())
        assert {option for action in parser._actions for option in action.option_strings} - {"-h", "--help"} <= words


@pytest.mark.slow
def test_a_wrong_command_line_prints_one_line():
    for script, tokens, start in (
        ("train", ["--config", OBLRPO, "--baseline", "rlo"], "train: argument --baseline: invalid choice: 'rlo'"),
        ("evaluate", ["--config"], "evaluate: No recipe is given: write"),
    ):
        command = [sys.executable, "-m", f"oblr_trl.scripts.{script}", *tokens]
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)

        assert result.returncode == 1
        assert [line[: len(start)] for line in result.stderr.splitlines()] == [start]


@pytest.mark.parametrize("name", ["modles/tiny", "Qwen3-tiny", "runs/x/checkpoint-9/", "./modles/tiny"])
def test_a_misspelt_model_is_refused_without_the_hubs_stack_trace(small, name):
    with pytest.raises(
        ValueError, match=rf"`model_name_or_path` is '{name}', but there is no such directory"
    ) as error:
        main(*parse(["--config", OBLRPO, *small, "--model_name_or_path", name]))

    assert error.value.__context__ is None  # of which a traceback would show


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task", "chain_sun"], r"`task` is 'chain_sun'.*the nearest name is 'chain_sum'"),
        (["--reward_funcs", "tusk"], r"`reward_funcs` names 'tusk', which is unknown; the nearest name is 'task'"),
        ([], r"`model_name_or_path` is .*no such directory.*python -m examples.tiny_qwen3 --output_dir"),
    ],
)
def test_data_and_rewards_are_checked_before_the_model(small, tmp_path, arguments, message):
    missing = ["--model_name_or_path", str(tmp_path / "no-model")]

    with pytest.raises(ValueError, match=message):
        main(*parse(["--config", OBLRPO, *small, *missing, *arguments]))


def test_a_recipe_without_a_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"`model_name_or_path` is not set: give a hub id or a local directory"):
        main(*parse(["--config", write_recipe(tmp_path / "r.yaml", model_name_or_path=None)]))


@pytest.mark.parametrize(
    ("resume", "message"),
    [
        ("true", r"`resume_from_checkpoint` is true, but .* holds no complete checkpoint: leave it out"),
        ("nowhere", r"`resume_from_checkpoint` is 'nowhere', but there is no such directory"),
    ],
)
def test_a_checkpoint_that_does_not_exist_is_refused(small, resume, message):
    with pytest.raises(ValueError, match=message):
        main(*parse(["--config", OBLRPO, *small, "--resume_from_checkpoint", resume]))


@pytest.mark.slow
def test_the_launch_line_trains_saves_and_evaluates_at_start_and_end(small, tmp_path):
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1"]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    command += ["-m", "oblr_trl.scripts.train", "--config", OBLRPO, *small]

    result = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300
    )

    assert result.returncode == 0, result.stderr[-3000:]
    run = tmp_path / "run"
    rows = history(run)
    assert steps_with(rows, "eval_accuracy") == [0, 2]  # the recipe's eval_steps is more than the two steps taken
    for metric in ("loss", "reward", "accuracy", "lr_multiplier", "gradient_snr/rho", "baseline/shift"):
        assert steps_with(rows, metric) == [1, 2], metric
    assert AutoModelForCausalLM.from_pretrained(run).num_parameters() < 1_000_000
    assert AutoTokenizer.from_pretrained(run)("1").input_ids


@pytest.mark.slow
def test_the_control_is_trained_by_the_grpo_of_trl(small):
    trainer = main(*parse(["--config", GRPO, *small]))

    assert type(trainer) is GRPOTrainer
    assert type(trainer.args) is GRPOConfig
    assert (trainer.loss_type, trainer.scale_rewards) == ("dapo", "group")
    assert not any(key.startswith(("baseline/", "gradient_snr/")) for row in trainer.state.log_history for key in row)
    assert steps_with(trainer.state.log_history, "eval_accuracy") == [0, 2]


@pytest.mark.slow
def test_the_last_step_is_evaluated_once(small):
    trainer = main(*parse(["--config", OBLRPO, *small, "--eval_steps", "2"]))

    assert type(trainer) is OBLRPOTrainer
    assert steps_with(trainer.state.log_history, "eval_accuracy") == [0, 2]


@pytest.mark.slow
def test_a_run_resumed_from_its_last_checkpoint_equals_an_uninterrupted_one(small, tmp_path):
    whole, resumed = tmp_path / "run", tmp_path / "resumed"
    saving = ["--max_steps", "3", "--save_strategy", "steps", "--save_steps", "1"]
    saving += ["--reward_funcs", "tests.custom_rewards.length_reward"]  # an untaught model has no sum right
    main(*parse(["--config", OBLRPO, *small, *saving]))
    shutil.copytree(
        whole / "checkpoint-2", resumed / "checkpoint-2"
    )  # as if it had been interrupted in its third step

    main(
        *parse(["--config", OBLRPO, *small, *saving, "--output_dir", str(resumed), "--resume_from_checkpoint", "true"])
    )

    def training_rows(output_dir):
        clocks = ("step_time", "score/pass_time")
        rows = [row for row in history(output_dir) if "lr_multiplier" in row]
        return [{key: value for key, value in row.items() if key not in clocks} for row in rows]

    assert [row["step"] for row in training_rows(resumed)] == [1, 2, 3]
    assert training_rows(resumed) == training_rows(whole)
    assert all(row["grad_norm"] > 0 for row in training_rows(whole))
    assert (resumed / "checkpoint-3").is_dir()
    assert not (resumed / "checkpoint-1").exists()  # the first two steps were not taken again


@pytest.mark.parametrize("resume", ["true", "path"])
def test_a_checkpoint_of_oblr_po_is_refused_for_the_control(small, tmp_path, resume):
    run = tmp_path / "run"
    saving = ["--save_strategy", "steps", "--save_steps", "2"]
    main(*parse(["--config", OBLRPO, *small, *saving, "--eval_strategy", "no", "--eval_on_start", "false"]))
    wanted = str(run / "checkpoint-2") if resume == "path" else "true"
    arguments = parse(["--config", GRPO, *small, *saving, "--resume_from_checkpoint", wanted])

    with pytest.raises(
        ValueError, match=r"written by `OBLRPOTrainer`, and `trainer` is 'grpo'.*trainer: oblrpo.*model_name_or_path: "
    ):
        main(*arguments)


@pytest.mark.slow
def test_adapters_are_trained_and_saved_on_request(small, tmp_path):
    lora = ["--use_peft", "true", "--lora_r", "4", "--lora_target_modules", "all-linear", "--eval_strategy", "no"]

    main(*parse(["--config", write_recipe(tmp_path / "r.yaml", eval_on_start=False), *small, *lora]))

    assert PeftConfig.from_pretrained(tmp_path / "run").r == 4
    assert not steps_with(history(tmp_path / "run"), "eval_accuracy")
