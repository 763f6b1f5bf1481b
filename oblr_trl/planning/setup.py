"""What memory depends on, in the planner's own words: the adapter, the backend, generation, scoring, and all together."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from oblr_trl.planning.schedule import Schedule
from oblr_trl.planning.shapes import ModelShape

BackendKind = Literal["none", "ddp", "zero1", "zero2", "zero3", "fsdp2"]


@dataclass(frozen=True)
class Adapter:
    """
    A LoRA adapter.

    Args:
        rank (`int`): Rank r.
        target_layers (`tuple[str, ...]`): Names of the linear layers that get one, such as `"q_proj"`.
    """

    rank: int
    target_layers: tuple[str, ...]

    def parameter_shapes(self, shape: ModelShape) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Name and shape of every parameter: A (r x d_in) and B (d_out x r) of each target."""
        linear = shape.linear_shapes()
        for layer in range(shape.num_layers):
            for name in self.target_layers:
                d_out, d_in = linear[name]
                yield f"layers.{layer}.{name}.lora_A", (self.rank, d_in)
                yield f"layers.{layer}.{name}.lora_B", (d_out, self.rank)

    def num_parameters(self, shape: ModelShape) -> int:
        """Number of the adapter's parameters."""
        return sum(math.prod(sizes) for _, sizes in self.parameter_shapes(shape))


@dataclass(frozen=True)
class Backend:
    """
    How the model is spread over processes.

    Args:
        kind (`str`): `"none"`, `"ddp"`, `"zero1"`, `"zero2"`, `"zero3"` or `"fsdp2"`.
        num_processes (`int`): Processes, one GPU each.
        mixed_bf16 (`bool`): Whether it computes in bfloat16 whatever the parameters are kept in.
        offloads_optimizer (`bool`, *optional*, defaults to `False`): Whether optimizer states live in main memory.
        offloads_parameters (`bool`, *optional*, defaults to `False`): Whether parameters do.
        reshards (`bool`, *optional*, defaults to `True`):
            Whether FSDP 2 gives gathered parameters back between forward and backward.
    """

    kind: BackendKind
    num_processes: int
    mixed_bf16: bool
    offloads_optimizer: bool = False
    offloads_parameters: bool = False
    reshards: bool = True

    @property
    def is_deepspeed(self) -> bool:
        """Whether DeepSpeed's engine holds the model."""
        return self.kind.startswith("zero")

    @property
    def shards_parameters(self) -> bool:
        """Whether every process keeps only its part of the parameters."""
        return self.kind in ("zero3", "fsdp2")

    @property
    def shards_gradients(self) -> bool:
        """Whether every process keeps only its part of the gradients."""
        return self.kind in ("zero2", "zero3", "fsdp2")

    @property
    def shards_states(self) -> bool:
        """Whether every process keeps only its part of the optimizer's states."""
        return self.is_deepspeed or self.kind == "fsdp2"


@dataclass(frozen=True)
class Generation:
    """
    How completions are made.

    Args:
        mode (`str`): `"transformers"`, `"colocate"` (vLLM on the training GPUs) or `"server"` (vLLM elsewhere).
        vllm_share (`float`, *optional*, defaults to `0.0`): `vllm_gpu_memory_utilization` of a colocated vLLM.
        tensor_parallel (`int`, *optional*, defaults to `1`): GPUs per vLLM engine.
        sleeps (`bool`, *optional*, defaults to `False`): Whether vLLM gives its memory back while it is not generating.
        gathers_parameters (`bool`, *optional*, defaults to `True`):
            Whether sharded parameters are gathered while transformers generates (`ds3_gather_for_generation`).
    """

    mode: Literal["transformers", "colocate", "server"]
    vllm_share: float = 0.0
    tensor_parallel: int = 1
    sleeps: bool = False
    gathers_parameters: bool = True


