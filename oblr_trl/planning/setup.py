"""What a plan is made from, and the counts and sizes that follow from it."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from peft import LoraConfig
from torch import nn
from transformers import PretrainedConfig
from trl import GRPOConfig

from oblr_trl.oblrpo_config import OBLRPOConfig
from oblr_trl.planning.launch import Backend
from oblr_trl.planning.models import linear_layers, meta_model, saved_block_bytes


@dataclass(frozen=True)
class Setup:
    """
    A recipe, its launch and its model.

    Args:
        args ([`~trl.GRPOConfig`]): The recipe.
        backend ([`Backend`]): How the model is spread.
        config ([`~transformers.PretrainedConfig`]): The model.
        prompt_length (`int`): Longest prompt, in tokens.
        gpu_memory (`float`): Bytes of one GPU.
        peft_config ([`~peft.LoraConfig`], *optional*): Its adapter.
        parameter_bytes (`int`, *optional*, defaults to `2`): Bytes of a parameter as it is loaded (`dtype`).
        weight_bits (`int`, *optional*): Bits of a quantized weight (`load_in_4bit`, `load_in_8bit`).
        masked (`bool`, *optional*, defaults to `True`): Whether attention gets a mask, as SDPA does with padding.
    """

    args: GRPOConfig
    backend: Backend
    config: PretrainedConfig
    prompt_length: int
    gpu_memory: float
    peft_config: LoraConfig | None = None
    parameter_bytes: int = 2
    weight_bits: int | None = None
    masked: bool = True

    @cached_property
    def model(self) -> Any:
        """The model on the meta device."""
        return meta_model(self.config, self.peft_config)

    @cached_property
    def trained(self) -> dict[str, nn.Parameter]:
        """What the optimizer trains, by name."""
        return {name: parameter for name, parameter in self.model.named_parameters() if parameter.requires_grad}

    @cached_property
    def num_trained(self) -> int:
        """Number of trained parameters."""
        return sum(parameter.numel() for parameter in self.trained.values())

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
        """Features of the keys of one token in one block."""
        return next(layer.out_features for name, layer in linear_layers(self.model).items() if "k_proj" in name)

    @property
    def scoring(self) -> OBLRPOConfig | None:
        """The recipe where it has a scoring pass."""
        return self.args if isinstance(self.args, OBLRPOConfig) and self.args.needs_scores else None

    @property
    def completion_length(self) -> int:
        """Longest completion, in tokens."""
        assert self.args.max_completion_length is not None
        return self.args.max_completion_length

    @property
    def sequence_length(self) -> int:
        """Longest sequence: prompt and completion."""
        return self.prompt_length + self.completion_length

    @property
    def micro_batches(self) -> int:
        """Micro-batches that one generation batch is cut into."""
        assert self.args.steps_per_generation is not None
        return self.args.steps_per_generation

    @property
    def completions_per_process(self) -> int:
        """Completions of one generation batch on one process."""
        return self.args.per_device_train_batch_size * self.micro_batches

    @property
    def needs_old_logps(self) -> bool:
        """Whether TRL runs a forward pass for old log-probabilities, which the scoring pass may take the place of."""
        has_moved = self.args.gradient_accumulation_steps % (self.micro_batches * self.args.num_iterations) != 0
        return has_moved or (self.args.use_vllm and self.args.vllm_importance_sampling_correction)

    @property
    def held_bytes(self) -> int:
        """Bytes of a base parameter as the backend holds it while it trains."""
        if self.backend.is_deepspeed and self.backend.mixed_bf16:
            return 2
        if self.backend.kind == "fsdp2" and self.backend.mixed_bf16 and self.peft_config is None:
            return 4  # accelerate lifts what is trained to float32, and computes with copies
        return self.parameter_bytes

    @property
    def trained_bytes(self) -> int:
        """Bytes of a trained parameter; PEFT keeps adapters in float32, but for quantized models TRL casts them."""
        if self.peft_config is None or (self.backend.is_deepspeed and self.backend.mixed_bf16):
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

    @property
    def stream_bytes(self) -> int:
        """Bytes of a number of the residual stream: autocast leaves norms and sums in the parameters' dtype."""
        return self.held_bytes if self.autocasts else self.compute_bytes

    @cached_property
    def train_block_bytes(self) -> int:
        """Bytes that autograd keeps of one micro-batch of longest sequences in one block."""
        return self._block_bytes(scoring=False)

    @cached_property
    def score_block_bytes(self) -> int:
        """The same in the scoring pass."""
        return self._block_bytes(scoring=True)

    def _block_bytes(self, *, scoring: bool) -> int:
        dtypes = {2: torch.bfloat16, 4: torch.float32}
        return self.args.per_device_train_batch_size * saved_block_bytes(
            self.config,
            self.peft_config,
            length=self.sequence_length,
            dtypes=(dtypes[self.stream_bytes], dtypes[self.trained_bytes]),
            autocast=self.autocasts,
            masked=self.masked,
            scoring=scoring,
        )
