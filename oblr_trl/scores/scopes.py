"""Which parameters theta stands for: all trainable ones, those of the last k blocks, or the output projection.

One name per parameter, however often it is used: tied embeddings are one matrix.
"""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from torch import nn

from oblr_trl.scores.rules import find_score_rule

Scope = Literal["all", "last_k", "lm_head"]
SCOPES: tuple[str, ...] = get_args(Scope)


@dataclass
class ScopedParameters:
    """
    The parameters of one scope and where they are used.

    Args:
        shapes (`dict[str, tuple[int, ...]]`): Full (unsharded) shape by name, in a fixed order.
        names (`dict[nn.Module, dict[str, str]]`): For every layer to tap, from its own parameter names to ours.
        first_block (`nn.Module`, *optional*): Block at which a `last_k` scope begins.
        head (`nn.Module`): The output projection.
        head_names (`dict[str, str]`): As `names`, for the output projection; empty where it is frozen.
    """

    head: nn.Module
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    names: dict[nn.Module, dict[str, str]] = field(default_factory=dict)
    first_block: nn.Module | None = None
    head_names: dict[str, str] = field(default_factory=dict)

    def num_uses(self, calls: Counter[nn.Module]) -> Counter[str]:
        """How often each parameter is used in a pass in which the layers were called `calls` times."""
        uses = Counter(self.head_names.values())
        for module, names in self.names.items():
            for name in names.values():
                uses[name] += calls[module]
        return uses


def resolve_scope(model: Any, scope: str, last_k: int | None) -> ScopedParameters:
    """
    Find the parameters of `scope` in a causal language model of transformers (wrapped by PEFT or not).

    Raises:
        `ValueError`: For an unknown scope, a bad `last_k`, a model without linear output projection, a scope without any
        trainable parameter, or a trainable parameter that no rule covers.
    """
    if scope not in SCOPES:
        raise ValueError(f"`scope` must be one of {list(SCOPES)}, got {scope!r}.")
    scoped = ScopedParameters(head=_output_projection(model))
    if scope == "lm_head":
        for name, parameter in scoped.head.named_parameters(recurse=False):
            _use(scoped, scoped.head_names, name, f"lm_head.{name}", parameter)
        return scoped

    included = None
    if scope == "last_k":
        blocks = _decoder_blocks(model)
        if last_k is None or not 1 <= last_k <= len(blocks):
            raise ValueError(
                f"`scope='last_k'` needs `last_k` between 1 and the model's {len(blocks)} blocks, got {last_k}."
            )
        scoped.first_block = blocks[-last_k]
        below = blocks[: len(blocks) - last_k]
        excluded = {module for block in below for module in block.modules()}
        included = set(model.modules()) - excluded

    known: dict[int, str] = {}  # parameters by identity, so that a tied one has a single name
    for module_name, module in model.named_modules():
        if included is not None and module not in included:
            continue
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad:
                continue
            full_name = known.setdefault(id(parameter), f"{module_name}.{name}")
            names = scoped.head_names if module is scoped.head else scoped.names.setdefault(module, {})
            _use(scoped, names, name, full_name, parameter)
    for module, names in scoped.names.items():
        _check_rule(module, names)
    if not scoped.shapes:
        raise ValueError(
            f"The model has no trainable parameter in scope {scope!r}, so its score is empty. Unfreeze some parameters, or "
            "add an adapter."
        )
    return scoped


def _use(scoped: ScopedParameters, names: dict[str, str], name: str, full_name: str, parameter: nn.Parameter) -> None:
    names[name] = full_name
    # DeepSpeed ZeRO-3 keeps the full shape of a partitioned parameter in `ds_shape`; `shape` is empty there.
    scoped.shapes[full_name] = tuple(getattr(parameter, "ds_shape", parameter.shape))


def _output_projection(model: Any) -> nn.Module:
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise ValueError(
            f"The model's output embeddings are a {type(head).__name__}; only a plain `nn.Linear` head is supported. "
            "Remove the adapter from the head, or use another model class."
        )
    config = model.config.get_text_config()
    for name, neutral in (
        ("final_logit_softcapping", None),
        ("logit_scale", 1.0),
        ("logits_scaling", 1.0),
        ("output_multiplier", 1.0),
        ("lm_head_multiplier", 1.0),
    ):
        value = getattr(config, name, None)
        if value not in (None, neutral):
            raise ValueError(
                f"The model's config sets `{name}={value}`: its logits are not the plain output of the head, which the "
                "scoring pass assumes. Such models (Gemma 2, Cohere, Granite, Falcon-H1) are not supported yet."
            )
    return head


def _decoder_blocks(model: Any) -> list[nn.Module]:
    num_layers = model.config.get_text_config().num_hidden_layers
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == num_layers:
            return list(module)
    raise ValueError(
        f"`scope='last_k'` found no list of {num_layers} decoder blocks in {type(model).__name__}. Use `scope='all'`."
    )


def _check_rule(module: nn.Module, names: dict[str, str]) -> None:
    if find_score_rule(module) is None:
        raise ValueError(
            f"No score rule covers the trainable parameter `{next(iter(names.values()))}` of a {type(module).__name__}. "
            "Freeze it, use `scope='lm_head'`, or teach the pass this layer with "
            "`oblr_trl.scores.register_score_rule`."
        )
