"""Calculate what a recipe needs before it is launched: memory of every GPU item by item, and the parts of a step.

    python -m oblr_trl.scripts.plan --config recipes/Qwen3-4B-Base/oblrpo/config_math.yaml \
        --accelerate_config recipes/accelerate_configs/zero3.yaml

Nothing is loaded, downloaded or launched, apart from the model's `config.json`. See docs/planning.md.
"""

import argparse
import json
import math
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from transformers import TrainingArguments
from transformers.training_args import OptimizerNames
from trl import get_peft_config

from oblr_trl.planning.launch import read_backend
from oblr_trl.planning.memory import PHASES, MemoryItem, num_states, phase_bytes, plan_memory, plan_vllm
from oblr_trl.planning.models import read_config
from oblr_trl.planning.setup import Setup
from oblr_trl.scripts import train

GB = 1e9
# Left for CUDA's and NCCL's own memory and for fragmentation: an assumption, not measured.
MARGIN = 0.1
# Prompts have no limit in TRL; what is counted where the recipe does not tell by `vllm_max_model_length`.
DEFAULT_PROMPT_LENGTH = 512
_ELEMENT_BYTES = {"auto": 2, "float32": 4, "bfloat16": 2, "float16": 2}  # the published weights are bfloat16


def make_parser() -> argparse.ArgumentParser:
    """The command line of this script; what it does not know goes to the parser of the recipe."""
    parser = argparse.ArgumentParser(
        prog="python -m oblr_trl.scripts.plan",
        description="Memory per GPU and rollouts per step of a recipe. Any key of the recipe can be given too.",
        allow_abbrev=False,
    )
    parser.add_argument("--config", required=True, help="the recipe")
    parser.add_argument("--accelerate_config", help="the file for `accelerate launch --config_file`")
    parser.add_argument("--num_gpus", type=int, help="number of GPUs, in place of that file's num_processes")
    parser.add_argument("--gpu_memory", type=float, default=80.0, help="GB of one GPU (default: %(default)s)")
    parser.add_argument("--prompt_length", type=int, help="tokens of the longest prompt")
    parser.add_argument("--model_config", help="a config.json, in place of the model's")
    parser.add_argument("--strict", action="store_true", help="exit with status 1 if it cannot run as planned")
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Print the plan; the exit status."""
    parser = make_parser()
    arguments, recipe_flags = parser.parse_known_args(argv)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            name, source, setup = read_setup(arguments, recipe_flags)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of PEFT and transformers, about models that are not going to be trained
            items = plan_memory(setup)
    except ValueError as error:
        parser.exit(2, f"plan: {error}\n")
    warned = [str(warning.message) for warning in caught if warning.category is UserWarning]  # of the recipe
    rollouts, problems = count_rollouts(setup), find_problems(setup, items)
    lines = [f"{name}: shape from {source}", *_report(setup, items, rollouts)]
    sys.stdout.write("\n".join([*lines, *(f"WARNING: {line}" for line in [*warned, *problems])]) + "\n")
    if arguments.json is not None:
        record = {
            "model": name,
            "shape_source": source,
            "num_parameters": setup.num_base,
            "num_trainable": setup.num_trained,
            "num_gpus": setup.backend.num_processes,
            "gpu_memory_bytes": setup.gpu_memory,
            "items": [{"name": item.name, "bytes": item.num_bytes, "phases": item.phases} for item in items],
            "totals": phase_bytes(items),
            "fits": max(phase_bytes(items).values()) <= _available(setup),
            "problems": problems,
            "warnings": warned,
            **rollouts,
        }
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(record, indent=2) + "\n")
    scoring = setup.scoring
    wants_prior = (
        scoring is not None and scoring.baseline == "gradient_weighted" and scoring.baseline_prior_strength != 0
    )
    has_no_prior = wants_prior and rollouts["prompts_per_batch"] < 2
    return 1 if arguments.strict and (problems or has_no_prior) else 0


def read_setup(arguments: argparse.Namespace, recipe_flags: list[str]) -> tuple[str, str, Setup]:
    """
    The model's name, where its shape is from, and the setup that recipe and launch describe.

    Raises:
        `ValueError`: For a recipe, launch file or model that cannot be read or is not covered.
    """
    backend = read_backend(arguments.accelerate_config, num_gpus=arguments.num_gpus)
    flags = ["--config", arguments.config, *recipe_flags]
    if not torch.cuda.is_available():
        flags += ["--use_cpu", "true"]  # else bf16 is refused here, where nothing is going to run
    # The recipe counts its batches as on so many processes, none of which is started.
    with patch.object(TrainingArguments, "world_size", backend.num_processes):
        _, args, model_args, _, _ = train.parse(flags)
    if args.deepspeed is not None:
        raise ValueError("The planner reads DeepSpeed's settings from --accelerate_config: remove `deepspeed`.")
    name = str(model_args.model_name_or_path)
    config, source = read_config(name, arguments.model_config)
    dtype = str((args.model_init_kwargs or {}).get("dtype", model_args.dtype))
    if dtype not in _ELEMENT_BYTES:
        raise ValueError(f"`dtype` is {dtype!r}; the planner knows {', '.join(_ELEMENT_BYTES)}.")
    if args.use_vllm and args.vllm_max_model_length is not None:
        prompt_length = args.vllm_max_model_length - args.max_completion_length
    else:
        prompt_length = min(DEFAULT_PROMPT_LENGTH, config.max_position_embeddings - args.max_completion_length)
    peft_config: Any = get_peft_config(model_args)  # a LoraConfig
    if peft_config is not None and args.disable_dropout:
        peft_config.lora_dropout = 0.0
    setup = Setup(
        args=args,
        backend=backend,
        config=config,
        prompt_length=arguments.prompt_length or max(prompt_length, 1),
        gpu_memory=arguments.gpu_memory * GB,
        peft_config=peft_config,
        parameter_bytes=_ELEMENT_BYTES[dtype],
        weight_bits=4 if model_args.load_in_4bit else 8 if model_args.load_in_8bit else None,
        masked=not str(model_args.attn_implementation or "").startswith("flash"),
    )
    return name, source, setup


def count_rollouts(setup: Setup) -> dict[str, float]:
    """Prompts, completions, passes and optimizer steps of one generation batch, as TRL counts them; passes are per GPU."""
    args, num_processes = setup.args, setup.backend.num_processes
    assert args.num_generations is not None
    per_step = args.per_device_train_batch_size * num_processes * args.gradient_accumulation_steps
    per_batch = setup.completions_per_process * num_processes
    return {
        "prompts_per_step": per_step / args.num_generations,  # a fraction where steps cut through groups
        "completions_per_step": per_step,
        "prompts_per_batch": per_batch // args.num_generations,
        "completions_per_batch": per_batch,
        # Below 1 where several batches make a step.
        "steps_per_batch": setup.micro_batches * args.num_iterations / args.gradient_accumulation_steps,
        "old_logps_passes": setup.micro_batches if setup.has_old_logps_forward else 0,
        "scoring_passes": setup.micro_batches if setup.scoring is not None else 0,
    }


def _available(setup: Setup) -> float:
    return setup.gpu_memory * (1 - MARGIN)


def find_problems(setup: Setup, items: list[MemoryItem]) -> list[str]:
    """Why this cannot run as planned, each with its remedy; empty if it can."""
    problems = []
    totals, longest = phase_bytes(items), setup.config.max_position_embeddings
    peak = max(PHASES, key=totals.__getitem__)
    if totals[peak] > _available(setup):
        biggest = max((item for item in items if peak in item.phases), key=lambda item: item.num_bytes)
        problems.append(
            f"does not fit: {totals[peak] / GB:.1f} GB in phase `{peak}`, but {_available(setup) / GB:.1f} of "
            f"{setup.gpu_memory / GB:.0f} GB are available. The biggest item is {biggest.name}, "
            f"{biggest.num_bytes / GB:.1f} GB: {biggest.remedy}."
        )
    if setup.sequence_length > longest:
        problems.append(
            f"sequences of {setup.sequence_length} tokens are longer than the model's {longest} positions: lower "
            "max_completion_length."
        )
    vllm = plan_vllm(setup)
    if vllm is not None and vllm.sequences < 1:
        problems.append(
            f"vLLM's share of {vllm.share / GB:.1f} GB holds {vllm.weights / GB:.1f} GB of weights and no sequence of "
            f"{setup.sequence_length} tokens ({vllm.bytes_per_token * setup.sequence_length / GB:.2f} GB): raise "
            "vllm_gpu_memory_utilization or vllm_tensor_parallel_size, or lower max_completion_length."
        )
    return problems


def _report(setup: Setup, items: list[MemoryItem], rollouts: dict[str, float]) -> Iterator[str]:
    backend, args, totals = setup.backend, setup.args, phase_bytes(items)
    adapter = f" (LoRA of rank {setup.peft_config.r})" if setup.peft_config is not None else ""
    yield (
        f"{setup.num_base:,} parameters, {setup.num_trained:,} trained{adapter}, optimizer {OptimizerNames(args.optim).value} "
        f"({num_states(args)} states a parameter)"
    )
    yield (
        f"{backend.num_processes} GPUs of {setup.gpu_memory / GB:.0f} GB, {backend.kind}"
        f"{' with offload to main memory' if backend.offloads_optimizer else ''}, "
        f"{'bfloat16' if setup.compute_bytes == 2 else 'float32'}, gradient checkpointing "
        f"{'on' if args.gradient_checkpointing else 'off'}"
    )
    yield f"sequences of {setup.prompt_length} + {setup.sequence_length - setup.prompt_length} tokens, all of full length"
    yield f"\n{'GB (1e9 bytes) per GPU':<42}" + "".join(f"{phase:>10}" for phase in PHASES)
    for item in items:
        yield f"{item.name:<42}" + "".join(
            f"{item.num_bytes / GB if phase in item.phases else 0:>10.3f}" for phase in PHASES
        )
    yield f"{'together':<42}" + "".join(f"{totals[phase] / GB:>10.3f}" for phase in PHASES)
    peak = max(totals.values())
    if peak <= _available(setup):
        yield f"fits: at most {peak / GB:.1f} of {setup.gpu_memory / GB:.0f} GB; {MARGIN:.0%} are left free"
    vllm = plan_vllm(setup)
    if vllm is not None:
        waves = f": {math.ceil(vllm.wanted / vllm.sequences)} waves at worst" if vllm.sequences else ""
        yield (
            f"\nvLLM per GPU: {vllm.share / GB:.1f} GB, of which {vllm.weights / GB:.1f} weights; {vllm.bytes_per_token:,} bytes a "
            f"token\n{vllm.sequences} sequences of full length at once, {vllm.wanted} per engine and generation batch{waves}"
        )
    yield ""
    for name, number in rollouts.items():
        yield f"{name.replace('_', ' '):<42}{number:>10g}"


if __name__ == "__main__":
    sys.exit(main())
