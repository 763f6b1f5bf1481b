"""Every recipe parses strictly, and every treatment differs from its control in the Algorithm block alone."""

import dataclasses
import re
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.dataclasses import DeepSpeedPlugin
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from trl import GRPOConfig, GRPOTrainer

from examples.tiny_qwen3 import start_model
from oblr_trl import OBLRPOConfig, OBLRPOTrainer
from oblr_trl.data.prompt_sets import CANDIDATES_PER_PROMPT, DataArguments
from oblr_trl.data.rewards import RewardArguments, load_rewards
from oblr_trl.gradient_snr import MIN_PROMPTS
from oblr_trl.scripts.train import main, make_parser, parse
from tests import recipe_stand_ins

ROOT = Path(__file__).parent.parent
RECIPES = sorted((ROOT / "recipes").glob("*/*/config_*.yaml"))
TREATMENTS = [path for path in RECIPES if path.parent.name != "grpo"]
SECTIONS = ["Model", "Data", "Generation", "Optimisation", "Evaluation and logging", "Algorithm"]
TINY = sorted((ROOT / "recipes" / "tiny-Qwen3").glob("*/config_chain_sum.yaml"))
GPU_RECIPES = [path for path in RECIPES if path not in TINY]
MATH = [path for path in RECIPES if path.stem.startswith("config_math")]
ACCELERATE_CONFIGS = sorted((ROOT / "recipes" / "accelerate_configs").glob("*.yaml"))
# This machine has no GPU, whose precision is the default.
ON_CPU = ["--use_cpu", "true", "--bf16", "false"]


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
    script_args, training_args, _, data_args, reward_args = parse(["--config", str(path), *ON_CPU])

    written = yaml.safe_load(path.read_text())
    assert script_args.trainer == ("grpo" if path.parent.name == "grpo" else "oblrpo")
    assert type(training_args) is (GRPOConfig if script_args.trainer == "grpo" else OBLRPOConfig)
    assert training_args.learning_rate == written["learning_rate"]  # "6e-4" without a dot is a string to YAML
    assert data_args.task_params == written.get("task_params")
    columns = ["prompt", "solution", "entry"]
    assert len(load_rewards(reward_args, data_args, columns=columns, max_completion_length=9)) == 1


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


def test_the_models_and_tasks_have_the_methods_that_they_are_compared_with():
    methods = {}
    for path in GPU_RECIPES:
        methods.setdefault((path.parent.parent.name, path.stem), set()).add(path.parent.name)

    all_four = {"oblrpo", "grpo", "rloo", "opo"}
    of_size = {
        "config_math": all_four,
        "config_math_sgd": all_four - {"opo"},
        "config_math_server": {"oblrpo", "grpo"},
    }
    assert methods == {
        ("Qwen3-0.6B-Base", "config_gsm8k"): {"oblrpo", "grpo"},
        ("Qwen3-1.7B-Base", "config_gsm8k_lora"): {"oblrpo", "grpo"},
        **{(f"Qwen3-{size}-Base", stem): found for size in ("4B", "8B") for stem, found in of_size.items()},
    }


@pytest.mark.parametrize("path", RECIPES, ids=name_of)
def test_a_key_that_repeats_its_default_says_why(path):
    shared = split_recipe(path)[1]
    trainer = yaml.safe_load(path.read_text())["trainer"]
    types = make_parser(trainer=trainer).dataclass_types
    defaults = {field.name: field.default for kind in types for field in dataclasses.fields(kind)}

    for line in shared.splitlines():
        if line and not line.startswith("#"):
            ((key, value),) = yaml.safe_load(line).items()
            assert value != defaults[key] or "  # " in line, line


@pytest.mark.parametrize("path", GPU_RECIPES, ids=name_of)
def test_a_gpu_recipe_takes_one_step_of_128_prompts_of_8_completions_for_each_generation(path):
    header = split_recipe(path)[0]
    (gpus,) = {int(n) for n in re.findall(r"x (\d+) GPUs = 1024", header)} or {1}

    args = parse(["--config", str(path), *ON_CPU])[1]

    assert args.per_device_train_batch_size * args.gradient_accumulation_steps * gpus == 128 * 8
    assert args.num_generations == 8
    assert args.steps_per_generation == args.gradient_accumulation_steps
    assert args.num_iterations == 1
    assert f"= {128 * 8} = 128 prompts x 8" in header


