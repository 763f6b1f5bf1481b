"""Memory of one GPU, item by item: what generating, scoring, training and stepping hold at their peaks.

Letters: d hidden features, e bytes of an activation, V vocabulary.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

from transformers.training_args import OptimizerNames
from trl import GRPOConfig

from oblr_trl.oblrpo_config import OBLRPOConfig
from oblr_trl.planning.activations import saved_block_bytes
from oblr_trl.planning.setup import Setup
from oblr_trl.scores.projections import factored_widths, projected_widths
from oblr_trl.scores.scopes import ScopedParameters, resolve_scope

PHASES = ("generate", "score", "train", "step")
_FORWARDS = ("score", "train")
_FLOAT32 = 4
# DeepSpeed's defaults, in parameters: what ZeRO-3 keeps gathered, what an optimizer step lifts to float32 at a time, and the
# buckets of ZeRO-1 and -2.
_MAX_LIVE_PARAMETERS, _SUB_GROUP, _BUCKET = 1_000_000_000, 1_000_000_000, 500_000_000
# bitsandbytes: a float32 scale for 64 weights of 4 bits, or for 256 states of 8 bits.
_WEIGHT_BYTES = {4: 4 / 8 + _FLOAT32 / 64, 8: 1}
_STATE_BYTES = 1 + _FLOAT32 / 256
# Numbers that an optimizer keeps per parameter, by the first word of `optim`. Adafactor's sums of rows and columns are left out.
_STATES = {"adamw": 2, "ademamix": 3, "sgd": 0, "lion": 1, "rmsprop": 1, "adagrad": 1, "adafactor": 0}
# Tokens and vocabulary of a tile of TRL's fused output projection, and of the scoring pass's (`oblr_trl.scores.head`).
_TRL_TILE, _SCORE_TILE = (4096, 32768), (1024, 8192)
_SMALLER_BATCH = "halve per_device_train_batch_size and double gradient_accumulation_steps"


class MemoryItem(NamedTuple):
    """One row of the plan: bytes on one GPU, the phases that hold them, and what makes them fewer."""

    name: str
    num_bytes: int
    phases: tuple[str, ...]
    remedy: str


class VLLMPlan(NamedTuple):
    """A colocated vLLM on one GPU, whose own activations are not known here: its KV cache is smaller."""

    share: int
    weights: int
    kv_cache: int
    bytes_per_token: int
    sequences: int  # of full length that fit at once
    wanted: int  # sequences of one engine and generation batch


def plan_vllm(setup: Setup) -> VLLMPlan | None:
    """What the share of a colocated vLLM holds, if there is one; weights and cache are bfloat16."""
    args = setup.args
    if not args.use_vllm or args.vllm_mode != "colocate":
        return None
    gpus, heads = args.vllm_tensor_parallel_size, setup.config.num_key_value_heads
    share = int(args.vllm_gpu_memory_utilization * setup.gpu_memory)
    weights = 2 * setup.num_base // gpus
    bytes_per_token = 2 * setup.kv_size * max(heads // gpus, 1) // heads
    cache = max(share - weights, 0)
    sequences = cache // (bytes_per_token * setup.sequence_length)
    return VLLMPlan(share, weights, cache, bytes_per_token, sequences, setup.completions_per_process * gpus)


def plan_memory(setup: Setup) -> list[MemoryItem]:
    """Every item of one GPU that takes memory."""
    block = saved_block_bytes(setup, scoring=False)
    items = [*_states(setup), *_copies(setup), *_training(setup, block), *_generation(setup)]
    if setup.scoring is not None:
        items += _scoring(setup, setup.scoring, forward=block)
    elif setup.has_old_logps_forward:
        # At most what training keeps of a block: a forward pass frees as it goes.
        items.append(MemoryItem("forward for old log-probabilities", block, ("score",), _SMALLER_BATCH))
    return [item for item in items if item.num_bytes]


def phase_bytes(items: list[MemoryItem]) -> dict[str, int]:
    """Bytes held at the peak of each phase."""
    return {phase: sum(item.num_bytes for item in items if phase in item.phases) for phase in PHASES}


def base_parameter_bytes(setup: Setup) -> int:
    """Bytes of the base model's parameters, before sharding."""
    quantized = setup.num_linear if setup.weight_bits is not None else 0
    weight_bytes = _WEIGHT_BYTES[setup.weight_bits] if setup.weight_bits is not None else 0
    return math.ceil(quantized * weight_bytes) + (setup.num_base - quantized) * setup.held_bytes


def num_states(args: GRPOConfig) -> int:
    """Numbers that the optimizer keeps per parameter; one that is not in the table counts as AdamW."""
    name = OptimizerNames(args.optim).value.removeprefix("paged_").split("_")[0]
    has_momentum = name in ("sgd", "rmsprop") and "momentum" in (args.optim_args or "")
    return _STATES.get(name, _STATES["adamw"]) + has_momentum


