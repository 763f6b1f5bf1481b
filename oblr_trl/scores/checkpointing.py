"""Gradient checkpointing during the scoring pass: as in training, but never reentrant.

Reentrant checkpointing runs each block in a graph of its own, which `torch.autograd.grad` cannot enter; TRL forces it for
adapters under ZeRO-3. The pass forms no weight gradient, so the reason for that does not apply to it.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.utils.checkpoint import checkpoint

_FLAG = "gradient_checkpointing"
_FUNCTION = "_gradient_checkpointing_func"


@contextmanager
def non_reentrant_checkpointing(model: nn.Module, *, enabled: bool | None = None) -> Iterator[None]:
    """
    Let the blocks of a model of transformers checkpoint without reentrance while the block runs.

    Args:
        model (`torch.nn.Module`):
            The model. Only blocks for which checkpointing has been set up at some time are touched.
        enabled (`bool`, *optional*):
            Whether they checkpoint at all. As they are set if not given.
    """
    blocks = [module for module in model.modules() if _FUNCTION in module.__dict__]
    before = [(module.__dict__[_FUNCTION], module.__dict__.get(_FLAG, False)) for module in blocks]
    function = functools.partial(checkpoint, use_reentrant=False)
    try:
        for module, (_, flag) in zip(blocks, before, strict=True):
            setattr(module, _FUNCTION, function)
            setattr(module, _FLAG, flag if enabled is None else enabled)
        yield
    finally:
        for module, (original, flag) in zip(blocks, before, strict=True):
            setattr(module, _FUNCTION, original)
            setattr(module, _FLAG, flag)
