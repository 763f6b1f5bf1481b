"""Calculate what a recipe needs before it is launched: memory of every GPU item by item, and rollouts per step.

    python -m oblr_trl.scripts.plan --config recipes/Qwen3-4B-Base/oblrpo/config_math.yaml \
        --accelerate_config recipes/accelerate_configs/zero3.yaml

Nothing is loaded, downloaded or launched, apart from the model's `config.json`. See docs/planning.md.
"""

import argparse
import sys
import warnings
from collections.abc import Iterator, Sequence
from typing import Any
from unittest.mock import patch

import torch
from transformers import TrainingArguments
from trl import get_peft_config

from oblr_trl.planning.memory import PHASES, MemoryItem, phase_bytes, plan_memory
from oblr_trl.planning.models import linear_layers, read_config
from oblr_trl.planning.setup import Setup, read_backend
from oblr_trl.scripts import train

GB = 1e9
# Left for CUDA's and NCCL's own memory and for fragmentation: an assumption, not measured.
MARGIN = 0.1
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
    parser.add_argument("--prompt_length", type=int, default=512, help="longest prompt (default: %(default)s tokens)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Print the plan; the exit status is 1 if it cannot run, and 2 for what cannot be planned."""
    parser = make_parser()
    arguments, recipe_flags = parser.parse_known_args(argv)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of `gradient_checkpointing`
            setup = read_setup(arguments, recipe_flags)
            warnings.simplefilter("ignore")  # of PEFT and transformers, about models that are not going to be trained
            items = plan_memory(setup)
    except ValueError as error:
        parser.exit(2, f"plan: {error}\n")
    problem = find_problem(setup, items)
    verdict = f"WARNING: {problem}" if problem else f"fits, {MARGIN:.0%} of the memory being left free"
    sys.stdout.write("\n".join([*_report(setup, items), verdict]) + "\n")
    return 1 if problem else 0


def read_setup(arguments: argparse.Namespace, recipe_flags: list[str]) -> Setup:
    """The setup that recipe and launch describe; `ValueError` for what cannot be read or is not covered."""
    backend = read_backend(arguments.accelerate_config, num_gpus=arguments.num_gpus)
    flags = ["--config", arguments.config, *recipe_flags]
    if not torch.cuda.is_available():
        flags += ["--use_cpu", "true"]  # else bf16 is refused here, where nothing is going to run
    # The recipe counts its batches as on so many processes, none of which is started.
    with patch.object(TrainingArguments, "world_size", backend.num_processes):
        _, args, model_args, _, _ = train.parse(flags)
    if args.deepspeed is not None:
        raise ValueError("The planner reads DeepSpeed's settings from --accelerate_config: remove `deepspeed`.")
    if model_args.load_in_4bit or model_args.load_in_8bit:
        raise ValueError("The planner does not cover quantized weights: plan without load_in_4bit and load_in_8bit.")
    dtype = str((args.model_init_kwargs or {}).get("dtype", model_args.dtype))
    if dtype not in _ELEMENT_BYTES:
        raise ValueError(
            f"`dtype` is {dtype!r}, which TRL does not load: set it to one of {', '.join(_ELEMENT_BYTES)}."
        )
    peft_config: Any = get_peft_config(model_args)  # a LoraConfig
    return Setup(
        args=args,
        backend=backend,
        config=read_config(str(model_args.model_name_or_path)),
        prompt_length=arguments.prompt_length,
        gpu_memory=arguments.gpu_memory * GB,
        peft_config=peft_config,
        parameter_bytes=_ELEMENT_BYTES[dtype],
        masked=not str(model_args.attn_implementation or "").startswith("flash"),
    )


def find_problem(setup: Setup, items: list[MemoryItem]) -> str | None:
    """Why this does not fit, with the remedy; `None` if it does."""
    totals, available = phase_bytes(items), setup.gpu_memory * (1 - MARGIN)
    peak = max(PHASES, key=totals.__getitem__)
    if totals[peak] <= available:
        return None
    biggest = max((item for item in items if peak in item.phases), key=lambda item: item.num_bytes)
    return (
        f"does not fit: {totals[peak] / GB:.1f} GB in phase `{peak}`, but {available / GB:.1f} of "
        f"{setup.gpu_memory / GB:.0f} GB are available. The biggest item is {biggest.name}, "
        f"{biggest.num_bytes / GB:.1f} GB. To lower it: {PHASES[peak]}."
    )


def _report(setup: Setup, items: list[MemoryItem]) -> Iterator[str]:
    backend, args, totals = setup.backend, setup.args, phase_bytes(items)
    assert args.num_generations is not None
    yield (
        f"{setup.num_base:,} parameters, {setup.num_trained:,} trained, "
        f"gradient checkpointing {'on' if args.gradient_checkpointing else 'off'}"
    )
    yield (
        f"{backend.num_processes} GPUs of {setup.gpu_memory / GB:.0f} GB, {backend.kind}"
        f"{' with offload' if backend.offloads_optimizer else ''}, {'bfloat16' if setup.compute_bytes == 2 else 'float32'}; "
        f"sequences of {setup.prompt_length} + {args.max_completion_length} tokens"
    )
    yield f"\n{'GB (1e9 bytes) per GPU':<42}" + "".join(f"{phase:>10}" for phase in PHASES)
    for name, num_bytes, phases in items:
        yield f"{name:<42}" + "".join(f"{num_bytes / GB if phase in phases else 0:>10.3f}" for phase in PHASES)
    yield f"{'together':<42}" + "".join(f"{totals[phase] / GB:>10.3f}" for phase in PHASES)
    per_step = args.per_device_train_batch_size * backend.num_processes * args.gradient_accumulation_steps
    yield f"\n{'completions per step':<42}{per_step:>10}"
    yield f"{'prompts per step':<42}{per_step / args.num_generations:>10g}"  # a fraction where steps cut through groups
    # vLLM's prefix cache keeps a prompt that several completions begin with; generation by transformers reads it for each.
    shared = args.num_generations if args.use_vllm else 1
    yield _prefill(setup, per_step, per_step / shared, "prompt tokens prefilled per step")
    if shared > 1:
        yield _prefill(setup, per_step, per_step, "  with num_generations: 1")


def _prefill(setup: Setup, num_completions: int, num_prefills: float, name: str) -> str:
    """Prompt tokens of a step that generation reads, and their share of its FLOPs: two for each weight and token, attention
    left out; at full length of prompts and completions."""
    in_blocks = sum(layer.weight.numel() for layer in linear_layers(setup.model).values())
    in_head = setup.config.vocab_size * setup.config.hidden_size  # applied to none of a prompt's tokens but the last
    num_tokens = num_prefills * setup.prompt_length
    prefill = num_tokens * in_blocks
    decode = num_completions * (setup.sequence_length - setup.prompt_length) * (in_blocks + in_head)
    share = prefill / (prefill + decode)
    return f"{name:<42}{num_tokens:>10.0f}  {2 * prefill:.1e} FLOPs, {share:.1%} of generation's"


if __name__ == "__main__":
    sys.exit(main())
