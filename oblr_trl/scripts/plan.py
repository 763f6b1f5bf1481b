"""Says what a recipe needs before it is launched: memory of every GPU item by item, and what a step consists of.

    python -m oblr_trl.scripts.plan --config recipes/Qwen3-4B-Base/oblrpo/config_math.yaml \
        --accelerate_config recipes/accelerate_configs/zero3.yaml

Nothing is loaded, downloaded or launched, apart from the model's `config.json`. Any key of the recipe can be given on the
command line too.
"""

import argparse
import json
import math
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments
from transformers.training_args import OptimizerNames
from trl import get_peft_config

from oblr_trl.planning.launch import BACKENDS, read_backend
from oblr_trl.planning.memory import PHASES, MemoryPlan, num_states, plan_memory, plan_vllm
from oblr_trl.planning.models import read_config
from oblr_trl.planning.setup import Setup
from oblr_trl.scripts import train

GB = 1e9
# Prompts have no limit in TRL; what is counted where the recipe does not tell by `vllm_max_model_length`.
DEFAULT_PROMPT_LENGTH = 512
_ELEMENT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


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
    parser.add_argument("--margin", type=float, default=0.1, help="part of it to leave free (default: %(default)s)")
    parser.add_argument("--prompt_length", type=int, help="tokens of the longest prompt")
    parser.add_argument("--model_config", help="a config.json, in place of the model's")
    parser.add_argument(
        "--strict", action="store_true", help="exit with status 1 if it does not fit, or a prior has no other prompts"
    )
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
            plan = plan_memory(setup, arguments.margin)
    except ValueError as error:
        parser.exit(2, f"plan: {error}\n")
    # What the configuration warns of; not deprecations.
    warned = [str(warning.message) for warning in caught if warning.category is UserWarning]
    found = problems(setup, plan)
    rollouts = count_rollouts(setup)
    lines = [*_head(name, source, setup), "", *_tables(setup, plan, rollouts), ""]
    lines += [f"note: {note}" for note in _notes(setup, arguments.margin)]
    lines += [f"WARNING: {warning}" for warning in [*warned, *found]]
    if not found:
        peak = plan.total(plan.peak_phase) / GB
        lines.append(f"fits: at most {peak:.1f} of {arguments.gpu_memory:.0f} GB, in phase `{plan.peak_phase}`.")
    sys.stdout.write("\n".join(lines) + "\n")
    if arguments.json is not None:
        record = {
            "model": name,
            "shape_source": source,
            "num_parameters": setup.num_base,
            "num_trainable": setup.num_trained,
            "num_gpus": setup.backend.num_processes,
            "gpu_memory_bytes": setup.gpu_memory,
            "items": [{"name": item.name, "bytes": item.num_bytes, "phases": item.phases} for item in plan.items],
            "totals": {phase: plan.total(phase) for phase in PHASES},
            "fits": plan.total(plan.peak_phase) <= plan.limit,
            "problems": found,
            "warnings": warned,
            **rollouts,
        }
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(record, indent=2) + "\n")
    has_no_prior = bool(warned) and rollouts["prompts_per_batch"] < 2
    return 1 if arguments.strict and (found or has_no_prior) else 0


