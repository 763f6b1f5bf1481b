"""Which parameters theta stands for: trainable ones, those of the last k blocks, or the output projection.

One name per parameter, however often it is used: tied embeddings are one matrix. With a PEFT adapter the trainable parameters
are the adapter's and its copies of whole modules.
"""

import math
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from oblr_trl.scores.coverage import Coverage
from oblr_trl.scores.logits import LogitTransform, logit_transform, output_projection
from oblr_trl.scores.rules import full_shape

SCOPES = ("auto", "all", "last_k", "lm_head")


@dataclass
class ScopedParameters:
    """The parameters of one scope and where they are used."""

    head: nn.Linear  # the output projection
    logit_transform: LogitTransform
    dtype: torch.dtype  # of sums over the scores: the model's, float32 at least
    # Full (unsharded) shape by name, in a fixed order.
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    # For every layer to tap, from its own parameter names to ours; the same for the head, empty where it is frozen.
    names: dict[nn.Module, dict[str, str]] = field(default_factory=dict)
    head_names: dict[str, str] = field(default_factory=dict)
    # At which a `last_k` scope begins.
    first_block: nn.Module | None = None
    # Names of parameters with a row for every token: of embeddings and of the output projection.
    tables: set[str] = field(default_factory=set)
    # Trainable parameters that `"auto"` could not score: number of entries, and type of layer, by name.
    left_out: dict[str, tuple[int, str]] = field(default_factory=dict)
    # Number of entries of these and of the scored ones.
    num_trainable: int = 0

    @property
    def num_parameters(self) -> int:
        """Number of entries of all parameters."""
        return sum(math.prod(shape) for shape in self.shapes.values())

    @property
    def num_left_out(self) -> int:
        """Number of trainable entries that are not scored."""
        return sum(num_entries for num_entries, _ in self.left_out.values())

    @property
    def coverage(self) -> float:
        """Share of the trainable entries that is scored, of the scopes `"auto"` and `"all"`."""
        return 1 - self.num_left_out / self.num_trainable

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
        self.shapes[full_name] = full_shape(parameter)

    def drop_left_out(self) -> None:
        """Drop all uses of a parameter one of whose uses cannot be scored."""
        for name in self.left_out.keys() & self.shapes.keys():
            del self.shapes[name]
            for names in (self.head_names, *self.names.values()):
                for own_name in [own for own, full_name in names.items() if full_name == name]:
                    del names[own_name]
        self.names = {module: names for module, names in self.names.items() if names}


def resolve_scope(model: Any, scope: str, last_k: int | None) -> ScopedParameters:
    """
    Find the parameters of `scope` in a causal language model of transformers (wrapped by PEFT or not).

    Raises:
        `ValueError`: For an unknown scope, a bad `last_k`, a model without linear output projection, a scope without any
        trainable parameter, and, unless the scope is `"auto"`, a trainable parameter that no rule covers or a PEFT method that
        the pass does not know.
    """
    if scope not in SCOPES:
        raise ValueError(f"`scope` must be one of {list(SCOPES)}, got {scope!r}.")
    head = output_projection(model)
    dtype = torch.promote_types(head.weight.dtype, torch.float32)
    scoped = ScopedParameters(head, logit_transform(model.config.get_text_config()), dtype)
    if scope == "lm_head":
        return _with_head(scoped)

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
    coverage = Coverage(model, modules)
    for module_name, module in modules.items():
        parameters = {} if module in excluded else dict(module.named_parameters(recurse=False))
        trainable = {name: parameter for name, parameter in parameters.items() if parameter.requires_grad}
        if not trainable:
            continue
        obstacle = coverage.obstacle(module_name, next(iter(trainable)), is_head=module is scoped.head)
        if obstacle is not None and scope != "auto":
            raise ValueError(obstacle)
        for name, parameter in trainable.items():
            full_name = known.setdefault(id(parameter), f"{module_name}.{name}")
            if obstacle is None:
                scoped.add(module, name, full_name, parameter)
            else:
                scoped.left_out[full_name] = (math.prod(full_shape(parameter)), type(module).__name__)
    scoped.drop_left_out()
    scoped.num_trainable = scoped.num_parameters + scoped.num_left_out
    if not scoped.num_trainable:
        raise ValueError(
            f"The model has no trainable parameter in scope {scope!r}, so its score is empty. Unfreeze some parameters, add "
            "an adapter, or load the one it has with `is_trainable=True`."
        )
    return scoped if scoped.shapes else _with_head(scoped)


def decoder_blocks(model: Any) -> list[nn.Module]:
    """The blocks of the language model, from the embedding upwards."""
    num_layers = model.config.get_text_config().num_hidden_layers
    for module in model.get_decoder().modules():  # a vision tower may have as many blocks
        if isinstance(module, nn.ModuleList) and len(module) == num_layers:
            return list(module)
    raise ValueError(
        f"`scope='last_k'` found no list of {num_layers} decoder blocks in {type(model).__name__}. Use `scope='all'`."
    )


def _with_head(scoped: ScopedParameters) -> ScopedParameters:
    """The output projection alone, trainable or not."""
    for name, parameter in scoped.head.named_parameters(recurse=False):
        scoped.add(scoped.head, name, f"lm_head.{name}", parameter)
    return scoped
