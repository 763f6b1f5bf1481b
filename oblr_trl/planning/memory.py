"""Memory of one GPU, item by item and phase by phase: what generating, scoring, training and stepping hold at their peaks."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from oblr_trl.planning.activations import (
    block_bytes_per_token,
    head_bytes,
    kept_bytes,
    score_head_bytes,
    working_bytes,
)
from oblr_trl.planning.optimizers import state_bytes
from oblr_trl.planning.scoring import head_row_width, projection_bytes, scoped_shapes, sketch_bytes
from oblr_trl.planning.setup import Setup

PHASES = ("generate", "score", "train", "step")
_ALWAYS = PHASES
_FORWARDS = ("score", "train")
_FLOAT32 = 4
# DeepSpeed's defaults, in parameters: what ZeRO-3 keeps gathered, what an optimizer step lifts to float32 at a time, and the
# buckets of ZeRO-1 and -2.
_MAX_LIVE_PARAMETERS, _SUB_GROUP, _BUCKET = 1_000_000_000, 1_000_000_000, 500_000_000
# bitsandbytes: one float32 scale for 64 weights of 4 bits.
_QUANTIZED_BLOCK = 64


@dataclass(frozen=True)
class MemoryItem:
    """
    One row of the plan.

    Args:
        name (`str`): What it is.
        num_bytes (`int`): Bytes on one GPU.
        phases (`tuple[str, ...]`): When it is held.
        remedy (`str`): What makes it smaller.
    """

    name: str
    num_bytes: int
    phases: tuple[str, ...]
    remedy: str


@dataclass(frozen=True)
class MemoryPlan:
    """
    All rows.

    Args:
        items (`tuple[MemoryItem, ...]`): The rows.
        gpu_memory (`float`): Bytes of the GPU.
        margin (`float`): Part of it that the plan leaves free.
    """

    items: tuple[MemoryItem, ...]
    gpu_memory: float
    margin: float

    def total(self, phase: str) -> int:
        """Bytes held at the peak of a phase."""
        return sum(item.num_bytes for item in self.items if phase in item.phases)

    @property
    def peak_phase(self) -> str:
        """The phase that needs most."""
        return max(PHASES, key=self.total)

    @property
    def peak(self) -> int:
        """Bytes of that phase."""
        return self.total(self.peak_phase)

    @property
    def fits(self) -> bool:
        """Whether the peak stays within the GPU's memory less the margin."""
        return self.peak <= self.gpu_memory * (1 - self.margin)

    @property
    def biggest(self) -> MemoryItem:
        """The largest row of the phase that needs most."""
        return max((item for item in self.items if self.peak_phase in item.phases), key=lambda item: item.num_bytes)


@dataclass(frozen=True)
class VLLMPlan:
    """
    A colocated vLLM on one GPU.

    Args:
        share (`int`): Bytes it takes.
        weights (`int`): Bytes of its weights.
        kv_cache (`int`): What is left for keys and values, its own activations (not known here) not taken off.
        kv_bytes_per_token (`int`): Bytes of one token.
        sequences (`int`): Sequences of full length that fit at once.
        wanted (`int`): Sequences that one engine is given per generation batch.
    """

    share: int
    weights: int
    kv_cache: int
    kv_bytes_per_token: int
    sequences: int
    wanted: int