@dataclass(frozen=True)
class Scoring:
    """
    The scoring pass.

    Args:
        scope (`str`): `"all"`, `"last_k"` or `"lm_head"`.
        last_k (`int`, *optional*): Blocks of `"last_k"`.
        sketch_dim (`int`, *optional*, defaults to `4096`): Length of a sketch.
    """

    scope: str
    last_k: int | None = None
    sketch_dim: int = 4096


@dataclass(frozen=True)
class Setup:
    """
    Everything that a plan is made from.

    Args:
        shape ([`ModelShape`]): The model.
        backend ([`Backend`]): How it is spread.
        schedule ([`Schedule`]): Counts of batches.
        generation ([`Generation`]): How completions are made.
        prompt_length (`int`): Longest prompt, in tokens.
        completion_length (`int`): `max_completion_length`.
        checkpointing (`bool`): Gradient checkpointing.
        optimizer (`str`): Name as in `optim`.
        gpu_memory (`float`): Bytes of one GPU.
        scoring ([`Scoring`], *optional*): The scoring pass, if there is one.
        adapter ([`Adapter`], *optional*): LoRA, if it is used.
        parameter_bytes (`int`, *optional*, defaults to `4`): Bytes of a parameter as it is loaded (`dtype`).
        weight_bits (`int`, *optional*): Bits of a quantized weight (`load_in_4bit`, `load_in_8bit`).
        momentum (`bool`, *optional*, defaults to `False`): Whether SGD keeps a momentum.
        reference_model (`bool`, *optional*, defaults to `False`): Whether a second model is held for a KL term.
        masked_attention (`bool`, *optional*, defaults to `True`):
            Whether SDPA gets a mask, as it does with padding. It then holds repeated keys and values, and the mask.
    """

    shape: ModelShape
    backend: Backend
    schedule: Schedule
    generation: Generation
    prompt_length: int
    completion_length: int
    checkpointing: bool
    optimizer: str
    gpu_memory: float
    scoring: Scoring | None = None
    adapter: Adapter | None = None
    parameter_bytes: int = 4
    weight_bits: int | None = None
    momentum: bool = False
    reference_model: bool = False
    masked_attention: bool = True

    @property
    def sequence_length(self) -> int:
        """Longest sequence: prompt and completion."""
        return self.prompt_length + self.completion_length

    @property
    def num_tokens(self) -> int:
        """Tokens of one micro-batch of longest sequences."""
        return self.schedule.micro_batch * self.sequence_length

    @property
    def num_trainable(self) -> int:
        """Number of trained parameters."""
        return self.shape.num_parameters() if self.adapter is None else self.adapter.num_parameters(self.shape)

    @property
    def num_frozen(self) -> int:
        """Number of parameters that are not trained."""
        return 0 if self.adapter is None else self.shape.num_parameters()

    @property
    def held_bytes(self) -> int:
        """Bytes of a base parameter as the backend holds it while it trains."""
        if self.backend.is_deepspeed and self.backend.mixed_bf16:
            return 2
        if self.backend.kind == "fsdp2" and self.backend.mixed_bf16 and self.adapter is None:
            return 4  # accelerate lifts what is trained to float32, and computes with copies
        return self.parameter_bytes

    @property
    def trainable_bytes(self) -> int:
        """Bytes of a trained parameter; PEFT keeps adapters in float32, but for quantized models TRL casts them."""
        if self.adapter is None or (self.backend.is_deepspeed and self.backend.mixed_bf16):
            return self.held_bytes
        if self.backend.kind == "fsdp2" and self.backend.mixed_bf16:
            return 4
        return 2 if self.weight_bits is not None else 4

    @property
    def compute_bytes(self) -> int:
        """Bytes of an activation."""
        return 2 if self.backend.mixed_bf16 else self.parameter_bytes

    @property
    def autocasts(self) -> bool:
        """Whether autocast makes bfloat16 copies of float32 weights in every pass."""
        return self.backend.mixed_bf16 and self.backend.kind in ("none", "ddp")
