"""A recipe, its launch and its model, with the counts and element sizes that follow from them."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from peft import LoraConfig
from transformers import PretrainedConfig
from trl import GRPOConfig

from oblr_trl.oblrpo_config import OBLRPOConfig
from oblr_trl.planning.launch import Backend
from oblr_trl.planning.models import linear_layers, meta_model


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
    weight_bits: int | None = None  # of a quantized weight (`load_in_4bit`, `load_in_8bit`)
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

    @cached_property
    def num_linear(self) -> int:
        """Number of weights of the linear layers of all blocks."""
        return sum(layer.weight.numel() for layer in linear_layers(self.model).values())

    @cached_property
    def kv_size(self) -> int:
        """Numbers in the KV cache of one token."""
        layers = linear_layers(self.model).items()
        return sum(layer.out_features for name, layer in layers if "k_proj" in name or "v_proj" in name)

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
    def micro_batches(self) -> int:
        """Micro-batches of one generation batch."""
        assert self.args.steps_per_generation is not None
        return self.args.steps_per_generation

    @property
    def completions_per_process(self) -> int:
        """Completions of one generation batch on one process."""
        return self.args.per_device_train_batch_size * self.micro_batches

    @property
    def has_old_logps_forward(self) -> bool:
        """Whether TRL runs a forward pass for old log-probabilities that the scoring pass does not replace."""
        off_policy = self.args.gradient_accumulation_steps % (self.micro_batches * self.args.num_iterations) != 0
        needed = off_policy or (self.args.use_vllm and self.args.vllm_importance_sampling_correction)
        return needed and (self.scoring is None or not self.scoring.reuses_old_logps_forward)

    @property
    def mixed_bf16(self) -> bool:
        """Whether it computes in bfloat16 whatever the parameters are kept in."""
        return bool(self.args.bf16) or self.backend.mixed_bf16

    @property
    def held_bytes(self) -> int:
        """Bytes of a base parameter as the backend holds it while it trains."""
        if self.backend.is_deepspeed and self.mixed_bf16:
            return 2
        if self.backend.kind == "FSDP 2" and self.mixed_bf16 and self.peft_config is None:
            return 4  # accelerate lifts what is trained to float32, and computes with copies
        return self.parameter_bytes

    @property
    def trained_bytes(self) -> int:
        """Bytes of a trained parameter; PEFT keeps adapters in float32, but for quantized models TRL casts them."""
        if self.peft_config is None or (self.backend.is_deepspeed and self.mixed_bf16):
            return self.held_bytes
        is_lifted = self.backend.kind == "FSDP 2" and self.mixed_bf16
        return 2 if self.weight_bits is not None and not is_lifted else 4

    @property
    def compute_bytes(self) -> int:
        """Bytes of an activation."""
        return 2 if self.mixed_bf16 else self.parameter_bytes

    @property
    def autocasts(self) -> bool:
        """Whether autocast makes bfloat16 copies of float32 weights in every pass."""
        return self.mixed_bf16 and self.backend.kind in ("one process", "DDP")

    @property
    def stream_bytes(self) -> int:
        """Bytes of a number of the residual stream: autocast leaves norms and sums in the parameters' dtype."""
        return self.held_bytes if self.autocasts else self.compute_bytes
