"""One call of a layer, as a rule sees it in the backward pass: its arguments and where it keeps the sequences apart.

Shapes: B sequences of L tokens; a layer is called with (B, ...), with (B L m, ...) where a model flattens sequences, positions and
heads (mixture-of-experts layers, gated norms), or with (1, ...) where it computes the same for all of them (GPT-2's positions). Vectors
and numbers are shared by all sequences: the biases that some routers are called with.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """Sequences and tokens of a batch."""

    batch_size: int  # B
    num_tokens: int  # L, of each sequence

    def batch_first(self, tensor: Tensor) -> Tensor | None:
        """A view of shape `(B, ...)`, or `None` if the first axis does not tell sequences apart."""
        if tensor.dim() == 0:
            return None
        # A single row of features is that of one token, wherever it comes from: an expert may be called with B or 1 of them.
        if not _is_flat(tensor):
            if tensor.size(0) == self.batch_size:
                return tensor
            if tensor.size(0) == 1:
                return tensor.expand(self.batch_size, *tensor.shape[1:])
        if tensor.size(0) % (self.batch_size * self.num_tokens):
            return None
        return tensor.unflatten(0, (self.batch_size, -1))

    def of_sequence(self, tensor: Tensor, index: int) -> Tensor:
        """What a call with one sequence alone would have got in the place of `tensor`."""
        if is_shared(tensor):
            return tensor
        if not _is_flat(tensor) and tensor.size(0) in (1, self.batch_size):
            return tensor if tensor.size(0) == 1 else tensor[index : index + 1]
        return tensor.unflatten(0, (self.batch_size, -1))[index]


@dataclass
class LayerCall:
    """Arguments of a call, those that are tensors as they were given, and the autocast in which it ran, where a rule is to run it again."""

    layout: Layout
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    autocast: AbstractContextManager

    def tensors(self) -> list[Tensor]:
        """The arguments that are tensors of sequences, batch first."""
        tensors = [v for v in (*self.args, *self.kwargs.values()) if isinstance(v, Tensor) and not is_shared(v)]
        views = [self.layout.batch_first(tensor) for tensor in tensors]
        return [view for view in views if view is not None]

    def of_sequences(self) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
        """Arguments of the call for each sequence alone."""
        for i in range(self.layout.batch_size):
            args, kwargs = (
                [self.layout.of_sequence(value, i) if isinstance(value, Tensor) else value for value in values]
                for values in (self.args, self.kwargs.values())
            )
            yield tuple(args), dict(zip(self.kwargs, kwargs, strict=True))


def current_autocast(device_type: str) -> torch.autocast:
    """The autocast that is on, to be entered later: in the backward pass none is."""
    enabled = torch.is_autocast_enabled(device_type)
    dtype = torch.get_autocast_dtype(device_type) if enabled else None
    return torch.autocast(device_type, dtype=dtype, enabled=enabled)


def float_tensors(output: Any) -> list[Tensor]:
    """The outputs of a layer that may have a gradient, one or several of a tuple."""
    outputs = output if isinstance(output, tuple) else (output,)
    return [value for value in outputs if isinstance(value, Tensor) and value.is_floating_point()]


def is_shared(tensor: Tensor) -> bool:
    """Whether an argument is the same for all sequences, whatever the length of its only axis."""
    return tensor.dim() <= 1


def _is_flat(tensor: Tensor) -> bool:
    return tensor.dim() == 2 and tensor.is_floating_point()