def plan_vllm(setup: Setup) -> VLLMPlan:
    """What the share of a colocated vLLM holds; weights and cache are bfloat16."""
    generation, shape = setup.generation, setup.shape
    share = int(generation.vllm_share * setup.gpu_memory)
    weights = 2 * shape.num_parameters() // generation.tensor_parallel
    heads = max(shape.num_kv_heads // generation.tensor_parallel, 1)
    per_token = shape.kv_bytes_per_token() * heads // shape.num_kv_heads
    cache = max(share - weights, 0)
    wanted = setup.schedule.completions_per_process * generation.tensor_parallel
    return VLLMPlan(share, weights, cache, per_token, cache // (per_token * setup.sequence_length), wanted)


def plan_memory(setup: Setup, margin: float = 0.1) -> MemoryPlan:
    """
    Every item of one GPU.

    Args:
        setup ([`Setup`]): What is to be run.
        margin (`float`, *optional*, defaults to `0.1`):
            Part of the memory left for CUDA's and NCCL's own, and for fragmentation: an assumption.
    """
    items = (*_model_items(setup), *_traffic_items(setup), *_pass_items(setup), *_score_items(setup))
    items += tuple(_generation_items(setup))
    return MemoryPlan(tuple(item for item in items if item.num_bytes), setup.gpu_memory, margin)


def _shard(num_bytes: int, setup: Setup, sharded: bool) -> int:
    return math.ceil(num_bytes / setup.backend.num_processes) if sharded else num_bytes


def base_parameter_bytes(setup: Setup) -> int:
    """Bytes of the base model's parameters, before sharding."""
    shape = setup.shape
    if setup.weight_bits is None:
        return shape.num_parameters() * setup.held_bytes
    quantized = shape.num_linear_parameters()
    scales = _FLOAT32 * math.ceil(quantized / _QUANTIZED_BLOCK) if setup.weight_bits == 4 else 0
    return quantized * setup.weight_bits // 8 + scales + (shape.num_parameters() - quantized) * setup.held_bytes


def _model_items(setup: Setup) -> Iterator[MemoryItem]:
    backend, trainable = setup.backend, setup.num_trainable
    parameters = base_parameter_bytes(setup)
    if setup.adapter is not None:
        parameters += trainable * setup.trainable_bytes
    on_gpu = 0 if backend.offloads_parameters else _shard(parameters, setup, backend.shards_parameters)
    yield MemoryItem(
        "parameters", on_gpu, _ALWAYS, "shard them (zero3.yaml or fsdp2.yaml, more GPUs), or LoRA with load_in_4bit"
    )
    gradients = _shard(trainable * setup.trainable_bytes, setup, backend.shards_gradients)
    held = _ALWAYS if backend.is_deepspeed else ("train", "step")  # the others set them to None after a step
    if backend.offloads_optimizer or (backend.kind == "fsdp2" and backend.offloads_parameters):
        gradients = 0
    yield MemoryItem("gradients", gradients, held, "shard them (zero2.yaml, zero3.yaml or fsdp2.yaml), or LoRA")
    states = 0
    if not (backend.offloads_optimizer or (backend.kind == "fsdp2" and backend.offloads_parameters)):
        states = _shard(optimizer_bytes(setup), setup, backend.shards_states)
    yield MemoryItem(
        "optimizer states", states, _ALWAYS, "shard or offload them (zero3_offload.yaml), optim: adamw_8bit, or LoRA"
    )
    if setup.reference_model and setup.adapter is None:
        reference = _shard(base_parameter_bytes(setup), setup, backend.shards_parameters)
        yield MemoryItem("reference model", reference, _ALWAYS, "beta: 0.0")


def optimizer_bytes(setup: Setup) -> int:
    """Bytes of the optimizer before sharding: its states and, with DeepSpeed, the float32 copy of what is trained."""
    shapes = setup.shape.parameter_shapes() if setup.adapter is None else setup.adapter.parameter_shapes(setup.shape)
    element = _FLOAT32 if setup.backend.is_deepspeed else setup.trainable_bytes
    states = state_bytes(shapes, setup.optimizer, parameter_bytes=element, momentum=setup.momentum)
    return states + (_FLOAT32 * setup.num_trainable if setup.backend.is_deepspeed else 0)


def _traffic_items(setup: Setup) -> Iterator[MemoryItem]:
    """Buffers of the backend, and copies of weights made for computing."""
    shape, backend, trainable = setup.shape, setup.backend, setup.num_trainable
    if backend.kind == "ddp":
        yield MemoryItem("DDP's gradient buckets", trainable * setup.trainable_bytes, _ALWAYS, "zero2.yaml or LoRA")
    if backend.kind in ("zero1", "zero2"):
        bucket = 2 * min(trainable, _BUCKET) * setup.trainable_bytes
        yield MemoryItem("ZeRO's buckets", bucket, ("train", "step"), "a smaller reduce_bucket_size")
    if backend.kind == "zero3":
        live = min(shape.num_parameters(), _MAX_LIVE_PARAMETERS) * setup.held_bytes
        yield MemoryItem("gathered parameters", live, _FORWARDS, "a smaller stage3_max_live_parameters")
    if backend.kind == "fsdp2":
        outside = shape.num_parameters() - shape.num_layers * shape.num_block_parameters()
        num_blocks = 2 if backend.reshards else shape.num_layers
        gathered = (outside + num_blocks * shape.num_block_parameters()) * setup.compute_bytes
        yield MemoryItem("gathered parameters", gathered, _FORWARDS, "fsdp_reshard_after_forward: true, or zero3.yaml")
    if backend.is_deepspeed and not backend.offloads_optimizer:
        part = min(math.ceil(trainable / backend.num_processes), _SUB_GROUP)
        yield MemoryItem("gradients in float32", _FLOAT32 * part, ("step",), "a smaller sub_group_size, or more GPUs")
    if setup.autocasts and setup.held_bytes == _FLOAT32 and setup.weight_bits is None:
        copies = 2 * shape.num_linear_parameters()
        yield MemoryItem(
            "autocast's copies of weights", copies, _FORWARDS, "dtype: bfloat16 (with LoRA), or zero2.yaml"
        )


def _pass_items(setup: Setup) -> Iterator[MemoryItem]:
    remedy = "halve per_device_train_batch_size and double gradient_accumulation_steps"
    kept_remedy = remedy if setup.checkpointing else f"gradient_checkpointing: true, or {remedy}"
    yield MemoryItem("activations of training", kept_bytes(setup), ("train",), kept_remedy)
    # The head's buffers are gone when the first block's backward begins.
    working = max(head_bytes(setup), working_bytes(setup))
    yield MemoryItem("head or block in training's backward", working, ("train",), remedy)


def _score_items(setup: Setup) -> Iterator[MemoryItem]:
    remedy = "a smaller per_device_train_batch_size"
    inside = setup.num_tokens * block_bytes_per_token(setup)  # no more than this: a forward pass frees as it goes
    if setup.scoring is None:
        if setup.schedule.needs_old_logps:
            yield MemoryItem("forward for old log-probabilities", inside, ("score",), remedy)
        return
    remedy = f"score_scope: last_k or lm_head, or {remedy}"
    yield MemoryItem("activations of scoring", kept_bytes(setup, scoring=True), ("score",), remedy)
    scores_head = setup.adapter is None or setup.scoring.scope == "lm_head"
    width = head_row_width(setup.shape, setup.scoring.sketch_dim) if scores_head else 0
    backward = 0 if setup.scoring.scope == "lm_head" else working_bytes(setup, scoring=True)
    working = max(score_head_bytes(setup, width), backward, inside)
    yield MemoryItem("head or block in scoring", working, ("score",), remedy)
    projections = projection_bytes(scoped_shapes(setup), setup.scoring.sketch_dim)
    yield MemoryItem("projections", projections, _ALWAYS, "a smaller score_sketch_dim")
    yield MemoryItem("sketches", sketch_bytes(setup), ("score",), "a smaller score_sketch_dim")


def _generation_items(setup: Setup) -> Iterator[MemoryItem]:
    generation, shape = setup.generation, setup.shape
    if generation.mode == "colocate":
        held = ("generate",) if generation.sleeps else _ALWAYS
        yield MemoryItem(
            "vLLM: weights and KV cache",
            plan_vllm(setup).share,
            held,
            "vllm_enable_sleep_mode: true, a smaller vllm_gpu_memory_utilization, or vllm_mode: server",
        )
    if generation.mode == "transformers":
        tokens = setup.schedule.completions_per_process * setup.sequence_length
        cache = tokens * shape.kv_bytes_per_token(setup.compute_bytes)
        yield MemoryItem("KV cache", cache, ("generate",), "use_vllm: true, or fewer completions per generation batch")
        if setup.backend.shards_parameters and generation.gathers_parameters:
            gathered = shape.num_parameters() * setup.held_bytes
            yield MemoryItem(
                "parameters gathered to generate",
                gathered,
                ("generate",),
                "ds3_gather_for_generation: false, or use_vllm: true",
            )
