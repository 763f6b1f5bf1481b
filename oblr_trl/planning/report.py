"""The plan in words: tables of memory and rollouts, and what is wrong with them."""

import math
from collections.abc import Sequence
from typing import Any

from oblr_trl.planning.memory import PHASES, MemoryPlan, VLLMPlan, plan_vllm
from oblr_trl.planning.optimizers import is_known_optimizer
from oblr_trl.planning.setup import Setup

GB = 1e9
_BACKENDS = {
    "none": "one process",
    "ddp": "DDP",
    "zero1": "ZeRO-1",
    "zero2": "ZeRO-2",
    "zero3": "ZeRO-3",
    "fsdp2": "FSDP 2",
}


def problems(setup: Setup, plan: MemoryPlan) -> list[str]:
    """Why this cannot run as planned, each with its remedy; empty if it can."""
    found = []
    if not plan.fits:
        biggest, limit = plan.biggest, plan.gpu_memory * (1 - plan.margin)
        found.append(
            f"does not fit: {plan.peak / GB:.1f} GB in phase `{plan.peak_phase}`, but {limit / GB:.1f} GB are to be had "
            f"({plan.gpu_memory / GB:.0f} GB less {plan.margin:.0%}). The biggest item is {biggest.name}, "
            f"{biggest.num_bytes / GB:.1f} GB: {biggest.remedy}."
        )
    longest = setup.shape.max_positions
    if setup.sequence_length > longest:
        found.append(
            f"sequences of {setup.sequence_length} tokens are longer than the model's {longest} positions: lower "
            "max_completion_length."
        )
    generation = setup.generation
    if generation.mode == "colocate":
        vllm = plan_vllm(setup)
        if vllm.sequences < 1:
            found.append(
                f"vLLM's share of {vllm.share / GB:.1f} GB holds {vllm.weights / GB:.1f} GB of weights and no sequence of "
                f"{setup.sequence_length} tokens ({vllm.kv_bytes_per_token * setup.sequence_length / GB:.2f} GB): raise "
                "vllm_gpu_memory_utilization or vllm_tensor_parallel_size, or lower max_completion_length."
            )
        if setup.backend.num_processes % generation.tensor_parallel:
            found.append(
                f"vllm_tensor_parallel_size {generation.tensor_parallel} does not divide {setup.backend.num_processes} "
                "processes: make it a divisor."
            )
    return found


def notes(setup: Setup, plan: MemoryPlan) -> list[str]:
    """What the numbers rest on."""
    lines = [
        f"{plan.margin:.0%} of the GPU is left for CUDA, NCCL and fragmentation: an assumption, not measured.",
        f"sequences are counted at full length, {setup.prompt_length} + {setup.completion_length} tokens.",
    ]
    if not is_known_optimizer(setup.optimizer.removeprefix("paged_")):
        lines.append(f"the states of {setup.optimizer!r} are not known to the planner and counted as AdamW's.")
    if setup.generation.mode == "colocate":
        lines.append("vLLM's own activations come out of its share and are not known here: its KV cache is smaller.")
    if setup.schedule.steps_per_batch % 1 and setup.schedule.steps_per_batch > 1:
        lines.append("optimizer steps straddle generation batches.")
    return lines


def format_plan(name: str, source: str, setup: Setup, plan: MemoryPlan, warned: Sequence[str] = ()) -> str:
    """Everything, as text, with what the configuration `warned` of."""
    lines = [*_head(name, source, setup), "", *_memory_table(plan), ""]
    if setup.generation.mode == "colocate":
        lines += [*_vllm_table(plan_vllm(setup)), ""]
    lines += [*_rollouts(setup), ""]
    lines += [f"note: {line}" for line in notes(setup, plan)]
    found = problems(setup, plan)
    lines += [f"WARNING: {line}" for line in [*warned, *found]]
    if not found:
        lines.append(
            f"fits: at most {plan.peak / GB:.1f} of {plan.gpu_memory / GB:.0f} GB, in phase `{plan.peak_phase}`."
        )
    return "\n".join(lines) + "\n"


