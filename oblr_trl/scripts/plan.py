"""Says what a recipe needs before it is launched: memory of every GPU item by item, and what a step consists of.

    python -m oblr_trl.scripts.plan --config recipes/Qwen3-4B-Base/oblrpo/config_math.yaml \
        --accelerate_config recipes/accelerate_configs/zero3.yaml

Nothing is loaded, downloaded or launched, apart from the model's `config.json`. Any key of the recipe can be given on the
command line too. `--scale` prints `docs/scale.md` instead.
"""

import argparse
import json
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, TrainingArguments
from transformers.training_args import OptimizerNames
from trl import GRPOConfig, ModelConfig, get_peft_config

from oblr_trl.oblrpo_config import OBLRPOConfig
from oblr_trl.planning.launch import read_backend
from oblr_trl.planning.memory import plan_memory
from oblr_trl.planning.report import GB, as_record, format_plan, problems
from oblr_trl.planning.scale import scale_document
from oblr_trl.planning.schedule import Schedule
from oblr_trl.planning.setup import Adapter, Backend, Generation, Scoring, Setup
from oblr_trl.planning.shapes import LINEAR_LAYERS, PUBLISHED_SHAPES, ModelShape
from oblr_trl.scripts import train

# Prompts have no limit in TRL; what is counted where the recipe does not tell by `vllm_max_model_length`.
DEFAULT_PROMPT_LENGTH = 512
# PEFT's choice for the model types that the planner knows, where no target is named.
_DEFAULT_TARGETS = ("q_proj", "v_proj")
_ELEMENT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def make_parser() -> argparse.ArgumentParser:
    """The command line of this script; what it does not know goes to the parser of the recipe."""
    parser = argparse.ArgumentParser(
        prog="python -m oblr_trl.scripts.plan",
        description="Memory per GPU and rollouts per step of a recipe. Any key of the recipe can be given too.",
        allow_abbrev=False,
    )
    parser.add_argument("--config", help="the recipe")
    parser.add_argument("--accelerate_config", help="the file for `accelerate launch --config_file`")
    parser.add_argument("--num_gpus", type=int, help="number of GPUs, in place of that file's num_processes")
    parser.add_argument("--gpu_memory", type=float, default=80.0, help="GB of one GPU (default: %(default)s)")
    parser.add_argument("--margin", type=float, default=0.1, help="part of it to leave free (default: %(default)s)")
    parser.add_argument("--prompt_length", type=int, help="tokens of the longest prompt")
    parser.add_argument("--model_config", help="a config.json, in place of the model's")
    parser.add_argument("--strict", action="store_true", help="exit with status 1 if it cannot run as planned")
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    parser.add_argument("--scale", action="store_true", help="print docs/scale.md and nothing else")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Print the plan; the exit status."""
    parser = make_parser()
    arguments, recipe_flags = parser.parse_known_args(argv)
    if arguments.scale:
        sys.stdout.write(scale_document())
        return 0
    if arguments.config is None:
        parser.error("--config RECIPE is needed (or --scale)")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            name, source, setup = read_setup(arguments, recipe_flags)
    except ValueError as error:
        parser.exit(2, f"plan: {error}\n")
    # What the configuration warns of; not deprecations.
    warned = [str(warning.message) for warning in caught if warning.category is UserWarning]
    plan = plan_memory(setup, arguments.margin)
    sys.stdout.write(format_plan(name, source, setup, plan, warned))
    if arguments.json is not None:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(as_record(name, source, setup, plan, warned), indent=2) + "\n")
    has_no_prior = bool(warned) and setup.schedule.prompts_per_batch < 2
    return 1 if arguments.strict and (problems(setup, plan) or has_no_prior) else 0


def read_setup(arguments: argparse.Namespace, recipe_flags: list[str]) -> tuple[str, str, Setup]:
    """
    What a recipe and a launch say.

    Returns:
        `tuple`: The model's name, where its shape is from, and the [`~planning.Setup`].

    Raises:
        `ValueError`: For a recipe, launch file or model that cannot be read or is not covered.
    """
    num_gpus = read_backend(arguments.accelerate_config, num_gpus=arguments.num_gpus, bf16=False).num_processes
    flags = ["--config", arguments.config, *recipe_flags]
    if not torch.cuda.is_available():
        flags += ["--use_cpu", "true"]  # else bf16 is refused here, where nothing is going to run
    with _as_on(num_gpus):
        _, args, model_args, _, _ = train.parse(flags)
    if args.deepspeed is not None:
        raise ValueError("The planner reads DeepSpeed's settings from --accelerate_config: remove `deepspeed`.")
    backend = read_backend(arguments.accelerate_config, num_gpus=arguments.num_gpus, bf16=bool(args.bf16))
    name = str(model_args.model_name_or_path)
    shape, source = read_shape(name, arguments.model_config)
    assert args.max_completion_length is not None
    dtype = str((args.model_init_kwargs or {}).get("dtype", model_args.dtype))
    if dtype != "auto" and dtype not in _ELEMENT_BYTES:
        raise ValueError(f"`dtype` is {dtype!r}; the planner knows {', '.join(_ELEMENT_BYTES)} and auto.")
    setup = Setup(
        shape=shape,
        backend=backend,
        schedule=_schedule(args, backend),
        generation=_generation(args),
        prompt_length=arguments.prompt_length or _prompt_length(args, shape),
        completion_length=args.max_completion_length,
        checkpointing=args.gradient_checkpointing,
        optimizer=OptimizerNames(args.optim).value,
        gpu_memory=arguments.gpu_memory * GB,
        scoring=_scoring(args),
        adapter=_adapter(model_args),
        parameter_bytes=_ELEMENT_BYTES.get(dtype, 2),  # the published weights are bfloat16
        weight_bits=4 if model_args.load_in_4bit else 8 if model_args.load_in_8bit else None,
        momentum="momentum" in (args.optim_args or ""),
        reference_model=args.beta != 0.0,
        masked_attention=not str(model_args.attn_implementation or "").startswith("flash"),
    )
    return name, source, setup


@contextmanager
def _as_on(num_processes: int) -> Iterator[None]:
    """Let a configuration count its batches as on so many processes, none of which is started."""
    original = TrainingArguments.world_size
    TrainingArguments.world_size = property(lambda self: num_processes)  # type: ignore[assignment,method-assign]
    try:
        yield
    finally:
        TrainingArguments.world_size = original  # type: ignore[method-assign]


def read_shape(name: str, config_file: str | None = None) -> tuple[ModelShape, str]:
    """
    Shape of a model and where it is from: a file, the hub or its cache, or what the package knows of published models.

    Raises:
        `ValueError`: If there is no such file, or the hub cannot be asked and the id is not among those.
    """
    path = Path(config_file or name)
    if config_file is not None or path.is_dir() or name.startswith((".", "/", "~")):
        file = path.expanduser() if config_file is not None else path.expanduser() / "config.json"
        if not file.is_file():
            raise ValueError(
                f"There is no {str(file)!r}: make the model first (the tiny recipes' by `python -m "
                "oblr_trl.scripts.start_model`), or give --model_config."
            )
        return ModelShape.from_config(AutoConfig.from_pretrained(str(file)).to_dict()), str(file)
    try:
        return ModelShape.from_config(AutoConfig.from_pretrained(name).to_dict()), "the hub or its cache"
    except OSError as error:
        if name not in PUBLISHED_SHAPES:
            raise ValueError(
                f"The hub could not be asked for {name!r}, and its shape is not among the package's own "
                f"({', '.join(sorted(PUBLISHED_SHAPES))}): give --model_config."
            ) from error
        return PUBLISHED_SHAPES[name], "the package's table of published models (the hub could not be asked)"


def _schedule(args: GRPOConfig, backend: Backend) -> Schedule:
    # Set by the configuration.
    assert args.steps_per_generation is not None
    assert args.num_generations is not None
    lasts = args.steps_per_generation * args.num_iterations
    corrects = args.use_vllm and args.vllm_importance_sampling_correction
    scores = isinstance(args, OBLRPOConfig) and args.needs_scores
    return Schedule(
        num_processes=backend.num_processes,
        micro_batch=args.per_device_train_batch_size,
        accumulation=args.gradient_accumulation_steps,
        steps_per_generation=args.steps_per_generation,
        num_iterations=args.num_iterations,
        num_generations=args.num_generations,
        needs_old_logps=args.gradient_accumulation_steps % lasts != 0 or corrects,
        needs_scores=scores,
        scores_ride=isinstance(args, OBLRPOConfig) and scores and args.scores_ride,
    )


def _generation(args: GRPOConfig) -> Generation:
    if not args.use_vllm:
        return Generation("transformers", gathers_parameters=args.ds3_gather_for_generation)
    if args.vllm_mode == "server":
        return Generation("server")
    return Generation(
        "colocate",
        vllm_share=args.vllm_gpu_memory_utilization,
        tensor_parallel=args.vllm_tensor_parallel_size,
        sleeps=args.vllm_enable_sleep_mode,
    )


def _prompt_length(args: GRPOConfig, shape: ModelShape) -> int:
    assert args.max_completion_length is not None
    if args.use_vllm and args.vllm_max_model_length is not None:
        return max(args.vllm_max_model_length - args.max_completion_length, 1)
    return max(min(DEFAULT_PROMPT_LENGTH, shape.max_positions - args.max_completion_length), 1)


def _scoring(args: GRPOConfig) -> Scoring | None:
    if not isinstance(args, OBLRPOConfig) or not args.needs_scores:
        return None
    return Scoring(args.score_scope, args.score_last_k, args.score_sketch_dim)


def _adapter(model_args: ModelConfig) -> Adapter | None:
    peft_config: Any = get_peft_config(model_args)
    if peft_config is None:
        return None
    if peft_config.modules_to_save or peft_config.use_dora:
        raise ValueError("The planner counts plain LoRA: `lora_modules_to_save` and `use_dora` are not covered.")
    targets = peft_config.target_modules
    if targets is None:
        return Adapter(peft_config.r, _DEFAULT_TARGETS)
    if targets == "all-linear":
        return Adapter(peft_config.r, LINEAR_LAYERS)
    names = [targets] if isinstance(targets, str) else list(targets)
    unknown = set(names) - set(LINEAR_LAYERS)
    if unknown:
        raise ValueError(
            f"The planner knows the target modules {', '.join(LINEAR_LAYERS)} and all-linear, got {', '.join(sorted(unknown))}."
        )
    return Adapter(peft_config.r, tuple(name for name in LINEAR_LAYERS if name in names))


if __name__ == "__main__":
    sys.exit(main())
