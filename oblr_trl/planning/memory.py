"""Memory of one GPU, item by item and phase by phase: what generating, scoring, training and stepping hold at their peaks.

Letters: d hidden features, i features of the MLP, e bytes of an activation, V vocabulary.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

from torch import nn
from transformers.training_args import OptimizerNames
from trl import GRPOConfig

from oblr_trl.planning.setup import Setup
from oblr_trl.scores.projections import factored_widths, projected_widths
from oblr_trl.scores.scopes import ScopedParameters, resolve_scope

PHASES = ("generate", "score", "train", "step")
_FORWARDS = ("score", "train")
_FLOAT32 = 4
# DeepSpeed's defaults, in parameters: what ZeRO-3 keeps gathered, what an optimizer step lifts to float32 at a time, and the
# buckets of ZeRO-1 and -2.
_MAX_LIVE_PARAMETERS, _SUB_GROUP, _BUCKET = 1_000_000_000, 1_000_000_000, 500_000_000
# bitsandbytes: a float32 scale for 64 weights of 4 bits, or for 256 states of 8 bits; smaller tensors and embeddings keep
# float32 states.
_QUANTIZED_BLOCK, _STATE_BLOCK, _MIN_STATE_NUMEL = 64, 256, 4096
# Numbers that an optimizer keeps per parameter, by what the name in `optim` begins with.
_STATES = {"adamw": 2, "adam": 2, "ademamix": 3, "sgd": 0, "lion": 1, "rmsprop": 1, "adagrad": 1, "adafactor": 0}
# Tokens and vocabulary of a tile of TRL's fused output projection, and of the scoring pass's (`oblr_trl.scores.head`).
_TRL_TILE, _SCORE_TILE = (4096, 32768), (1024, 8192)


class MemoryItem(NamedTuple):
    """One row of the plan: bytes on one GPU, the phases that hold them, and what makes them fewer."""

    name: str
    num_bytes: int
    phases: tuple[str, ...]
    remedy: str


@dataclass(frozen=True)
class MemoryPlan:
    """All rows, and the bytes that they may take together."""

    items: tuple[MemoryItem, ...]
    limit: float

    def held(self, phase: str) -> list[MemoryItem]:
        """The rows of a phase."""
        return [item for item in self.items if phase in item.phases]

    def total(self, phase: str) -> int:
        """Bytes held at the peak of a phase."""
        return sum(item.num_bytes for item in self.held(phase))

    @property
    def peak_phase(self) -> str:
        """The phase that needs most."""
        return max(PHASES, key=self.total)


class VLLMPlan(NamedTuple):
    """A colocated vLLM on one GPU: bytes of its share, its weights, the rest (its own activations, not known here, not taken
    off) and a token; sequences of full length that fit at once, and that one engine is given per generation batch."""

    share: int
    weights: int
    kv_cache: int
    kv_bytes_per_token: int
    sequences: int
    wanted: int


def plan_vllm(setup: Setup) -> VLLMPlan | None:
    """What the share of a colocated vLLM holds, if there is one; weights and cache are bfloat16."""
    args, config = setup.args, setup.config
    if not args.use_vllm or args.vllm_mode != "colocate":
        return None
    gpus, heads = args.vllm_tensor_parallel_size, config.num_key_value_heads
    share = int(args.vllm_gpu_memory_utilization * setup.gpu_memory)
    weights = 2 * setup.num_base // gpus
    per_token = 2 * 2 * config.num_hidden_layers * setup.kv_size * max(heads // gpus, 1) // heads
    cache = max(share - weights, 0)
    sequences = cache // (per_token * setup.sequence_length)
    return VLLMPlan(share, weights, cache, per_token, sequences, setup.completions_per_process * gpus)


def plan_memory(setup: Setup, margin: float = 0.1) -> MemoryPlan:
    """
    Every item of one GPU.

    Args:
        setup ([`Setup`]): What is to be run.
        margin (`float`, *optional*, defaults to `0.1`):
            Part of the memory left for CUDA's and NCCL's own, and for fragmentation: an assumption.
    """
    items = (*_state_items(setup), *_copy_items(setup), *_train_items(setup), *_score_items(setup))
    items += tuple(_generation_items(setup))
    return MemoryPlan(tuple(item for item in items if item.num_bytes), setup.gpu_memory * (1 - margin))


def base_parameter_bytes(setup: Setup) -> int:
    """Bytes of the base model's parameters, before sharding."""
    if setup.weight_bits is None:
        return setup.num_base * setup.held_bytes
    scales = _FLOAT32 * math.ceil(setup.num_linear / _QUANTIZED_BLOCK) if setup.weight_bits == 4 else 0
    return setup.num_linear * setup.weight_bits // 8 + scales + (setup.num_base - setup.num_linear) * setup.held_bytes


