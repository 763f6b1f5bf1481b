"""Models that take no memory: parameters on torch's meta device, and what autograd keeps of a pass over fake tensors."""

import copy
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, PretrainedConfig, Qwen3Config

from oblr_trl.scores.scopes import resolve_scope
from oblr_trl.scores.taps import frozen_parameters, tapped

MODEL_TYPES = ("qwen3", "qwen2", "llama")


def _qwen3(hidden: int, mlp: int, layers: int, heads: int, tied: bool, max_positions: int) -> Qwen3Config:
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


_QWEN3 = {
    "0.6B": (1024, 3072, 28, 16, True),
    "1.7B": (2048, 6144, 28, 16, True),
    "4B": (2560, 9728, 36, 32, True),
    "8B": (4096, 12288, 36, 32, False),
    "14B": (5120, 17408, 40, 40, False),
    "32B": (5120, 25600, 64, 64, False),
}
# From the `config.json` of the published models; used where the hub cannot be asked, and then said so. The base models were
# made for 32768 positions, the post-trained ones for 40960. There is no base model of 32B.
PUBLISHED: dict[str, PretrainedConfig] = {
    f"Qwen/Qwen3-{size}{suffix}": _qwen3(*numbers, max_positions)
    for size, numbers in _QWEN3.items()
    for suffix, max_positions in (("-Base", 32768), ("", 40960))
    if (size, suffix) != ("32B", "-Base")
}
PUBLISHED["meta-llama/Meta-Llama-3-70B"] = LlamaConfig(
    vocab_size=128256,
    hidden_size=8192,
    intermediate_size=28672,
    num_hidden_layers=80,
    num_attention_heads=64,
    num_key_value_heads=8,
    max_position_embeddings=8192,
)


def read_config(name: str, config_file: str | None = None) -> tuple[PretrainedConfig, str]:
    """
    Configuration of a model and where it is from: a file, the hub or its cache, or what the package knows of published models.

    Raises:
        `ValueError`: If there is no such file, if the hub cannot be asked and the id is not among those, or for a model that is
        not a dense decoder of a known type.
    """
    path = Path(config_file or name).expanduser()
    if config_file is not None or path.is_dir() or name.startswith((".", "/", "~")):
        file = path if config_file is not None else path / "config.json"
        if not file.is_file():
            raise ValueError(
                f"There is no {str(file)!r}: make the model first (the tiny recipes' by `python -m "
                "examples.tiny_qwen3`), or give --model_config."
            )
        config, source = AutoConfig.from_pretrained(str(file)), str(file)
    else:
        try:
            config, source = AutoConfig.from_pretrained(name), "the hub or its cache"
        except OSError as error:
            if name not in PUBLISHED:
                raise ValueError(
                    f"The hub could not be asked for {name!r}, and its shape is not among the package's own "
                    f"({', '.join(sorted(PUBLISHED))}): give --model_config."
                ) from error
            source = "the package's table of published models (the hub could not be asked)"
            config = PUBLISHED[name]
    if config.model_type not in MODEL_TYPES:
        raise ValueError(
            f"The planner knows the model types {', '.join(MODEL_TYPES)}, got {config.model_type!r}. Mixtures of experts and "
            "multimodal models are not covered: measure one step instead."
        )
    return config, source


def meta_model(
    config: PretrainedConfig,
    peft_config: LoraConfig | None = None,
    dtype: torch.dtype = torch.float32,
    num_blocks: int | None = None,
) -> Any:
    """The real model class, with its adapter, on the meta device."""
    if num_blocks is not None:
        fields = {key: value for key, value in config.to_dict().items() if key != "layer_types"}  # one for every block
        config = type(config).from_dict({**fields, "num_hidden_layers": num_blocks})
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


def saved_block_bytes(
    config: PretrainedConfig,
    peft_config: LoraConfig | None,
    *,
    length: int,
    dtypes: tuple[torch.dtype, torch.dtype],
    autocast: bool,
    masked: bool,
    scoring: bool,
) -> int:
    """
    Bytes that autograd keeps of one sequence in one block, from forward to backward: exact for SDPA without fused kernels.

    A second sequence in a second block: the difference of four passes, from which weights and their copies drop out.

    Args:
        config ([`~transformers.PretrainedConfig`]): The model.
        peft_config ([`~peft.LoraConfig`], *optional*): Its adapter.
        length (`int`): Tokens of the sequence.
        dtypes (`tuple[torch.dtype, torch.dtype]`): Of the base model's parameters and of the adapter's.
        autocast (`bool`): Whether the pass runs under autocast to bfloat16.
        masked (`bool`): Whether SDPA gets a mask; it then repeats keys and values.
        scoring (`bool`): For the scoring pass: all parameters are frozen, and taps keep the inputs of trained layers.
    """

    def saved_bytes(num_blocks: int, batch_size: int) -> int:
        model = meta_model(config, peft_config, dtypes[0], num_blocks)
        base = model if peft_config is None else model.get_base_model()
        for parameter in model.parameters() if peft_config is not None else ():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(dtypes[1])
        saved: dict[int, torch.UntypedStorage] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            saved[storage._cdata] = storage
            return tensor

        with ExitStack() as stack:
            stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
            model.to_empty(device="cpu")
            mask = torch.ones(batch_size, 1, length, length, dtype=torch.bool) if masked else None
            for block in base.model.layers:  # transformers makes a mask wherever it cannot look into the tensors
                hook = lambda _, args, kwargs: (args, {**kwargs, "attention_mask": mask})  # noqa: E731
                block.register_forward_pre_hook(hook, with_kwargs=True)
            if scoring:
                anchor, layers = torch.zeros((), requires_grad=True), resolve_scope(model, "all", None).names
                taps = tapped(layers, anchor, lambda *_: None, batch_size=batch_size, is_active=lambda: True)
                stack.enter_context(frozen_parameters(model))
                stack.enter_context(taps)
            stack.enter_context(torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor))
            stack.enter_context(torch.autocast("cpu", torch.bfloat16, enabled=autocast))
            base.model(input_ids=torch.zeros(batch_size, length, dtype=torch.long), use_cache=False)
        return sum(storage.nbytes() for storage in saved.values())

    return saved_bytes(2, 2) - saved_bytes(2, 1) - saved_bytes(1, 2) + saved_bytes(1, 1)
