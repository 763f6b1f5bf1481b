"""Memory of one GPU, item by item: what generating, scoring and training hold at their peaks.

Letters: d hidden features, e bytes of an activation, V vocabulary.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

from transformers.training_args import OptimizerNames

from oblr_trl.planning.activations import saved_block_bytes
from oblr_trl.planning.models import linear_layers
from oblr_trl.planning.setup import Setup
from oblr_trl.scores.projections import factored_widths, parent, projected_widths
from oblr_trl.scores.scopes import ScopedParameters, resolve_scope

_SMALLER_BATCH = "halve per_device_train_batch_size and double gradient_accumulation_steps"
# What makes the peak of a phase lower.
PHASES = {
    "generate": "use_vllm: true, a smaller vllm_gpu_memory_utilization, or vllm_mode: server",
    "score": "a smaller per_device_score_batch_size, score_scope: last_k or lm_head, or vllm_enable_sleep_mode: true",
    "train": f"gradient_checkpointing: true, zero3.yaml on more GPUs, zero3_offload.yaml, LoRA, or {_SMALLER_BATCH}",
}
_FORWARDS = ("score", "train")
_FLOAT32 = 4
# DeepSpeed's defaults, in parameters: what ZeRO-3 keeps gathered, and the buckets of ZeRO-1 and -2.
_MAX_LIVE_PARAMETERS, _BUCKET = 1_000_000_000, 500_000_000
# Numbers that an optimizer keeps per parameter, by the first word of `optim`; others count as AdamW's two.
_STATES = {"sgd": 0, "lion": 1, "rmsprop": 1, "adagrad": 1, "adafactor": 0}
# Tokens and vocabulary of a tile of TRL's fused output projection, and of the scoring pass's (`oblr_trl.scores.head`).
_TRL_TILE, _SCORE_TILE = (4096, 32768), (1024, 8192)


class MemoryItem(NamedTuple):
    """One row of the plan: bytes on one GPU, and the phases that hold them."""

    name: str
    num_bytes: int
    phases: tuple[str, ...] = tuple(PHASES)


def plan_memory(setup: Setup) -> list[MemoryItem]:
    """Every item of one GPU that takes memory."""
    return [item for item in (*_states(setup), *_generation(setup), *_passes(setup)) if item.num_bytes]


def phase_bytes(items: list[MemoryItem]) -> dict[str, int]:
    """Bytes held at the peak of each phase."""
    return {phase: sum(item.num_bytes for item in items if phase in item.phases) for phase in PHASES}


def projection_bytes(scored: ScopedParameters, sketch_dim: int) -> int:
    """Bytes of all projections: a float32 basis for each distinct side of a matrix, a sign for each row, and for each column of the matrices
    of one parent."""
    bases: set[tuple[int, int, int]] = set()
    columns: dict[tuple[str, int], int] = {}
    num_signs = 0
    for name, shape in scored.shapes.items():
        widths = factored_widths(shape, sketch_dim, is_table=name in scored.tables)
        matrix = shape[-2:]
        if widths is None:
            num_signs += math.prod(shape)
        else:
            num_matrices, (num_rows, num_columns) = math.prod(shape[:-2]), (*matrix, 1)[:2]
            num_signs += num_matrices * num_rows
            columns[parent(name), num_columns] = num_matrices * num_columns
        sides = enumerate(zip(matrix, widths or matrix, strict=False))  # a bias of the output projection has one side
        bases |= {(side, dim, width) for side, (dim, width) in sides if width != dim}
    return num_signs + sum(columns.values()) + _FLOAT32 * sum(dim * width for _, dim, width in bases)


def parameter_sketch_length(scored: ScopedParameters, sketch_dim: int) -> int:
    """Numbers that the trust region keeps of the parameters: the projected ones of matrices, and every entry of what is not projected, which of
    an adapter is all of it."""
    if scored.num_parameters <= sketch_dim:
        return scored.num_parameters
    widths = {
        name: factored_widths(shape, sketch_dim, is_table=name in scored.tables)
        for name, shape in scored.shapes.items()
    }
    return sum(math.prod(widths[name] or shape) for name, shape in scored.shapes.items())


def _states(setup: Setup) -> Iterator[MemoryItem]:
    """Parameters, gradients and optimizer, with the copies and buffers that the backend makes of them."""
    backend, kind = setup.backend, setup.backend.kind
    optimizer = OptimizerNames(setup.args.optim).value.split("_")[0]
    has_momentum = optimizer in ("sgd", "rmsprop") and "momentum" in (setup.args.optim_args or "")
    states = _STATES.get(optimizer, 2) + has_momentum
    base, trained = setup.num_base * setup.held_bytes, setup.num_trained * setup.trained_bytes

    def shard(num_bytes: int, *kinds: str) -> int:
        return math.ceil(num_bytes / backend.num_processes) if kind in kinds else num_bytes

    if not backend.offloads_parameters:
        yield MemoryItem("parameters", shard(base + (trained if setup.peft_config is not None else 0), "ZeRO-3"))
    if not backend.offloads_optimizer:
        held = tuple(PHASES) if backend.is_deepspeed else ("train",)  # the others set them to None after a step
        yield MemoryItem("gradients", shard(trained, "ZeRO-2", "ZeRO-3"), held)
        # With DeepSpeed in float32, with a copy of what is trained.
        bytes_each = (states + 1) * _FLOAT32 if backend.is_deepspeed else states * setup.trained_bytes
        yield MemoryItem("optimizer states", shard(setup.num_trained * bytes_each, "ZeRO-1", "ZeRO-2", "ZeRO-3"))
    if setup.args.beta != 0.0 and setup.peft_config is None:
        yield MemoryItem("reference model", shard(base, "ZeRO-3"))
    if kind == "DDP":
        yield MemoryItem("DDP's gradient buckets", trained)
    if kind in ("ZeRO-1", "ZeRO-2"):
        yield MemoryItem("ZeRO's buckets", 2 * min(setup.num_trained, _BUCKET) * setup.trained_bytes, ("train",))
    if kind == "ZeRO-3":
        live = min(setup.num_base, _MAX_LIVE_PARAMETERS) * setup.held_bytes
        yield MemoryItem("gathered parameters", live, _FORWARDS)
    if setup.autocasts and setup.held_bytes == _FLOAT32:
        num_weights = sum(layer.weight.numel() for layer in linear_layers(setup.model).values())
        yield MemoryItem("autocast's copies of weights", 2 * num_weights, _FORWARDS)


def _generation(setup: Setup) -> Iterator[MemoryItem]:
    """The share of a colocated vLLM, or the KV cache of transformers."""
    args = setup.args
    if args.use_vllm and args.vllm_mode == "colocate":
        held = ("generate",) if args.vllm_enable_sleep_mode else tuple(PHASES)
        yield MemoryItem("vLLM's share", int(args.vllm_gpu_memory_utilization * setup.gpu_memory), held)
    elif not args.use_vllm:
        assert args.steps_per_generation is not None
        num_tokens = args.per_device_train_batch_size * args.steps_per_generation * setup.sequence_length
        layers = linear_layers(setup.model).items()
        per_token = sum(layer.out_features for name, layer in layers if "k_proj" in name or "v_proj" in name)
        yield MemoryItem("KV cache", num_tokens * per_token * setup.compute_bytes, ("generate",))
        if setup.backend.kind == "ZeRO-3" and args.ds3_gather_for_generation:
            yield MemoryItem("parameters gathered to generate", setup.num_base * setup.held_bytes, ("generate",))


def _kept(setup: Setup, batch_size: int, block: int) -> tuple[int, int]:
    """Bytes of one micro-batch that a block keeps until its backward pass, and that this pass needs in addition."""
    config = setup.config
    num_tokens = batch_size * setup.sequence_length
    # Gradients of activations: about four of the MLP's width and two of the stream's.
    gradients = num_tokens * (4 * setup.compute_bytes * config.intermediate_size + 2 * _FLOAT32 * config.hidden_size)
    if not setup.args.gradient_checkpointing:
        return block, gradients
    return num_tokens * setup.held_bytes * config.hidden_size, gradients + block


def _passes(setup: Setup) -> Iterator[MemoryItem]:
    """Activations of training and of the scoring pass, and what the backward pass needs in addition at its peak."""
    d, V, e = setup.config.hidden_size, setup.config.vocab_size, setup.compute_bytes
    num_completion_tokens = setup.sequence_length - setup.prompt_length
    batch_size = setup.args.per_device_train_batch_size
    positions = batch_size * num_completion_tokens
    of_sequence = saved_block_bytes(setup, scoring=False)
    kept, backward = _kept(setup, batch_size, batch_size * of_sequence)
    yield MemoryItem("activations of training", setup.config.num_hidden_layers * kept, ("train",))
    # TRL's fused output projection backward: a tile of logits, the float32 gradients of hidden states and weight, and the
    # weight's once more in its own dtype. All are freed before the first block's backward begins.
    head = min(positions, _TRL_TILE[0]) * min(V, _TRL_TILE[1]) * e + positions * d * (_FLOAT32 + e)
    head += V * d * (_FLOAT32 + setup.held_bytes) if setup.peft_config is None else 0
    yield MemoryItem("head or block in training's backward", max(head, backward), ("train",))
    scoring = setup.scoring
    if scoring is None:
        return
    num_layers = setup.config.num_hidden_layers
    num_blocks = {"auto": num_layers, "all": num_layers, "lm_head": 0}.get(scoring.score_scope, scoring.score_last_k)
    scored = resolve_scope(setup.model, scoring.score_scope, scoring.score_last_k)
    batch_size, positions = scoring.score_batch_size, scoring.score_batch_size * num_completion_tokens
    kept, backward = (0, 0)
    if num_blocks:
        kept, backward = _kept(setup, batch_size, batch_size * saved_block_bytes(setup, scoring=True))
    yield MemoryItem("activations of scoring", (num_blocks or 0) * kept, ("score",))
    # The pass over the vocabulary: tiles of logits and probabilities, those of the tile before not yet freed; sums of weights
    # and of projections. In blocks that are not scored, at most what training keeps of one.
    cells = min(positions, _SCORE_TILE[0]) * min(V, _SCORE_TILE[1]) * min(math.ceil(V / _SCORE_TILE[1]), 2)
    head = cells * (e if e == _FLOAT32 else e + _FLOAT32) + positions * d * (e + (_FLOAT32 if num_blocks else 0))
    head += V * projected_widths(V, d, scoring.score_sketch_dim)[0] * _FLOAT32 if scored.head_names else 0
    yield MemoryItem("head or block in scoring", max(head, backward, batch_size * of_sequence), ("score",))
    yield MemoryItem("projections", projection_bytes(scored, scoring.score_sketch_dim))
    if scoring.lr_adaptation == "trust_region":
        num_kept = parameter_sketch_length(scored, scoring.score_sketch_dim)
        yield MemoryItem("sketch of the parameters", 2 * _FLOAT32 * num_kept)
        yield MemoryItem("sketch of the update", _FLOAT32 * num_kept, ("score",))