@pytest.mark.parametrize("path", RECIPES, ids=name_of)
def test_a_recipe_takes_at_least_16_prompts_per_step_and_says_how_many(path):
    text = path.read_text()
    (gpus,) = {int(n) for n in re.findall(r"x (\d+) GPUs = 1024", text)} or {1}

    args = parse(["--config", str(path), *ON_CPU])[1]

    rows = args.per_device_train_batch_size * args.gradient_accumulation_steps * gpus
    prompts, rest = divmod(rows, args.num_generations)
    assert rest == 0
    assert prompts >= MIN_PROMPTS
    assert f"{prompts} prompts x {args.num_generations}" in text


@pytest.mark.parametrize("path", GPU_RECIPES, ids=name_of)
def test_the_launch_line_of_a_gpu_recipe_names_the_recipe_and_an_accelerate_config(path):
    header = split_recipe(path)[0]

    assert f"-m oblr_trl.scripts.train --config {path.relative_to(ROOT)}\n" in header + "\n"
    (config,) = re.findall(r"--config_file (\S+)", header)
    num_processes = load_config_from_file(str(ROOT / config)).num_processes
    overridden = re.findall(r"--num_processes (\d+)", header)
    gpus = re.findall(r"x (\d+) GPUs = 1024", header)
    assert (overridden or [str(num_processes)]) == (gpus or ["1"])
    assert ("trl vllm-serve" in header) == (parse(["--config", str(path), *ON_CPU])[1].vllm_mode == "server")


@pytest.mark.parametrize("path", GPU_RECIPES, ids=name_of)
def test_every_product_in_the_header_is_right(path):
    """For example `16 bytes x 4.02e9 parameters / 8 = 8.0 GB`."""
    text = " ".join(line.lstrip("# ") for line in split_recipe(path)[0].splitlines()).replace(". ", "; ")
    number = r"(?<![\w.])\d[\d.]*(?:e-?\d+)?"
    checked = 0
    for product, result in re.findall(rf"([^=;:,(]+) = ({number})", text):
        factors = re.findall(rf"(?:([x/]) )?({number})(?= |$)", product)
        if len(factors) < 2:
            continue  # a sum, or a number with its unit
        value = 1e-9 if "bytes" in product else 1.0
        for sign, factor in factors:
            value = value / float(factor) if sign == "/" else value * float(factor)
        assert abs(value - float(result)) <= 0.51 * 10 ** -len(result.partition(".")[2]), product
        checked += 1
    assert checked >= 3


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory):
    path = tmp_path_factory.mktemp("stand-ins")
    return recipe_stand_ins.write_model(path / "model"), recipe_stand_ins.write_data_sets(path)


@pytest.mark.slow
@pytest.mark.parametrize("path", GPU_RECIPES, ids=name_of)
def test_a_gpu_recipe_trains_two_steps_and_evaluates_without_vllm(path, stand_ins, tmp_path):
    overrides = recipe_stand_ins.shrink(path, *stand_ins, tmp_path / "run")
    # Without vLLM: `stop_token_ids` is a setting of its sampler.
    overrides |= {"use_cpu": True, "use_vllm": False, "generation_kwargs": "{}", "num_completions_to_print": 0}

    trainer = main(*parse(["--config", str(path), *recipe_stand_ins.flags(overrides)]))

    assert type(trainer) is (GRPOTrainer if path.parent.name == "grpo" else OBLRPOTrainer)
    logged = trainer.state.log_history
    assert [row["step"] for row in logged if "rewards/accuracy_reward/mean" in row] == [1, 2]
    assert [row["step"] for row in logged if "eval_reward" in row] == [0, 2]
    needs_scores = path.parent.name == "oblrpo"
    assert [row["step"] for row in logged if "lr_multiplier" in row] == ([1, 2] if needs_scores else [])
    assert list((tmp_path / "run").glob("*.safetensors"))


