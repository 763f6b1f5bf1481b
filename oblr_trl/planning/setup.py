"""A recipe, its launch and its model, with the counts and element sizes that follow from them."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from peft import LoraConfig
from transformers import PretrainedConfig
from trl import GRPOConfig

from oblr_trl.data.recipe_files import read_recipe_file
from oblr_trl.oblrpo_config import OBLRPOConfig
from oblr_trl.planning.models import meta_model


@dataclass(frozen=True)
class Backend:
    """How the model is spread over processes, one GPU each."""

    kind: str  # "one process", "DDP", "ZeRO-1", "ZeRO-2" or "ZeRO-3"
    num_processes: int
    mixed_bf16: bool  # `mixed_precision`
    offloads_optimizer: bool = False  # to main memory
    offloads_parameters: bool = False

    @property
    def is_deepspeed(self) -> bool:
        """Whether DeepSpeed's engine holds the model."""
        return self.kind.startswith("ZeRO")


def read_backend(path: str | None, *, num_gpus: int | None = None) -> Backend:
    """The backend of a launch file, or of one or `num_gpus` GPUs without one; `ValueError` for one that is not covered."""
    config = {} if path is None else read_recipe_file(path, flag="--accelerate_config")
    processes = num_gpus or int(config.get("num_processes", 1))
    mixed, deepspeed = config.get("mixed_precision") == "bf16", config.get("deepspeed_config", {})
    kind = config.get("distributed_type", "NO")
    if kind in ("NO", False, "MULTI_GPU"):  # YAML reads a bare NO as a boolean
        return Backend("DDP" if processes > 1 else "one process", processes, mixed)
    if kind == "DEEPSPEED" and "deepspeed_config_file" not in deepspeed:
        offloads = [deepspeed.get(f"offload_{what}_device", "none") != "none" for what in ("optimizer", "param")]
        return Backend(f"ZeRO-{deepspeed.get('zero_stage', 2)}", processes, mixed, *offloads)
    raise ValueError(
        f"{path}: the planner knows NO, MULTI_GPU, and DEEPSPEED with zero_stage and offload devices in this file instead of a "
        f"deepspeed_config_file, but distributed_type is {kind!r}. FSDP 2 shards as much as ZeRO-3: plan it with zero3.yaml."
    )


@dataclass(frozen=True)
class Setup:
    """What a plan is made from."""

    args: GRPOConfig
    backend: Backend
    config: PretrainedConfig
    prompt_length: int  # tokens of the longest prompt
    gpu_memory: float  # bytes of one GPU
    peft_config: LoraConfig | None = None
    parameter_bytes: int = 2  # of a parameter as it is loaded (`dtype`)
    masked: bool = True  # whether attention gets a mask, as SDPA does with padding

    @cached_property
    def model(self) -> Any:
        """The model on the meta device."""
        return meta_model(self.config, self.peft_config)

    @cached_property
    def num_trained(self) -> int:
        """Number of trained parameters."""
        return self.model.num_parameters(only_trainable=True)

    @cached_property
    def num_base(self) -> int:
        """Number of parameters of the base model."""
        return self.model.num_parameters() - (self.num_trained if self.peft_config is not None else 0)

    @property
    def scoring(self) -> OBLRPOConfig | None:
        """The recipe if it has a scoring pass."""
        return self.args if isinstance(self.args, OBLRPOConfig) and self.args.needs_scores else None

    @property
    def sequence_length(self) -> int:
        """Tokens of the longest prompt and completion."""
        assert self.args.max_completion_length is not None
        return self.prompt_length + self.args.max_completion_length

    @property
    def mixed_bf16(self) -> bool:
        """Whether it computes in bfloat16 whatever the parameters are kept in."""
        return bool(self.args.bf16) or self.backend.mixed_bf16

    @property
    def held_bytes(self) -> int:
        """Bytes of a base parameter while it trains, and of a number of the residual stream: autocast leaves norms and sums so."""
        return 2 if self.backend.is_deepspeed and self.mixed_bf16 else self.parameter_bytes

    @property
    def trained_bytes(self) -> int:
        """Bytes of a trained parameter; PEFT keeps adapters in float32."""
        is_lowered = self.backend.is_deepspeed and self.mixed_bf16
        return self.held_bytes if self.peft_config is None or is_lowered else 4

    @property
    def compute_bytes(self) -> int:
        """Bytes of an activation."""
        return 2 if self.mixed_bf16 else self.parameter_bytes

    @property
    def autocasts(self) -> bool:
        """Whether autocast makes bfloat16 copies of float32 weights in every pass."""
        return self.mixed_bf16 and not self.backend.is_deepspeed