def optimizer_bytes(setup: Setup) -> int:
    """Bytes of the optimizer before sharding: its states, and with DeepSpeed the float32 copy of what is trained."""
    in_8_bits = 0
    if "8bit" in OptimizerNames(setup.args.optim).value:  # all but the embedding, whose states stay in float32
        table = setup.config.vocab_size * setup.config.hidden_size if setup.peft_config is None else 0
        in_8_bits = setup.num_trained - table
    element = _FLOAT32 if setup.backend.is_deepspeed or in_8_bits else setup.trained_bytes
    states = math.ceil(in_8_bits * _STATE_BYTES) + (setup.num_trained - in_8_bits) * element
    return num_states(setup.args) * states + _FLOAT32 * setup.num_trained * setup.backend.is_deepspeed


def projection_bytes(scored: ScopedParameters, sketch_dim: int) -> int:
    """Bytes of all projections: a float32 basis for each distinct side of a matrix, a sign for each row and column."""
    bases: set[tuple[int, int, int]] = set()
    num_signs = 0
    for name, shape in scored.shapes.items():
        widths = factored_widths(shape, sketch_dim, is_table=name in scored.tables)
        num_signs += math.prod(shape) if widths is None else sum(shape)
        sides = enumerate(zip(shape, widths or shape, strict=False))  # a bias of the output projection has one side
        bases |= {(side, dim, width) for side, (dim, width) in sides if width != dim}
    return num_signs + _FLOAT32 * sum(dim * width for _, dim, width in bases)


def _states(setup: Setup) -> Iterator[MemoryItem]:
    """Parameters, gradients and optimizer."""
    backend = setup.backend

    def shard(num_bytes: int, *kinds: str) -> int:
        return math.ceil(num_bytes / backend.num_processes) if backend.kind in kinds else num_bytes

    adapter = setup.num_trained * setup.trained_bytes if setup.peft_config is not None else 0
    parameters = shard(base_parameter_bytes(setup) + adapter, "ZeRO-3", "FSDP 2") * (not backend.offloads_parameters)
    remedy = "shard them (zero3.yaml or fsdp2.yaml, more GPUs), or LoRA with load_in_4bit"
    yield MemoryItem("parameters", parameters, PHASES, remedy)
    if not backend.offloads_optimizer:
        gradients = shard(setup.num_trained * setup.trained_bytes, "ZeRO-2", "ZeRO-3", "FSDP 2")
        held = PHASES if backend.is_deepspeed else ("train", "step")  # the others set them to None after a step
        yield MemoryItem("gradients", gradients, held, "shard them (zero2.yaml, zero3.yaml or fsdp2.yaml), or LoRA")
        states = shard(optimizer_bytes(setup), "ZeRO-1", "ZeRO-2", "ZeRO-3", "FSDP 2")
        remedy = "shard or offload them (zero3_offload.yaml), optim: adamw_8bit, or LoRA"
        yield MemoryItem("optimizer states", states, PHASES, remedy)
    if setup.args.beta != 0.0 and setup.peft_config is None:
        reference = shard(base_parameter_bytes(setup), "ZeRO-3", "FSDP 2")
        yield MemoryItem("reference model", reference, PHASES, "beta: 0.0")


def _copies(setup: Setup) -> Iterator[MemoryItem]:
    """Buffers of the backend, and copies of weights made for computing."""
    backend, trained = setup.backend, setup.num_trained
    if backend.kind == "DDP":
        yield MemoryItem("DDP's gradient buckets", trained * setup.trained_bytes, PHASES, "zero2.yaml or LoRA")
    if backend.kind in ("ZeRO-1", "ZeRO-2"):
        bucket = 2 * min(trained, _BUCKET) * setup.trained_bytes
        yield MemoryItem("ZeRO's buckets", bucket, ("train", "step"), "a smaller reduce_bucket_size")
    if backend.kind == "ZeRO-3":
        live = min(setup.num_base, _MAX_LIVE_PARAMETERS) * setup.held_bytes
        yield MemoryItem("gathered parameters", live, _FORWARDS, "a smaller stage3_max_live_parameters")
    if backend.kind == "FSDP 2":
        # All but the linear layers of the blocks that are not needed now; a block's norms are left out of that.
        num_blocks = setup.config.num_hidden_layers
        freed = setup.num_linear * (num_blocks - min(2, num_blocks)) // num_blocks if backend.reshards else 0
        gathered = (setup.num_base - freed) * setup.compute_bytes
        yield MemoryItem("gathered parameters", gathered, _FORWARDS, "fsdp_reshard_after_forward: true, or zero3.yaml")
    if backend.is_deepspeed and not backend.offloads_optimizer:
        part = _FLOAT32 * min(math.ceil(trained / backend.num_processes), _SUB_GROUP)
        yield MemoryItem("gradients in float32", part, ("step",), "a smaller sub_group_size, or more GPUs")
    if setup.autocasts and setup.held_bytes == _FLOAT32 and setup.weight_bits is None:
        remedy = "dtype: bfloat16 (with LoRA), or zero2.yaml"
        yield MemoryItem("autocast's copies of weights", 2 * setup.num_linear, _FORWARDS, remedy)


