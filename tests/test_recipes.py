"""Every recipe parses strictly, and every treatment differs from its control in the Algorithm block alone."""

import dataclasses
import functools
import re
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from trl import GRPOConfig, GRPOTrainer

from examples.tiny_qwen3 import start_model
from oblr_trl import OBLRPOConfig, OBLRPOTrainer
from oblr_trl.data.prompt_sets import DataArguments
from oblr_trl.data.rewards import load_rewards
from oblr_trl.data.tasks import CANDIDATES_PER_PROMPT
from oblr_trl.gradient_snr import MIN_PROMPTS
from oblr_trl.scripts.train import main, make_parser, parse
from tests import recipe_stand_ins

ROOT = Path(__file__).parent.parent
RECIPES = sorted((ROOT / "recipes").glob("*/*/config_*.yaml"))
TINY, SMOLLM2 = (
    [path for path in RECIPES if path.parent.parent.name == name] for name in ("tiny-Qwen3", "SmolLM2-135M-Instruct")
)
GPU_RECIPES = [path for path in RECIPES if path not in TINY]
ONE_COMPLETION = "_one_completion"
# Completions per step by model; 1024 elsewhere.
ROLLOUTS = {"tiny-Qwen3": 128, "Qwen3-0.6B": 128, "SmolLM2-135M-Instruct": 64}
SECTIONS = ["Model", "Data", "Generation", "Optimisation", "Evaluation and logging", "Algorithm"]
ACCELERATE_CONFIGS = {path.stem: path for path in sorted((ROOT / "recipes" / "accelerate_configs").glob("*.yaml"))}


def each(paths):
    return pytest.mark.parametrize(
        "path", paths, ids=lambda path: f"{path.parent.parent.name}/{path.parent.name}/{path.stem}"
    )


@functools.cache
def parsed(path):
    """The arguments of a recipe, read without the GPU whose precision is the default."""
    return parse(["--config", str(path), "--use_cpu", "true", "--bf16", "false"])


def split_recipe(path):
    """Header, settings shared with the control, and the Algorithm block."""
    header, rest = path.read_text().split("\n# Model\n")
    shared, algorithm = rest.split("\n# Algorithm\n")
    return header, shared, algorithm


def num_gpus(path):
    """By the product in the header."""
    (gpus,) = re.findall(r"x (\d+) GPUs = 1024", split_recipe(path)[0]) or ["1"]
    return int(gpus)


def test_the_models_and_tasks_have_the_methods_that_they_are_compared_with():
    methods = {}
    for path in RECIPES:
        methods.setdefault((path.parent.parent.name, path.stem), set()).add(path.parent.name)

    pair, all_four = {"oblrpo", "grpo"}, {"oblrpo", "grpo", "rloo", "opo"}
    of_size = {"config_math": all_four, "config_math_sgd": all_four - {"opo"}, "config_math_server": pair}
    assert methods == {
        ("tiny-Qwen3", "config_chain_sum"): all_four,
        ("tiny-Qwen3", "config_chain_sum_one_completion"): {"oblrpo"},
        ("Qwen3-4B-Base", "config_math_one_completion"): {"oblrpo"},
        ("SmolLM2-135M-Instruct", "config_arithmetic"): pair,
        ("SmolLM2-135M-Instruct", "config_lists"): pair,
        ("Qwen3-0.6B", "config_gsm8k_lora"): pair,
        ("Qwen3-0.6B-Base", "config_gsm8k"): pair,
        ("Qwen3-1.7B-Base", "config_gsm8k_lora"): pair,
        **{(f"Qwen3-{size}-Base", stem): found for size in ("4B", "8B") for stem, found in of_size.items()},
    }


@each(RECIPES)
def test_a_recipe_parses_strictly_and_builds_the_configuration_of_its_trainer(path):
    script_args, training_args, _, data_args, reward_args = parsed(path)

    written = yaml.safe_load(path.read_text())
    assert script_args.trainer == ("grpo" if path.parent.name == "grpo" else "oblrpo")
    assert type(training_args) is (GRPOConfig if script_args.trainer == "grpo" else OBLRPOConfig)
    if "learning_rate" in written:
        assert training_args.learning_rate == written["learning_rate"]  # "6e-4" without a dot is a string to YAML
    assert data_args.task_params == written.get("task_params")
    columns = ["prompt", "solution", "entry", "num_items"]
    assert len(load_rewards(reward_args, data_args, columns=columns, max_completion_length=9)) == 1