def test_there_is_an_accelerate_config_for_every_way_to_share_a_model():
    names = ["ddp", "fsdp2", "multi_node_zero3", "single_gpu", "zero2", "zero3", "zero3_offload"]

    assert [path.stem for path in ACCELERATE_CONFIGS] == names


def launch_arguments(path):
    """What `accelerate launch --config_file path` makes of its arguments."""
    args = launch_command_parser().parse_args(["--config_file", str(path), "script.py"])
    return _validate_launch_command(args)[0]


@pytest.mark.parametrize("path", ACCELERATE_CONFIGS, ids=lambda path: path.stem)
def test_accelerate_reads_its_config_and_launches_as_it_says(path):
    config = load_config_from_file(str(path))

    args = launch_arguments(path)

    assert type(config) is ClusterConfig
    assert args.use_deepspeed == ("zero" in path.stem)
    assert args.use_fsdp == (path.stem == "fsdp2")
    assert args.multi_gpu == (path.stem == "ddp")
    processes = {"single_gpu": 1, "multi_node_zero3": 16}.get(path.stem, 8)
    assert (args.num_processes, args.mixed_precision) == (processes, "bf16")
    assert args.num_machines == (2 if path.stem == "multi_node_zero3" else 1)


@pytest.mark.parametrize("path", ACCELERATE_CONFIGS, ids=lambda path: path.stem)
def test_accelerate_knows_every_key_of_its_config(path):
    written = yaml.safe_load(path.read_text())
    known = {action.dest for action in launch_command_parser()._actions}

    assert set(written) <= {field.name for field in dataclasses.fields(ClusterConfig)}
    for section in ("deepspeed_config", "fsdp_config"):  # of which accelerate itself checks no key
        assert set(written.get(section, {})) <= known


def test_accelerate_refuses_a_key_that_it_does_not_know(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text((ROOT / "recipes/accelerate_configs/zero3.yaml").read_text() + "num_gpus: 8\n")

    with pytest.raises(ValueError, match=r"unknown keys \(\['num_gpus'\]\)"):
        load_config_from_file(str(path))


@pytest.mark.parametrize(
    ("name", "stage", "device"),
    [("zero2", 2, "none"), ("zero3", 3, "none"), ("zero3_offload", 3, "cpu"), ("multi_node_zero3", 3, "none")],
)
def test_a_deepspeed_plugin_is_built_from_its_config(name, stage, device, monkeypatch):
    pytest.importorskip("deepspeed")
    path = ROOT / "recipes" / "accelerate_configs" / f"{name}.yaml"
    args = launch_arguments(path)
    args.deepspeed_fields_from_accelerate_config = (
        ""  # the fields that a DeepSpeed file, of which there is none, may not repeat
    )
    set_environment(monkeypatch, prepare_deepspeed_cmd_env(args)[1])

    plugin = DeepSpeedPlugin()

    zero = plugin.deepspeed_config["zero_optimization"]
    assert plugin.zero_stage == zero["stage"] == stage
    assert zero["offload_optimizer"]["device"] == zero["offload_param"]["device"] == device
    assert plugin.zero3_init_flag == zero["stage3_gather_16bit_weights_on_model_save"] == (stage == 3)
    for key in ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"):
        assert plugin.deepspeed_config[key] == "auto"  # which the trainer fills in from the recipe


def test_an_fsdp_2_plugin_is_built_from_its_config(monkeypatch):
    path = ROOT / "recipes" / "accelerate_configs" / "fsdp2.yaml"
    set_environment(monkeypatch, prepare_multi_gpu_env(launch_arguments(path)))

    plugin = FullyShardedDataParallelPlugin()

    assert plugin.fsdp_version == 2
    assert plugin.reshard_after_forward is True
    assert plugin.state_dict_type.name == "FULL_STATE_DICT"
    assert plugin.cpu_ram_efficient_loading
    assert not plugin.activation_checkpointing


def set_environment(monkeypatch, environment):
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
