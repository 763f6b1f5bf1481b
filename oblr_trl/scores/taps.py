"""What the scoring pass borrows from a model while it runs: taps on layers, the call of its head, frozen parameters, checkpointing.

A tap is an autograd node behind a layer that sees the layer's input and output gradient. Unlike `register_full_backward_hook` it
keeps the input with `save_for_backward`, so gradient checkpointing frees and recomputes it like any other activation; unlike
`param.grad` nothing is formed per parameter and no backend's reduction hook fires. All is given back when a block ends.
"""

import functools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

# Called with the module, its input and the gradient of its output.
Observer = Callable[[nn.Module, Tensor, Tensor], None]
Result = TypeVar("Result")


class _IdentityTap(torch.autograd.Function):
    """Passes `output` through; in backward shows (input, output gradient) to the observer.

    `anchor` is a scalar that requires a gradient. It connects every tapped layer to the graph while all parameters are
    frozen, and it ends the backward pass at the lowest tapped layer.
    """

    @staticmethod
    def forward(ctx, output: Tensor, anchor: Tensor, inputs: Tensor, module: nn.Module, observer: Observer) -> Tensor:
        ctx.save_for_backward(inputs)
        ctx.module, ctx.observer = module, observer
        # Not a view, which autograd would not let the model change in place (OLMo clamps queries, keys and values).
        return output.detach()

    @staticmethod
    def backward(ctx, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad_output,) = grad_outputs
        (inputs,) = ctx.saved_tensors
        with torch.no_grad():
            ctx.observer(ctx.module, inputs, grad_output)
        return grad_output, grad_output.new_zeros(()), None, None, None


@contextmanager
def tapped(
    modules: Iterable[nn.Module], anchor: Tensor, observer: Observer, *, batch_size: int, is_active: Callable[[], bool]
) -> Iterator[Counter[nn.Module]]:
    """
    Tap the outputs of `modules`, which must be tensors, while the block runs.

    `anchor` is a scalar that requires a gradient. `observer` is called in the backward pass with module, input and output gradient, the
    `batch_size` sequences first; `is_active` is asked at each call of a layer whether it is to be tapped. Yields how often each
    layer has been called so far, recomputations included.
    """
    calls: Counter[nn.Module] = Counter()

    def hook(module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> Tensor:
        calls[module] += 1
        if not is_active():
            return output
        inputs = args[0] if args else next(iter(kwargs.values()))
        inputs, output = (_batch_first(tensor, batch_size, module) for tensor in (inputs, output))
        return _IdentityTap.apply(output, anchor, inputs, module, observer)

    handles = [module.register_forward_hook(hook, with_kwargs=True) for module in modules]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _batch_first(tensor: Tensor, batch_size: int, module: nn.Module) -> Tensor:
    """One row per sequence: a layer that is called once for all sequences (GPT-2's positions) is expanded, so that its
    output gradient is not summed over them."""
    if tensor.size(0) == batch_size:
        return tensor
    if tensor.size(0) == 1:
        return tensor.expand(batch_size, *tensor.shape[1:])
    raise ValueError(
        f"A {type(module).__name__} was called with a first axis of {tensor.size(0)} in a batch of {batch_size} sequences, "
        "so its gradient cannot be told apart by sequence. Layers that flatten the batch (mixture-of-experts routers, "
        "padding-free attention) are not supported: freeze them, or use `scope='lm_head'`."
    )


@contextmanager
def intercepted_head(
    head: nn.Linear, score: Callable[[nn.Linear, Tensor], Result]
) -> Iterator[list[tuple[Tensor, Result]]]:
    """
    Let `score` take the place of the output projection while the block runs: it is called with the head, whose weight is complete
    there on every backend, and its input. Yields, for every call, the input with its graph, and what `score` returned.
    """
    inputs: list[Tensor] = []
    calls: list[tuple[Tensor, Result]] = []

    def cut(module: nn.Module, args: tuple) -> tuple[Tensor]:
        # Before any other hook of the head: ZeRO-3 would wait in the backward pass for a head that is not part of it.
        inputs.append(args[0])
        return (args[0].detach(),)

    def call(module: nn.Linear, args: tuple) -> tuple[Tensor]:
        # After the hooks that gather the weight. The head itself is left a single position to project.
        calls.append((inputs.pop(), score(module, args[0])))
        return (args[0][:, -1:],)

    handles = [head.register_forward_pre_hook(cut, prepend=True), head.register_forward_pre_hook(call)]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def frozen_parameters(model: nn.Module) -> Iterator[None]:
    """Set `requires_grad` to `False` for all parameters while the block runs, so that no weight gradient is formed."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)


@contextmanager
def non_reentrant_checkpointing(model: nn.Module, *, enabled: bool | None = None) -> Iterator[None]:
    """
    Let the blocks of a model of transformers checkpoint as they are set to, or as `enabled` says, but never reentrantly, while the block
    runs. Only blocks for which checkpointing was set up at some time are touched.

    Reentrant checkpointing runs each block in a graph of its own, which `torch.autograd.grad` cannot enter. TRL forces it for
    adapters under ZeRO-3 because of their weight gradients, of which the pass forms none.
    """
    blocks: list[Any] = [module for module in model.modules() if "_gradient_checkpointing_func" in vars(module)]
    before = [(block._gradient_checkpointing_func, block.gradient_checkpointing) for block in blocks]
    try:
        for block, (_, checkpoints) in zip(blocks, before, strict=True):
            block._gradient_checkpointing_func = functools.partial(checkpoint, use_reentrant=False)
            block.gradient_checkpointing = checkpoints if enabled is None else enabled
        yield
    finally:
        for block, original in zip(blocks, before, strict=True):
            block._gradient_checkpointing_func, block.gradient_checkpointing = original
