"""The passes that the GPU benchmark measures: a random Qwen3 of a published shape and one micro-batch without padding."""

import copy
import os
import socket
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import PretrainedConfig, Qwen3Config, Qwen3ForCausalLM
from trl.trainer.utils import add_fused_lm_head

from oblr_trl.planning.models import PUBLISHED
from oblr_trl.scores import ScorePass

SHAPES = {
    "Qwen3-4B": PUBLISHED["Qwen/Qwen3-4B-Base"],
    "Qwen3-8B": PUBLISHED["Qwen/Qwen3-8B-Base"],
    "tiny": Qwen3Config(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=128,
        tie_word_embeddings=True,
    ),
}
SCOPES: dict[str, dict[str, Any]] = {
    "all": {"scope": "all"},
    "last_k": {"scope": "last_k", "last_k": 2},
    "lm_head": {"scope": "lm_head"},
}


class Settings(Protocol):
    """What a workload needs of the benchmark's arguments."""

    batch_size: int
    lora_r: int
    sketch_dim: int
    seed: int


@dataclass(frozen=True)
class Case:
    """
    One table.

    Args:
        shape (`str`): Name of the shape.
        sequence_length (`int`): Tokens per sequence.
        lora (`bool`): Whether an adapter is trained.
        checkpointing (`bool`): Whether gradient checkpointing is on.
        zero3 (`bool`): Whether ZeRO-3 holds the model.
    """

    shape: str
    sequence_length: int
    lora: bool
    checkpointing: bool
    zero3: bool


def build_model(config: PretrainedConfig, device: torch.device, seed: int) -> Any:
    """A Qwen3 of the shape with random weights, made on the device and in its dtype."""
    config = copy.deepcopy(config)
    config._attn_implementation = "sdpa"
    torch.manual_seed(seed)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16 if device.type == "cuda" else torch.float32)
    try:
        with device:
            return Qwen3ForCausalLM(config).train()
    finally:
        torch.set_default_dtype(default)


class Workload:
    """
    The passes of [`PASSES`] over one micro-batch.

    Args:
        args ([`Settings`]): Settings of the benchmark.
        case ([`Case`]): The table.
        device (`torch.device`): Where it runs.
    """

    def __init__(self, args: Settings, case: Case, device: torch.device) -> None:
        config = SHAPES[case.shape]
        model = build_model(config, device, args.seed)
        # As GRPOTrainer prepares a model.
        add_fused_lm_head(model, outputs=("log_probs", "entropy"))
        if case.lora:
            model = get_peft_model(
                model, LoraConfig(r=args.lora_r, target_modules="all-linear"), autocast_adapter_dtype=False
            )
        if case.checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            if case.lora:
                model.enable_input_require_grads()
        self.engine = _zero3_engine(model, args.batch_size) if case.zero3 else None
        self.model = model
        generator = torch.Generator().manual_seed(args.seed)
        size = (args.batch_size, case.sequence_length)
        self.input_ids = torch.randint(0, config.vocab_size, size, generator=generator).to(device)
        self._num_tokens = case.sequence_length * 3 // 4
        self._score_passes = {
            name: ScorePass(model, sketch_dim=args.sketch_dim, seed=args.seed, **settings)
            for name, settings in SCOPES.items()
        }

    def run(self, name: str) -> object:
        """The pass of that name; what the caller would go on holding is returned."""
        if name in self._score_passes:
            targets = self.input_ids[:, -self._num_tokens :]
            weights = torch.ones(targets.shape, device=targets.device)
            return self._score_passes[name](_model_inputs(self.input_ids), targets, weights)
        return {"train": self.train, "old_logps": self.old_logps, "per_sequence": self.per_sequence}[name]()

    def clear(self) -> None:
        """Drop the gradients of a measured pass."""
        if self.engine is not None:
            self.engine.zero_grad()
        self.model.zero_grad(set_to_none=True)

    def close(self) -> None:
        """Let go of what outlives the object: ZeRO-3's hooks and buffers."""
        if self.engine is not None:
            self.engine.destroy()

    def _objective(self, input_ids: Tensor) -> Tensor:
        labels = input_ids.clone()
        labels[:, : -self._num_tokens] = -100
        outputs = self.model(**_model_inputs(input_ids), labels=labels, fused_lm_head=True, use_cache=False)
        return outputs.log_probs[:, -self._num_tokens :].sum()

    def _backward(self, objective: Tensor) -> None:
        if self.engine is not None:
            self.engine.backward(objective)
        else:
            objective.backward()

    def train(self) -> None:
        """What a training step spends before the optimizer."""
        self._backward(self._objective(self.input_ids))

    @torch.no_grad()
    def old_logps(self) -> Tensor:
        """The forward pass that a riding scoring pass replaces."""
        return self._objective(self.input_ids)

    def per_sequence(self) -> list[Tensor]:
        """Squared norms the obvious way, one sequence at a time."""
        norms = []
        for i in range(self.input_ids.size(0)):
            self._backward(self._objective(self.input_ids[i : i + 1]))
            gradients = [parameter.grad for parameter in self.model.parameters() if parameter.grad is not None]
            norms.append(sum((gradient.float().square().sum() for gradient in gradients), torch.zeros(())))
            self.clear()
        return norms


def _model_inputs(input_ids: Tensor) -> dict[str, Tensor]:
    return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}


def _zero3_engine(model: Any, batch_size: int) -> Any:
    """A ZeRO-3 engine of this process alone, with an optimizer that is never stepped."""
    import deepspeed

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.SGD(trainable, lr=0.0),
        config={
            "train_micro_batch_size_per_gpu": batch_size,
            # Far from its end: `backward` never steps the optimizer.
            "gradient_accumulation_steps": 2**20,
            "zero_optimization": {"stage": 3},
            "zero_allow_untested_optimizer": True,
            "bf16": {"enabled": next(iter(trainable)).dtype == torch.bfloat16},
        },
    )
    return engine