@each(RECIPES)
def test_a_recipe_has_its_sections_in_order_and_a_header_with_hardware_and_time(path):
    text, header = path.read_text(), split_recipe(path)[0]

    assert [line[2:] for line in text.splitlines() if line.startswith("# ") and line[2:] in SECTIONS] == SECTIONS
    assert all(line.startswith("#") for line in header.splitlines() if line)
    assert re.search(r"Hardware: .*\b(CPU|GPU)", header)
    assert re.search(r"\d+(\.\d+)? minutes?|not measured", header)


@each([path for path in RECIPES if path.parent.name != "grpo"])
def test_a_recipe_differs_from_its_control_in_the_algorithm_block_alone(path):
    control = path.parent.parent / "grpo" / path.name.replace(ONE_COMPLETION, "")
    shared, of_control = split_recipe(path)[1], split_recipe(control)[1]

    if ONE_COMPLETION in path.stem:  # the group size is part of the treatment: as many completions, of more prompts
        of_control = of_control.replace("num_generations: 8  # the paper's G, and TRL's default\n", "")
        of_control = of_control.replace("16 prompts x 8 completions", "128 prompts x 1 completion")
    assert shared == of_control
    assert split_recipe(path)[2] != split_recipe(control)[2]
    for name in ("per_device_train_batch_size", "gradient_accumulation_steps", "steps_per_generation", "max_steps"):
        assert getattr(parsed(path)[1], name) == getattr(parsed(control)[1], name)


@each(RECIPES)
def test_a_key_that_repeats_its_default_says_why(path):
    types = make_parser(trainer=parsed(path)[0].trainer).dataclass_types
    defaults = {field.name: field.default for kind in types for field in dataclasses.fields(kind)}

    for line in split_recipe(path)[1].splitlines():
        if line and not line.startswith("#"):
            ((key, value),) = yaml.safe_load(line).items()
            assert value != defaults[key] or "  # " in line, line


@each(RECIPES)
def test_a_recipe_takes_at_least_16_prompts_per_step_and_says_how_many(path):
    args, rollouts = parsed(path)[1], ROLLOUTS.get(path.parent.parent.name, 1024)

    rows = args.per_device_train_batch_size * args.gradient_accumulation_steps * num_gpus(path)
    prompts, rest = divmod(rows, args.num_generations)
    one = ONE_COMPLETION in path.stem or (path in SMOLLM2 and path.parent.name == "oblrpo")
    assert (rest, args.num_generations, args.num_iterations) == (0, 1 if one else 8, 1)
    assert args.steps_per_generation == args.gradient_accumulation_steps  # one optimizer step for each generation
    assert prompts * args.num_generations == rollouts
    assert prompts >= MIN_PROMPTS or (path in SMOLLM2 and path.parent.name == "grpo")  # which has no rho
    assert f"{prompts} prompts x {args.num_generations}" in path.read_text()
    if path not in [*TINY, *SMOLLM2]:
        assert f"= {rollouts} = {prompts} prompts x {args.num_generations}" in split_recipe(path)[0]


def test_no_two_recipes_write_to_the_same_directory():
    directories = [yaml.safe_load(path.read_text())["output_dir"] for path in RECIPES]

    assert len(set(directories)) == len(directories)
    assert all(directory.startswith("runs/") for directory in directories)  # which git ignores