def num_states(args: GRPOConfig) -> int | None:
    """Numbers that the optimizer keeps per parameter, adafactor's sums left out; `None` if it is not known."""
    name = OptimizerNames(args.optim).value.removeprefix("paged_")
    prefix = next((prefix for prefix in _STATES if f"{name}_".startswith(f"{prefix}_")), None)
    has_momentum = prefix in ("sgd", "rmsprop") and "momentum" in (args.optim_args or "")
    return None if prefix is None else _STATES[prefix] + has_momentum


def optimizer_bytes(setup: Setup) -> int:
    """Bytes of the optimizer before sharding: its states, and with DeepSpeed the float32 copy of what is trained."""
    name, known = OptimizerNames(setup.args.optim).value, num_states(setup.args)
    states = _STATES["adamw"] if known is None else known
    element = _FLOAT32 if setup.backend.is_deepspeed else setup.trained_bytes
    total = _FLOAT32 * setup.num_trained if setup.backend.is_deepspeed else 0
    for parameter_name, parameter in setup.trained.items():
        numel = parameter.numel()
        if name.startswith("adafactor"):
            total += _FLOAT32 * (sum(parameter.shape) if parameter.ndim == 2 else numel)
        elif "8bit" not in name:
            total += states * numel * element
        elif numel < _MIN_STATE_NUMEL or "embed_tokens" in parameter_name:
            total += states * numel * _FLOAT32
        else:
            total += states * (numel + _FLOAT32 * math.ceil(numel / _STATE_BLOCK))
    return total


def _state_items(setup: Setup) -> Iterator[MemoryItem]:
    backend = setup.backend

    def shard(num_bytes: int, *kinds: str) -> int:
        return math.ceil(num_bytes / backend.num_processes) if backend.kind in kinds else num_bytes

    adapter = setup.num_trained * setup.trained_bytes if setup.peft_config is not None else 0
    parameters = shard(base_parameter_bytes(setup) + adapter, "zero3", "fsdp2") * (not backend.offloads_parameters)
    remedy = "shard them (zero3.yaml or fsdp2.yaml, more GPUs), or LoRA with load_in_4bit"
    yield MemoryItem("parameters", parameters, PHASES, remedy)
    if not backend.offloads_optimizer:
        gradients = shard(setup.num_trained * setup.trained_bytes, "zero2", "zero3", "fsdp2")
        held = PHASES if backend.is_deepspeed else ("train", "step")  # the others set them to None after a step
        yield MemoryItem("gradients", gradients, held, "shard them (zero2.yaml, zero3.yaml or fsdp2.yaml), or LoRA")
        states = shard(optimizer_bytes(setup), "zero1", "zero2", "zero3", "fsdp2")
        remedy = "shard or offload them (zero3_offload.yaml), optim: adamw_8bit, or LoRA"
        yield MemoryItem("optimizer states", states, PHASES, remedy)
    if setup.args.beta != 0.0 and setup.peft_config is None:
        reference = shard(base_parameter_bytes(setup), "zero3", "fsdp2")
        yield MemoryItem("reference model", reference, PHASES, "beta: 0.0")


def _copy_items(setup: Setup) -> Iterator[MemoryItem]:
    """Buffers of the backend, and copies of weights made for computing."""
    backend, trained = setup.backend, setup.num_trained
    if backend.kind == "ddp":
        yield MemoryItem("DDP's gradient buckets", trained * setup.trained_bytes, PHASES, "zero2.yaml or LoRA")
    if backend.kind in ("zero1", "zero2"):
        bucket = 2 * min(trained, _BUCKET) * setup.trained_bytes
        yield MemoryItem("ZeRO's buckets", bucket, ("train", "step"), "a smaller reduce_bucket_size")
    if backend.kind == "zero3":
        live = min(setup.num_base, _MAX_LIVE_PARAMETERS) * setup.held_bytes
        yield MemoryItem("gathered parameters", live, _FORWARDS, "a smaller stage3_max_live_parameters")
    if backend.kind == "fsdp2":
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


def _kept(setup: Setup, *, scoring: bool) -> tuple[int, int]:
    """Bytes of one micro-batch that a block keeps until its backward pass, and that this pass needs in addition."""
    args, config = setup.args, setup.config
    num_tokens = args.per_device_train_batch_size * setup.sequence_length
    block = setup.score_block_bytes if scoring else setup.train_block_bytes
    # Gradients of activations: about four of the MLP's width and two of the stream's.
    gradients = 4 * setup.compute_bytes * config.intermediate_size + 2 * _FLOAT32 * config.hidden_size
    if not args.gradient_checkpointing:
        return block, num_tokens * gradients
    return num_tokens * setup.stream_bytes * config.hidden_size, num_tokens * gradients + block