def _head(name: str, source: str, setup: Setup) -> list[str]:
    backend = setup.backend
    spread = _BACKENDS[backend.kind]
    if backend.offloads_optimizer or backend.offloads_parameters:
        spread += " with offload to main memory"
    trained = f"{setup.num_trainable:,} trained"
    if setup.adapter is not None:
        trained += f" (LoRA of rank {setup.adapter.rank} on {', '.join(setup.adapter.target_layers)})"
    return [
        f"{name}: shape from {source}",
        f"{setup.shape.num_parameters():,} parameters, {trained}, optimizer {setup.optimizer}",
        f"{backend.num_processes} GPUs of {setup.gpu_memory / GB:.0f} GB, {spread}, "
        f"{'bfloat16' if setup.compute_bytes == 2 else 'float32'}, gradient checkpointing "
        f"{'on' if setup.checkpointing else 'off'}",
    ]


def _memory_table(plan: MemoryPlan) -> list[str]:
    lines = [f"{'GB (1e9 bytes) per GPU':<42}" + "".join(f"{phase:>10}" for phase in PHASES)]
    for item in plan.items:
        cells = (f"{item.num_bytes / GB:>10.3f}" if phase in item.phases else f"{'':>10}" for phase in PHASES)
        lines.append(f"{item.name:<42}" + "".join(cells))
    lines.append(f"{'together':<42}" + "".join(f"{plan.total(phase) / GB:>10.3f}" for phase in PHASES))
    return lines


def _vllm_table(vllm: VLLMPlan) -> list[str]:
    waves = math.ceil(vllm.wanted / vllm.sequences) if vllm.sequences else None
    return [
        f"vLLM per GPU: {vllm.share / GB:.1f} GB = {vllm.weights / GB:.1f} weights + {vllm.kv_cache / GB:.1f} KV cache, "
        f"{vllm.kv_bytes_per_token:,} bytes a token",
        f"  {vllm.sequences} sequences of full length at once, {vllm.wanted} per engine and generation batch"
        + (f": {waves} waves at worst" if waves else ""),
    ]


def _rollouts(setup: Setup) -> list[str]:
    schedule = setup.schedule
    rides = " (the scoring pass takes its place)" if schedule.needs_old_logps and schedule.scores_ride else ""
    rows: list[tuple[str, Any]] = [
        ("prompts per optimizer step", f"{schedule.prompts_per_step:g}"),
        ("completions per optimizer step", schedule.completions_per_step),
        ("prompts per generation batch", schedule.prompts_per_batch),
        ("completions per generation batch", schedule.completions_per_batch),
        ("  of these on each GPU", schedule.completions_per_process),
        ("micro-batches per optimizer step and GPU", schedule.accumulation),
        ("sequences per micro-batch", schedule.micro_batch),
        ("optimizer steps per generation batch", f"{schedule.steps_per_batch:g}"),
        ("old-log-prob forwards per batch and GPU", f"{schedule.old_logps_passes}{rides}"),
        ("scoring passes per batch and GPU", schedule.scoring_passes),
    ]
    return [f"{label:<42}{value:>10}" for label, value in rows]


def as_record(name: str, source: str, setup: Setup, plan: MemoryPlan, warned: Sequence[str] = ()) -> dict[str, Any]:
    """Everything, for JSON."""
    schedule = setup.schedule
    return {
        "model": name,
        "shape_source": source,
        "num_parameters": setup.shape.num_parameters(),
        "num_trainable": setup.num_trainable,
        "num_gpus": setup.backend.num_processes,
        "gpu_memory_bytes": plan.gpu_memory,
        "items": [{"name": item.name, "bytes": item.num_bytes, "phases": list(item.phases)} for item in plan.items],
        "totals": {phase: plan.total(phase) for phase in PHASES},
        "fits": plan.fits,
        "problems": problems(setup, plan),
        "warnings": list(warned),
        "completions_per_step": schedule.completions_per_step,
        "prompts_per_step": schedule.prompts_per_step,
        "completions_per_batch": schedule.completions_per_batch,
        "prompts_per_batch": schedule.prompts_per_batch,
        "steps_per_batch": schedule.steps_per_batch,
        "old_logps_passes": schedule.old_logps_passes,
        "scoring_passes": schedule.scoring_passes,
    }
