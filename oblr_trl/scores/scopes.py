"""Which parameters theta stands for: all trainable ones, those of the last k blocks, or the output projection.

One name per parameter, however often it is used: tied embeddings are one matrix. With a PEFT adapter the trainable parameters
are the adapter's and its copies of whole modules; a method that does not use them by calling a layer is refused.
"""

import math
from collections import Counter
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from oblr_trl.scores.rules import find_score_rule, forward_owner

SCOPES = ("all", "last_k", "lm_head")

# PEFT's classes whose trainable layers are called like any other, with one row per sequence: all that a tap can see. Other
# methods multiply with `weight` themselves, or use the same layers otherwise (DoRA), and their scores would be wrong without notice.
# Of the quantized layers only the forward code was read.
_PEFT_CLASSES = (
    "peft.peft_model.PeftModel*",
    "peft.tuners.lora.*LoraLinear",
    "peft.tuners.lora.bnb.Linear*",
    "peft.tuners.lora.layer.Linear",
    "peft.tuners.lora.model.LoraModel",
    "peft.utils.other.ModulesToSaveWrapper",
)
# Entries of a model's configuration by which its head's output is transformed (Gemma 2, Cohere, Granite, Falcon-H1), and the value
# of one that does nothing.
_LOGIT_TRANSFORMS = {
    "final_logit_softcapping": None,
    "logit_scale": 1.0,
    "logits_scaling": 1.0,
    "output_multiplier": 1.0,
    "lm_head_multiplier": 1.0,
}


@dataclass
class ScopedParameters:
    """The parameters of one scope and where they are used."""

    head: nn.Linear  # the output projection
    # Full (unsharded) shape by name, in a fixed order.
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    # For every layer to tap, from its own parameter names to ours; the same for the head, empty where it is frozen.
    names: dict[nn.Module, dict[str, str]] = field(default_factory=dict)
    head_names: dict[str, str] = field(default_factory=dict)
    # At which a `last_k` scope begins.
    first_block: nn.Module | None = None
    # Names of parameters with a row for every token: of embeddings and of the output projection.
    tables: set[str] = field(default_factory=set)

    @property
    def num_parameters(self) -> int:
        """Number of entries of all parameters."""
        return sum(math.prod(shape) for shape in self.shapes.values())

    def shared(self, calls: Counter[nn.Module]) -> set[str]:
        """Parameters that are used several times in a pass in which the layers were called `calls` times."""
        uses = Counter(self.head_names.values())
        for module, names in self.names.items():
            uses.update(dict.fromkeys(names.values(), calls[module]))
        return {name for name, num_uses in uses.items() if num_uses > 1}

    def add(self, module: nn.Module, name: str, full_name: str, parameter: nn.Parameter) -> None:
        """Take in the use of a parameter as `name` of `module`."""
        names = self.head_names if module is self.head else self.names.setdefault(module, {})
        names[name] = full_name
        if module is self.head or isinstance(module, nn.Embedding):
            self.tables.add(full_name)
        # DeepSpeed ZeRO-3 keeps the full shape of a partitioned parameter in `ds_shape`; `shape` is empty there.
        self.shapes[full_name] = tuple(getattr(parameter, "ds_shape", parameter.shape))


def resolve_scope(model: Any, scope: str, last_k: int | None) -> ScopedParameters:
    """
    Find the parameters of `scope` in a causal language model of transformers (wrapped by PEFT or not).

    Raises:
        `ValueError`: For an unknown scope, a bad `last_k`, a model without linear output projection, a scope without any
        trainable parameter, a trainable parameter that no rule covers, or a PEFT method that the pass does not know.
    """
    if scope not in SCOPES:
        raise ValueError(f"`scope` must be one of {list(SCOPES)}, got {scope!r}.")
    scoped = ScopedParameters(_output_projection(model))
    if scope == "lm_head":
        for name, parameter in scoped.head.named_parameters(recurse=False):
            scoped.add(scoped.head, name, f"lm_head.{name}", parameter)
        return scoped

    excluded: set[nn.Module] = set()
    if scope == "last_k":
        blocks = decoder_blocks(model)
        if last_k is None or not 1 <= last_k <= len(blocks):
            raise ValueError(
                f"`scope='last_k'` needs `last_k` between 1 and the model's {len(blocks)} blocks, got {last_k}."
            )
        scoped.first_block = blocks[-last_k]
        excluded.update(module for block in blocks[:-last_k] for module in block.modules())

    known: dict[int, str] = {}  # parameters by identity, so that a tied one has a single name
    modules = dict(model.named_modules())
    for module_name, module in modules.items():
        parameters = {} if module in excluded else dict(module.named_parameters(recurse=False))
        trainable = {name: parameter for name, parameter in parameters.items() if parameter.requires_grad}
        if trainable:
            _check_adapter(modules, module_name, f"{module_name}.{next(iter(trainable))}")
        for name, parameter in trainable.items():
            scoped.add(module, name, known.setdefault(id(parameter), f"{module_name}.{name}"), parameter)
    _check_inside_language_model(model, scoped)
    for module, names in scoped.names.items():
        if find_score_rule(module) is None:
            raise ValueError(
                f"No score rule covers the trainable parameter `{next(iter(names.values()))}` of a {type(module).__name__}. "
                "Freeze it, use `scope='lm_head'`, or teach the pass this layer with "
                "`oblr_trl.scores.register_score_rule`."
            )
    if not scoped.shapes:
        raise ValueError(
            f"The model has no trainable parameter in scope {scope!r}, so its score is empty. Unfreeze some parameters, add "
            "an adapter, or load the one it has with `is_trainable=True`."
        )
    return scoped