def _train_items(setup: Setup) -> Iterator[MemoryItem]:
    args, config, e = setup.args, setup.config, setup.compute_bytes
    remedy = "halve per_device_train_batch_size and double gradient_accumulation_steps"
    kept_remedy = remedy if args.gradient_checkpointing else f"gradient_checkpointing: true, or {remedy}"
    kept, backward = _kept(setup, scoring=False)
    yield MemoryItem("activations of training", config.num_hidden_layers * kept, ("train",), kept_remedy)
    # TRL's fused output projection backward: a tile of logits, the float32 gradients of hidden states and weight, and the
    # weight's once more in its own dtype. All are freed before the first block's backward begins.
    d, V = config.hidden_size, config.vocab_size
    positions = args.per_device_train_batch_size * setup.completion_length
    head = min(positions, _TRL_TILE[0]) * min(V, _TRL_TILE[1]) * e + positions * d * (_FLOAT32 + e)
    head += V * d * (_FLOAT32 + setup.held_bytes) if setup.peft_config is None else 0
    yield MemoryItem("head or block in training's backward", max(head, backward), ("train",), remedy)


def _score_items(setup: Setup) -> Iterator[MemoryItem]:
    remedy = "a smaller per_device_train_batch_size"
    scoring, config, e = setup.scoring, setup.config, setup.compute_bytes
    forward = setup.train_block_bytes  # no more than this: a forward pass frees as it goes
    if scoring is None:
        if setup.needs_old_logps:
            yield MemoryItem("forward for old log-probabilities", forward, ("score",), remedy)
        return
    scope, sketch_dim = scoring.score_scope, scoring.score_sketch_dim
    num_blocks = {"all": config.num_hidden_layers, "lm_head": 0}.get(scope, scoring.score_last_k or 0)
    scored = resolve_scope(setup.model, scope, scoring.score_last_k)
    kept, backward = _kept(setup, scoring=True) if num_blocks else (0, 0)
    remedy = f"score_scope: last_k or lm_head, or {remedy}"
    yield MemoryItem("activations of scoring", num_blocks * kept, ("score",), remedy)
    # The pass over the vocabulary: tiles of logits and probabilities, those of the tile before not yet freed; sums of weights
    # and of projections.
    d, V = config.hidden_size, config.vocab_size
    positions = setup.args.per_device_train_batch_size * setup.completion_length
    cells = min(positions, _SCORE_TILE[0]) * min(V, _SCORE_TILE[1]) * min(math.ceil(V / _SCORE_TILE[1]), 2)
    head = cells * (e if e == _FLOAT32 else e + _FLOAT32) + positions * d * (e + (_FLOAT32 if num_blocks else 0))
    head += V * projected_widths(V, d, sketch_dim)[0] * _FLOAT32 if scored.head_names else 0
    yield MemoryItem("head or block in scoring", max(head, backward, forward), ("score",), remedy)
    remedy = "a smaller score_sketch_dim"
    yield MemoryItem("projections", projection_bytes(scored, sketch_dim), PHASES, remedy)
    num_sketches = setup.completions_per_process * (
        1 + setup.backend.num_processes
    )  # its own, and all after the gather
    yield MemoryItem("sketches", num_sketches * sketch_dim * _FLOAT32, ("score",), remedy)


def projection_bytes(scored: ScopedParameters, sketch_dim: int) -> int:
    """Bytes of all projections when every one has been drawn: one float32 basis per shape, one sign per row and column."""
    embeddings = (names.values() for module, names in scored.names.items() if isinstance(module, nn.Embedding))
    # Below the first block of `last_k`, where nothing is tapped; tied, they are the output projection too.
    skipped = set(chain(*embeddings)) - set(scored.head_names.values()) if scored.first_block is not None else set()
    bases: dict[tuple[str, int, int], int] = {}
    signs = 0
    for name, shape in scored.shapes.items():
        if name in skipped:
            continue
        widths = factored_widths(shape, sketch_dim, is_table=name in scored.tables)
        if widths is None:
            signs += math.prod(shape)
            continue
        for side, dim, width in zip(("rows", "columns"), shape, widths, strict=True):
            signs += dim
            if width != dim:
                bases[side, dim, width] = dim * width * _FLOAT32
    return sum(bases.values()) + signs


def _generation_items(setup: Setup) -> Iterator[MemoryItem]:
    args, vllm = setup.args, plan_vllm(setup)
    if vllm is not None:
        held = ("generate",) if args.vllm_enable_sleep_mode else PHASES
        remedy = "vllm_enable_sleep_mode: true, a smaller vllm_gpu_memory_utilization, or vllm_mode: server"
        yield MemoryItem("vLLM: weights and KV cache", vllm.share, held, remedy)
    if args.use_vllm:
        return
    tokens = setup.completions_per_process * setup.sequence_length
    cache = tokens * 2 * setup.config.num_hidden_layers * setup.kv_size * setup.compute_bytes
    yield MemoryItem("KV cache", cache, ("generate",), "use_vllm: true, or fewer completions per generation batch")
    if setup.backend.kind in ("zero3", "fsdp2") and args.ds3_gather_for_generation:
        gathered, remedy = setup.num_base * setup.held_bytes, "ds3_gather_for_generation: false, or use_vllm: true"
        yield MemoryItem("parameters gathered to generate", gathered, ("generate",), remedy)
