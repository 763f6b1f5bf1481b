"""What the scoring pass borrows from a model while it runs: taps on layers, the call of its head, frozen parameters,
quiet backward hooks, checkpointing.

A tap is an autograd node behind a layer that sees the layer's input and output gradient. Unlike `register_full_backward_hook` it
keeps the input with `save_for_backward`, so gradient checkpointing frees and recomputes it like any other activation; unlike
`param.grad` nothing is formed per parameter and no backend's reduction hook fires. All is given back when a block ends.
"""

import functools
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from oblr_trl.scores.calls import LayerCall, Layout, current_autocast, float_tensors, is_shared
from oblr_trl.scores.rules import CallRule, ScoreRule, find_score_rule

# Called with the module, its rule, its call and the gradients of its floating-point outputs, batch first; `None` for one that is not used.
Observer = Callable[[nn.Module, ScoreRule | CallRule, LayerCall, tuple[Tensor | None, ...]], None]
Result = TypeVar("Result")


class _IdentityTap(torch.autograd.Function):
    """Passes outputs through; in backward shows (inputs, output gradients) to `observe`.

    `anchor` is a scalar that requires a gradient, and gets none. It connects every tapped layer to the graph while all parameters
    are frozen, and it ends the backward pass at the lowest tapped layer.
    """

    @staticmethod
    def forward(ctx, observe: Callable, num_outputs: int, anchor: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(*tensors[num_outputs:])
        ctx.set_materialize_grads(False)
        ctx.observe, ctx.num_inputs = observe, len(tensors) - num_outputs
        # Not views, which autograd would not let the model change in place (OLMo clamps queries, keys and values).
        return tuple(tensor.detach() for tensor in tensors[:num_outputs])

    @staticmethod
    def backward(ctx, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        with torch.no_grad():
            ctx.observe(ctx.saved_tensors, grad_outputs)
        return None, None, None, *grad_outputs, *[None] * ctx.num_inputs


@contextmanager
def tapped(
    modules: Iterable[nn.Module],
    anchor: Tensor,
    observer: Observer,
    *,
    layout: Layout,
    is_active: Callable[[], bool],
    on_unknown_layout: Callable[[nn.Module, Tensor], None],
) -> Iterator[Counter[nn.Module]]:
    """
    Tap the outputs of `modules` while the block runs.

    `anchor` is a scalar that requires a gradient. `observer` is called in the backward pass, where the parameters of the module are
    complete on every backend; `is_active` is asked at each call of a layer whether it is to be tapped, and `on_unknown_layout` is told
    of a call that does not keep sequences apart, which is not. Yields how often each layer has been called so far, recomputations
    included.
    """
    calls: Counter[nn.Module] = Counter()
    rules = {module: find_score_rule(module) for module in modules}

    def hook(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        calls[module] += 1
        if not is_active():
            return output
        rule, outputs = rules[module], float_tensors(output)
        assert rule is not None  # or the scope would not hold the layer
        autocast: AbstractContextManager = nullcontext()
        if isinstance(rule, CallRule):
            autocast = current_autocast(anchor.device.type)
        else:  # which gets by with the first input
            args, kwargs = (args[:1], {}) if args else ((), dict([next(iter(kwargs.items()))]))
        inputs = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        of_sequences = [*outputs, *(tensor for tensor in inputs if not is_shared(tensor))]
        views = [layout.batch_first(tensor) for tensor in of_sequences]
        for tensor, view in zip(of_sequences, views, strict=True):
            if view is None:
                on_unknown_layout(module, tensor)
                return output
        # One row per sequence: of a layer that is called once for all of them the output gradient is not to be summed.
        passed = [view if tensor.size(0) == 1 else tensor for tensor, view in zip(outputs, views, strict=False)]
        observe = _observe(functools.partial(observer, module, rule), layout, args, kwargs, autocast)
        results = _IdentityTap.apply(observe, len(passed), anchor, *passed, *inputs)
        if not isinstance(output, tuple):
            return results[0]
        remaining = iter(results)
        return tuple(next(remaining) if any(o is tensor for tensor in outputs) else o for o in output)

    # A rule that reads parameters comes before any other hook of its layer: the backward pass then reaches it after the hooks of
    # ZeRO-3 that gather them. Others come last: the output of an embedding, which ZeRO-3 expects no gradient of, stays as it is.
    handles = [
        module.register_forward_hook(hook, with_kwargs=True, prepend=isinstance(rule, CallRule))
        for module, rule in rules.items()
    ]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _observe(
    observer: Callable[[LayerCall, tuple[Tensor | None, ...]], None],
    layout: Layout,
    args: tuple,
    kwargs: dict,
    autocast: AbstractContextManager,
) -> Callable[[tuple[Tensor, ...], tuple[Tensor | None, ...]], None]:
    """What a tap does with what it saved: `args` and `kwargs` are kept without their tensors, which are part of the graph."""
    in_graph = object()
    args = tuple(in_graph if isinstance(value, Tensor) else value for value in args)
    kwargs = {name: in_graph if isinstance(value, Tensor) else value for name, value in kwargs.items()}

    def observe(inputs: tuple[Tensor, ...], grad_outputs: tuple[Tensor | None, ...]) -> None:
        remaining = iter(inputs)
        filled = [next(remaining) if value is in_graph else value for value in (*args, *kwargs.values())]
        call = LayerCall(
            layout, tuple(filled[: len(args)]), dict(zip(kwargs, filled[len(args) :], strict=True)), autocast
        )
        observer(call, tuple(None if g is None else layout.batch_first(g) for g in grad_outputs))

    return observe


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
def suspended_backward_hooks(model: nn.Module) -> Iterator[None]:
    """Let no module's backward hooks be called while the block runs: they wait for training's gradients. ZeRO-3's on a mixture of experts
    reduces the weight gradients of its experts, of which the pass forms none."""
    hooked: list[Any] = [module for module in model.modules() if module._backward_hooks or module._backward_pre_hooks]
    before = [(module._backward_hooks, module._backward_pre_hooks) for module in hooked]
    for module in hooked:
        module._backward_hooks, module._backward_pre_hooks = OrderedDict(), OrderedDict()
    try:
        yield
    finally:
        for module, hooks in zip(hooked, before, strict=True):
            module._backward_hooks, module._backward_pre_hooks = hooks


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