@each(TINY)
def test_the_tiny_recipes_start_from_the_start_model_and_test_on_problems_it_was_not_taught(path):
    _, training_args, model_args, data_args, reward_args = parsed(path)
    made = start_model.StartModelArguments()

    assert model_args.model_name_or_path == made.output_dir
    assert (data_args.task, data_args.task_params) == (start_model.TASK, start_model.TASK_PARAMS)
    # The start model leaves out the recipes' test problems: same seed and size.
    assert (
        (data_args.test_seed, data_args.test_size)
        == (DataArguments(task="x").test_seed, made.test_size)
        == (10**9, 512)
    )
    assert data_args.train_seed + CANDIDATES_PER_PROMPT * data_args.train_size < start_model.SFT_SEED
    assert (training_args.eval_on_start, training_args.num_generations_eval, training_args.logging_steps) == (
        True,
        1,
        1,
    )
    assert reward_args.reward_funcs is None  # the scorer of the task


def test_the_control_leaves_every_choice_but_the_rate_to_trl():
    algorithm = yaml.safe_load(split_recipe(ROOT / "recipes/tiny-Qwen3/grpo/config_chain_sum.yaml")[2])

    assert set(algorithm) == {"learning_rate", "trainer", "output_dir"}


@each(GPU_RECIPES)
def test_the_launch_line_of_a_gpu_recipe_names_the_recipe_and_an_accelerate_config(path):
    header = split_recipe(path)[0]

    assert f"-m oblr_trl.scripts.train --config {path.relative_to(ROOT)}\n" in header + "\n"
    (config,) = re.findall(r"--config_file (\S+)", header)
    processes = re.findall(r"--num_processes (\d+)", header) or [
        load_config_from_file(str(ROOT / config)).num_processes
    ]
    assert [int(number) for number in processes] == [num_gpus(path)]
    assert ("trl vllm-serve" in header) == (parsed(path)[1].vllm_mode == "server")


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory):
    path = tmp_path_factory.mktemp("stand-ins")
    return recipe_stand_ins.write_model(path / "model"), recipe_stand_ins.write_datasets(path)


@pytest.mark.slow
@each(GPU_RECIPES)
def test_a_gpu_recipe_trains_two_steps_and_evaluates_without_vllm(path, stand_ins, tmp_path):
    overrides = recipe_stand_ins.shrink(path, *stand_ins, tmp_path / "run")
    # Without vLLM: `stop_token_ids` is a setting of its sampler.
    overrides |= {"use_cpu": True, "use_vllm": False, "generation_kwargs": "{}", "num_completions_to_print": 0}

    trainer = main(*parse(["--config", str(path), *recipe_stand_ins.flags(overrides)]))

    def steps_with(key):
        return [row["step"] for row in trainer.state.log_history if key in row]

    assert type(trainer) is (GRPOTrainer if path.parent.name == "grpo" else OBLRPOTrainer)
    (reward,) = recipe_stand_ins.read(path)["reward_funcs"]
    assert steps_with(f"rewards/{reward.split('.')[-1]}/mean") == [1, 2]
    assert steps_with("eval_reward") == [0, 2]
    assert steps_with("lr_multiplier") == ([1, 2] if path.parent.name == "oblrpo" else [])
    assert list((tmp_path / "run").glob("*.safetensors"))


def test_accelerate_knows_every_key_of_its_configs_and_launches_as_they_say():
    eight = ["ddp", "fsdp2", "zero2", "zero3", "zero3_offload"]
    processes = {"single_gpu": (1, 1), "multi_node_zero3": (16, 2)} | dict.fromkeys(eight, (8, 1))
    assert set(ACCELERATE_CONFIGS) == set(processes)
    parser = launch_command_parser()
    known = {action.dest for action in parser._actions}

    for name, path in ACCELERATE_CONFIGS.items():
        written = yaml.safe_load(path.read_text())
        args = _validate_launch_command(parser.parse_args(["--config_file", str(path), "script.py"]))[0]
        assert type(load_config_from_file(str(path))) is ClusterConfig  # which refuses unknown keys
        for section in ("deepspeed_config", "fsdp_config"):  # of which accelerate itself checks no key
            assert set(written.get(section, {})) <= known
        assert (args.use_deepspeed, args.use_fsdp, args.multi_gpu) == ("zero" in name, name == "fsdp2", name == "ddp")
        assert (args.num_processes, args.num_machines, args.mixed_precision) == (*processes[name], "bf16")