def read_setup(arguments: argparse.Namespace, recipe_flags: list[str]) -> tuple[str, str, Setup]:
    """
    What a recipe and a launch say: the model's name, where its shape is from, and the [`~planning.setup.Setup`].

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
    name = str(model_args.model_name_or_path)
    config, source = read_config(name, arguments.model_config)
    dtype = str((args.model_init_kwargs or {}).get("dtype", model_args.dtype))
    if dtype != "auto" and dtype not in _ELEMENT_BYTES:
        raise ValueError(f"`dtype` is {dtype!r}; the planner knows {', '.join(_ELEMENT_BYTES)} and auto.")
    assert args.max_completion_length is not None
    if args.use_vllm and args.vllm_max_model_length is not None:
        prompt_length = args.vllm_max_model_length - args.max_completion_length
    else:
        prompt_length = min(DEFAULT_PROMPT_LENGTH, config.max_position_embeddings - args.max_completion_length)
    peft_config: Any = get_peft_config(model_args)  # a LoraConfig
    if peft_config is not None and args.disable_dropout:
        peft_config.lora_dropout = 0.0
    setup = Setup(
        args=args,
        backend=read_backend(arguments.accelerate_config, num_gpus=arguments.num_gpus, bf16=bool(args.bf16)),
        config=config,
        prompt_length=arguments.prompt_length or max(prompt_length, 1),
        gpu_memory=arguments.gpu_memory * GB,
        peft_config=peft_config,
        parameter_bytes=_ELEMENT_BYTES.get(dtype, 2),  # the published weights are bfloat16
        weight_bits=4 if model_args.load_in_4bit else 8 if model_args.load_in_8bit else None,
        masked=not str(model_args.attn_implementation or "").startswith("flash"),
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


def count_rollouts(setup: Setup) -> dict[str, Any]:
    """Prompts, completions, passes and optimizer steps of one generation batch, as TRL counts them."""
    args, scores = setup.args, setup.scoring is not None
    assert args.num_generations is not None
    num_processes, group = setup.backend.num_processes, args.num_generations
    per_step = args.per_device_train_batch_size * num_processes * args.gradient_accumulation_steps
    per_batch = setup.completions_per_process * num_processes
    takes_place = scores and setup.scoring is not None and setup.scoring.reuses_old_logps_forward
    return {
        "prompts_per_step": per_step / group,  # a fraction where steps cut through groups
        "completions_per_step": per_step,
        "prompts_per_batch": per_batch // group,
        "completions_per_batch": per_batch,
        # Below 1 where several batches make a step.
        "steps_per_batch": setup.micro_batches * args.num_iterations / args.gradient_accumulation_steps,
        "old_logps_passes": setup.micro_batches if setup.needs_old_logps and not takes_place else 0,
        "scoring_passes": setup.micro_batches if scores else 0,
    }


def problems(setup: Setup, plan: MemoryPlan) -> list[str]:
    """Why this cannot run as planned, each with its remedy; empty if it can."""
    found = []
    peak, longest = plan.total(plan.peak_phase), setup.config.max_position_embeddings
    if peak > plan.limit:
        biggest = max(plan.held(plan.peak_phase), key=lambda item: item.num_bytes)
        found.append(
            f"does not fit: {peak / GB:.1f} GB in phase `{plan.peak_phase}`, but {plan.limit / GB:.1f} of "
            f"{setup.gpu_memory / GB:.0f} GB are available. The biggest item is {biggest.name}, "
            f"{biggest.num_bytes / GB:.1f} GB: {biggest.remedy}."
        )
    if setup.sequence_length > longest:
        found.append(
            f"sequences of {setup.sequence_length} tokens are longer than the model's {longest} positions: lower "
            "max_completion_length."
        )
    vllm, gpus = plan_vllm(setup), setup.args.vllm_tensor_parallel_size
    if vllm is not None and vllm.sequences < 1:
        found.append(
            f"vLLM's share of {vllm.share / GB:.1f} GB holds {vllm.weights / GB:.1f} GB of weights and no sequence of "
            f"{setup.sequence_length} tokens ({vllm.kv_bytes_per_token * setup.sequence_length / GB:.2f} GB): raise "
            "vllm_gpu_memory_utilization or vllm_tensor_parallel_size, or lower max_completion_length."
        )
    if vllm is not None and setup.backend.num_processes % gpus:
        found.append(
            f"vllm_tensor_parallel_size {gpus} does not divide {setup.backend.num_processes} processes: make it a divisor."
        )
    return found


def _notes(setup: Setup, margin: float) -> Iterator[str]:
    """What the numbers rest on."""
    yield f"{margin:.0%} of the GPU is left for CUDA, NCCL and fragmentation: an assumption, not measured."
    yield f"sequences are counted at full length, {setup.prompt_length} + {setup.completion_length} tokens."
    if num_states(setup.args) is None:
        yield f"the states of {str(setup.args.optim)!r} are not known to the planner and counted as AdamW's."
    if plan_vllm(setup) is not None:
        yield "vLLM's own activations come out of its share and are not known here: its KV cache is smaller."
    steps = setup.micro_batches * setup.args.num_iterations / setup.args.gradient_accumulation_steps
    if steps % 1 and steps > 1:
        yield "optimizer steps straddle generation batches."


def _head(name: str, source: str, setup: Setup) -> list[str]:
    backend, peft_config = setup.backend, setup.peft_config
    spread = BACKENDS[backend.kind] + (" with offload to main memory" if backend.offloads_optimizer else "")
    adapter = f" (LoRA of rank {peft_config.r})" if peft_config is not None else ""
    return [
        f"{name}: shape from {source}",
        f"{setup.num_base:,} parameters, {setup.num_trained:,} trained{adapter}, optimizer {OptimizerNames(setup.args.optim).value}",
        f"{backend.num_processes} GPUs of {setup.gpu_memory / GB:.0f} GB, {spread}, "
        f"{'bfloat16' if setup.compute_bytes == 2 else 'float32'}, gradient checkpointing "
        f"{'on' if setup.args.gradient_checkpointing else 'off'}",
    ]


def _tables(setup: Setup, plan: MemoryPlan, rollouts: dict[str, Any]) -> Iterator[str]:
    yield f"{'GB (1e9 bytes) per GPU':<42}" + "".join(f"{phase:>10}" for phase in PHASES)
    for item in plan.items:
        cells = (f"{item.num_bytes / GB:.3f}" if phase in item.phases else "" for phase in PHASES)
        yield f"{item.name:<42}" + "".join(f"{cell:>10}" for cell in cells)
    yield f"{'together':<42}" + "".join(f"{plan.total(phase) / GB:>10.3f}" for phase in PHASES)
    yield ""
    vllm = plan_vllm(setup)
    if vllm is not None:
        yield (
            f"vLLM per GPU: {vllm.share / GB:.1f} GB = {vllm.weights / GB:.1f} weights + {vllm.kv_cache / GB:.1f} KV cache, "
            f"{vllm.kv_bytes_per_token:,} bytes a token"
        )
        waves = f": {math.ceil(vllm.wanted / vllm.sequences)} waves at worst" if vllm.sequences else ""
        yield (
            f"  {vllm.sequences} sequences of full length at once, {vllm.wanted} per engine and generation batch{waves}"
        )
        yield ""
    for key, value in rollouts.items():
        yield f"{_LABELS[key]:<42}{value:>10g}"


_LABELS = {
    "prompts_per_step": "prompts per optimizer step",
    "completions_per_step": "completions per optimizer step",
    "prompts_per_batch": "prompts per generation batch",
    "completions_per_batch": "completions per generation batch",
    "steps_per_batch": "optimizer steps per generation batch",
    "old_logps_passes": "old-log-prob forwards per batch and GPU",
    "scoring_passes": "scoring passes per batch and GPU",
}


if __name__ == "__main__":
    sys.exit(main())
