"""Models without memory: configurations, and the real classes on torch's meta device."""

import copy
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, Qwen3Config

MODEL_TYPES = ("qwen3", "qwen2", "llama")


def _qwen3(hidden: int, mlp: int, layers: int, heads: int, tied: bool, max_positions: int = 32768) -> Qwen3Config:
    return Qwen3Config(
        vocab_size=151936,
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
        head_dim=128,
        tie_word_embeddings=tied,
        max_position_embeddings=max_positions,
    )


# From the `config.json` of the published models; used where the hub cannot be asked, and then said so.
PUBLISHED: dict[str, PretrainedConfig] = {
    "Qwen/Qwen3-0.6B-Base": _qwen3(1024, 3072, 28, 16, tied=True),
    "Qwen/Qwen3-1.7B-Base": _qwen3(2048, 6144, 28, 16, tied=True),
    "Qwen/Qwen3-4B-Base": _qwen3(2560, 9728, 36, 32, tied=True),
    "Qwen/Qwen3-8B-Base": _qwen3(4096, 12288, 36, 32, tied=False),
    "Qwen/Qwen3-14B-Base": _qwen3(5120, 17408, 40, 40, tied=False),
    "Qwen/Qwen3-32B": _qwen3(5120, 25600, 64, 64, tied=False, max_positions=40960),
}


def read_config(name: str, config_file: str | None = None) -> tuple[PretrainedConfig, str]:
    """
    Configuration of a model and where it is from: a file or folder, the hub or its cache, or `PUBLISHED`.

    Raises:
        `ValueError`: If there is none, or for a model that is not a dense decoder of a known type.
    """
    asked = config_file or name
    try:
        config, source = AutoConfig.from_pretrained(asked), asked if Path(asked).exists() else "the hub or its cache"
    except OSError as error:
        if asked not in PUBLISHED:
            raise ValueError(
                f"There is no configuration of {asked!r} here or on the hub (if it could be asked), and the package itself knows "
                f"{', '.join(PUBLISHED)}: make the model first (the tiny recipes' by `python -m examples.tiny_qwen3`), or give "
                "--model_config."
            ) from error
        config, source = PUBLISHED[asked], "the package's table of published models (the hub could not be asked)"
    if config.model_type not in MODEL_TYPES:
        raise ValueError(
            f"The planner knows the model types {', '.join(MODEL_TYPES)}, got {config.model_type!r}. Mixtures of experts and "
            "multimodal models are not covered: measure one step instead."
        )
    return config, source


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