def _kept(setup: Setup, block: int) -> tuple[int, int]:
    """Bytes of one micro-batch that a block keeps until its backward pass, and that this pass needs in addition."""
    config = setup.config
    num_tokens = setup.args.per_device_train_batch_size * setup.sequence_length
    # Gradients of activations: about four of the MLP's width and two of the stream's.
    gradients = num_tokens * (4 * setup.compute_bytes * config.intermediate_size + 2 * _FLOAT32 * config.hidden_size)
    if not setup.args.gradient_checkpointing:
        return block, gradients
    return num_tokens * setup.stream_bytes * config.hidden_size, gradients + block


def _training(setup: Setup, block: int) -> Iterator[MemoryItem]:
    kept, backward = _kept(setup, block)
    remedy = (
        _SMALLER_BATCH if setup.args.gradient_checkpointing else f"gradient_checkpointing: true, or {_SMALLER_BATCH}"
    )
    yield MemoryItem("activations of training", setup.config.num_hidden_layers * kept, ("train",), remedy)
    # TRL's fused output projection backward: a tile of logits, the float32 gradients of hidden states and weight, and the
    # weight's once more in its own dtype. All are freed before the first block's backward begins.
    d, V, e = setup.config.hidden_size, setup.config.vocab_size, setup.compute_bytes
    positions = setup.args.per_device_train_batch_size * (setup.sequence_length - setup.prompt_length)
    head = min(positions, _TRL_TILE[0]) * min(V, _TRL_TILE[1]) * e + positions * d * (_FLOAT32 + e)
    head += V * d * (_FLOAT32 + setup.held_bytes) if setup.peft_config is None else 0
    yield MemoryItem("head or block in training's backward", max(head, backward), ("train",), _SMALLER_BATCH)


def _scoring(setup: Setup, scoring: OBLRPOConfig, forward: int) -> Iterator[MemoryItem]:
    num_blocks = {"all": setup.config.num_hidden_layers, "lm_head": 0}.get(
        scoring.score_scope, scoring.score_last_k or 0
    )
    scored = resolve_scope(setup.model, scoring.score_scope, scoring.score_last_k)
    kept, backward = _kept(setup, saved_block_bytes(setup, scoring=True)) if num_blocks else (0, 0)
    remedy = f"score_scope: last_k or lm_head, or {_SMALLER_BATCH}"
    yield MemoryItem("activations of scoring", num_blocks * kept, ("score",), remedy)
    # The pass over the vocabulary: tiles of logits and probabilities, those of the tile before not yet freed; sums of weights
    # and of projections.
    d, V, e = setup.config.hidden_size, setup.config.vocab_size, setup.compute_bytes
    positions = setup.args.per_device_train_batch_size * (setup.sequence_length - setup.prompt_length)
    cells = min(positions, _SCORE_TILE[0]) * min(V, _SCORE_TILE[1]) * min(math.ceil(V / _SCORE_TILE[1]), 2)
    head = cells * (e if e == _FLOAT32 else e + _FLOAT32) + positions * d * (e + (_FLOAT32 if num_blocks else 0))
    head += V * projected_widths(V, d, scoring.score_sketch_dim)[0] * _FLOAT32 if scored.head_names else 0
    yield MemoryItem("head or block in scoring", max(head, backward, forward), ("score",), remedy)
    remedy = "a smaller score_sketch_dim"
    yield MemoryItem("projections", projection_bytes(scored, scoring.score_sketch_dim), PHASES, remedy)
    # Sketches of its own completions, and of all after the gather.
    num_sketches = setup.completions_per_process * (1 + setup.backend.num_processes)
    yield MemoryItem("sketches", num_sketches * scoring.score_sketch_dim * _FLOAT32, ("score",), remedy)


def _generation(setup: Setup) -> Iterator[MemoryItem]:
    args, vllm = setup.args, plan_vllm(setup)
    if vllm is not None:
        held = ("generate",) if args.vllm_enable_sleep_mode else PHASES
        remedy = "vllm_enable_sleep_mode: true, a smaller vllm_gpu_memory_utilization, or vllm_mode: server"
        yield MemoryItem("vLLM: weights and KV cache", vllm.share, held, remedy)
    if args.use_vllm:
        return
    cache = setup.completions_per_process * setup.sequence_length * setup.kv_size * setup.compute_bytes
    yield MemoryItem("KV cache", cache, ("generate",), "use_vllm: true, or fewer completions per generation batch")
    if setup.backend.kind in ("ZeRO-3", "FSDP 2") and args.ds3_gather_for_generation:
        gathered, remedy = setup.num_base * setup.held_bytes, "ds3_gather_for_generation: false, or use_vllm: true"
        yield MemoryItem("parameters gathered to generate", gathered, ("generate",), remedy)
