"""Models without memory: configurations, and the real classes on torch's meta device."""

import copy
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, Qwen3Config

from oblr_trl.data.sources import check_model

MODEL_TYPES = ("qwen3", "qwen2", "llama")


def _qwen3(hidden: int, mlp: int, layers: int, heads: int, tied: bool) -> Qwen3Config:
    return Qwen3Config(
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
        tie_word_embeddings=tied,
    )


# From the `config.json` of the published models, so that these are planned without the hub.
PUBLISHED: dict[str, PretrainedConfig] = {
    **dict.fromkeys(("Qwen/Qwen3-0.6B", "Qwen/Qwen3-0.6B-Base"), _qwen3(1024, 3072, 28, 16, tied=True)),
    "Qwen/Qwen3-1.7B-Base": _qwen3(2048, 6144, 28, 16, tied=True),
    "Qwen/Qwen3-4B-Base": _qwen3(2560, 9728, 36, 32, tied=True),
    "Qwen/Qwen3-8B-Base": _qwen3(4096, 12288, 36, 32, tied=False),
    "Qwen/Qwen3-32B": _qwen3(5120, 25600, 64, 64, tied=False),
}


def read_config(name: str) -> PretrainedConfig:
    """Configuration of a model; `ValueError` for one that is not found or not a dense decoder of a known type."""
    config = PUBLISHED[name] if name in PUBLISHED else AutoConfig.from_pretrained(check_model(name))
    if config.model_type not in MODEL_TYPES:
        raise ValueError(
            f"The planner knows the model types {', '.join(MODEL_TYPES)}, got {config.model_type!r}. Mixtures of experts and "
            "multimodal models are not covered: measure one step instead."
        )
    return config


def meta_model(
    config: PretrainedConfig, peft_config: LoraConfig | None = None, dtype: torch.dtype = torch.float32
) -> Any:
    """The real model class, with its adapter, on the meta device."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa").train()
        return model if peft_config is None else get_peft_model(model, copy.deepcopy(peft_config))


def linear_layers(model: Any) -> dict[str, nn.Linear]:
    """The linear layers of all blocks by name, adapters' left out."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and ".layers." in name and "lora_" not in name
    }
