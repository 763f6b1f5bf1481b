"""Every recipe parses strictly, and every treatment differs from its control in the Algorithm block alone."""

import re
from pathlib import Path

import pytest
import yaml
from trl import GRPOConfig

from oblr_trl import OBLRPOConfig
from oblr_trl.data import CANDIDATES_PER_PROMPT, DataArguments
from oblr_trl.rewards import RewardArguments, load_rewards
from oblr_trl.scripts import start_model
from oblr_trl.scripts.train import parse

ROOT = Path(__file__).parent.parent
RECIPES = sorted((ROOT / "recipes").glob("*/*/config_*.yaml"))
TREATMENTS = [path for path in RECIPES if path.parent.name != "grpo"]
SECTIONS = ["Model", "Data", "Generation", "Optimisation", "Evaluation and logging", "Algorithm"]
TINY = sorted((ROOT / "recipes" / "tiny-Qwen3").glob("*/config_chain_sum.yaml"))


def name_of(path):
    return f"{path.parent.parent.name}/{path.parent.name}/{path.stem}"


def split_recipe(path):
    """Header, settings shared with the control, and the Algorithm block."""
    header, rest = path.read_text().split("\n# Model\n")
    shared, algorithm = rest.split("\n# Algorithm\n")
    return header, shared, algorithm


def test_there_are_recipes_of_all_four_methods():
    assert [path.parent.name for path in TINY] == ["grpo", "oblrpo", "opo", "rloo"]


@pytest.mark.parametrize("path", RECIPES, ids=name_of)
def test_a_recipe_parses_strictly_and_builds_the_configuration_of_its_trainer(path):
    script_args, training_args, _, data_args, reward_args = parse(["--config", str(path)])

    written = yaml.safe_load(path.read_text())
    assert script_args.trainer == ("grpo" if path.parent.name == "grpo" else "oblrpo")
    assert type(training_args) is (GRPOConfig if script_args.trainer == "grpo" else OBLRPOConfig)
    assert training_args.learning_rate == written["learning_rate"]  # "6e-4" without a dot is a string to YAML
    assert data_args.task_params == written["task_params"]
    assert (
        len(load_rewards(reward_args, data_args, columns=["prompt", "solution", "entry"], max_completion_length=9))
        == 1
    )


@pytest.mark.parametrize("path", RECIPES, ids=name_of)
def test_a_recipe_has_its_sections_in_order_and_a_header_with_hardware_and_time(path):
    text = path.read_text()
    header = split_recipe(path)[0]

    assert [line[2:] for line in text.splitlines() if line.startswith("# ") and line[2:] in SECTIONS] == SECTIONS
    assert all(line.startswith("#") for line in header.splitlines() if line)
    assert re.search(r"Hardware: .*\b(CPU|GPU)", header)
    assert re.search(r"\d+(\.\d+)? minutes?|not measured", header)


@pytest.mark.parametrize("path", TREATMENTS, ids=name_of)
def test_a_recipe_differs_from_its_control_in_the_algorithm_block_alone(path):
    control = path.parent.parent / "grpo" / path.name

    assert split_recipe(path)[1] == split_recipe(control)[1]
    assert split_recipe(path)[2] != split_recipe(control)[2]


def test_the_algorithm_block_of_the_control_leaves_every_choice_but_the_rate_to_trl():
    keys = set(yaml.safe_load(split_recipe(ROOT / "recipes/tiny-Qwen3/grpo/config_chain_sum.yaml")[2]))

    assert keys - {"learning_rate"} == {"trainer", "output_dir"}


def test_no_two_recipes_write_to_the_same_directory():
    directories = [yaml.safe_load(path.read_text())["output_dir"] for path in RECIPES]

    assert len(set(directories)) == len(directories)
    assert all(directory.startswith("runs/") for directory in directories)  # which git ignores


@pytest.mark.parametrize("path", TINY, ids=name_of)
def test_the_tiny_recipes_start_from_the_start_model_and_test_on_problems_it_was_not_taught(path):
    _, _, model_args, data_args, _ = parse(["--config", str(path)])
    made = start_model.StartModelArguments()

    assert model_args.model_name_or_path == made.output_dir
    assert (data_args.task, data_args.task_params) == (start_model.TASK, start_model.TASK_PARAMS)
    # The start model leaves out the recipes' test problems: same seed and size.
    assert (data_args.test_seed, data_args.test_size) == (DataArguments(task="x").test_seed, made.test_size)
    assert data_args.train_seed + CANDIDATES_PER_PROMPT * data_args.train_size < start_model.SFT_SEED


def test_the_tiny_recipes_evaluate_from_start_to_end_on_512_problems():
    _, training_args, _, data_args, _ = parse(["--config", str(TINY[0])])

    assert data_args.test_size == 512
    assert training_args.eval_on_start
    assert training_args.num_generations_eval == 1
    assert training_args.logging_steps == 1


def test_a_recipe_that_names_no_reward_uses_the_scorer_of_its_task():
    assert RewardArguments().reward_funcs is None
    assert "reward_funcs" not in yaml.safe_load(TINY[0].read_text())