def decoder_blocks(model: Any) -> list[nn.Module]:
    """The blocks of the language model, from the embedding upwards."""
    num_layers = model.config.get_text_config().num_hidden_layers
    for module in model.get_decoder().modules():  # a vision tower may have as many blocks
        if isinstance(module, nn.ModuleList) and len(module) == num_layers:
            return list(module)
    raise ValueError(
        f"`scope='last_k'` found no list of {num_layers} decoder blocks in {type(model).__name__}. Use `scope='all'`."
    )


def _output_projection(model: Any) -> nn.Linear:
    head = model.get_output_embeddings()
    if _qualified_name(head) == "peft.utils.other.ModulesToSaveWrapper":
        if "forward" in vars(head):
            raise ValueError(
                "`cast_lm_head_to_fp32=True` replaces the forward of a head in `modules_to_save`, whose trained copy is then "
                "never called. Set `cast_lm_head_to_fp32=False`, or remove the head from `modules_to_save`."
            )
        head = head.modules_to_save[head.active_adapter]
    if forward_owner(head) is not nn.Linear:
        raise ValueError(
            f"The model's output embeddings are a `{_qualified_name(head)}`, but the scoring pass computes logits as a plain "
            "`nn.Linear` does. Leave the head out of adapters (`modules_to_save=['lm_head']` trains a copy of it) and of "
            "quantization (`llm_int8_skip_modules` or `modules_to_not_convert`, as ['lm_head'])."
        )
    config = model.config.get_text_config()
    for name, neutral in _LOGIT_TRANSFORMS.items():
        if (value := getattr(config, name, None)) not in (None, neutral):
            raise ValueError(
                f"The model's config sets `{name}={value}`: its logits are not the plain output of the head, which the "
                "scoring pass assumes. Such models are not supported yet."
            )
    return head


def _check_adapter(modules: dict[str, nn.Module], module_name: str, full_name: str) -> None:
    """Refuse a trainable layer that belongs to a PEFT method which does not call it. The innermost class of PEFT decides."""
    path = module_name
    while not (owner := _qualified_name(modules[path])).startswith("peft."):
        if not path:
            return
        path = path.rpartition(".")[0]
    layer: Any = modules[path]
    variants = vars(layer).get("lora_variant", {})  # DoRA and others
    active = [type(variants[name]).__name__ for name in variants if name in layer.active_adapters]
    if active or not any(fnmatchcase(owner, pattern) for pattern in _PEFT_CLASSES):
        raise ValueError(
            f"The scoring pass does not support PEFT's `{active[0] if active else owner}`, which trains `{full_name}`. Use plain "
            "LoRA or rsLoRA on linear layers and `modules_to_save`, or score the output projection alone (`scope='lm_head'`, which "
            "is `score_scope` in `OBLRPOConfig`)."
        )


def _check_inside_language_model(model: Any, scoped: ScopedParameters) -> None:
    """Refuse trainable parameters that see images: their first axis counts images or patches, not sequences, and where the
    two numbers agree it is by chance."""
    if model.config.get_text_config() is model.config:
        return
    inside = set(model.get_decoder().modules())
    outside = [name for module, names in scoped.names.items() if module not in inside for name in names.values()]
    if outside:
        raise ValueError(
            f"{len(outside)} trainable parameters, the first of them `{outside[0]}`, lie outside the language model: they see "
            "images or patches, so their gradient cannot be told apart by sequence. Freeze the vision tower and the "
            "projector (for adapters, limit `target_modules` to the language model), or use `scope='lm_head'` (`score_scope` in "
            "`OBLRPOConfig`), which scores the output projection and trains everything."
        )


def _qualified_name(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__name__}"
