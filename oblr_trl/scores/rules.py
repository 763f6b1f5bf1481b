r"""Layer rules: the gradient of one layer's parameters, per sequence, from the layer's input and output gradient.

The role of `grad_sample` rules in [Opacus](https://github.com/meta-pytorch/opacus), except that a rule returns factors of
a gradient, which are then projected. Parameters are read by the rules of experts and by recomputation alone.

Shapes: B sequences, T positions (all axes between the first and the last, flattened), d_in and d_out features. In formulas a is
the input, \\( \delta \\) the output gradient, and in the einsums that follow them o counts d_out and i counts d_in.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from oblr_trl.scores.calls import LayerCall, float_tensors
from oblr_trl.scores.experts import dense_experts_rule, experts_rule, routes_tokens
from oblr_trl.scores.factors import DenseGradient, IndexRows, OuterProduct, PerSequenceGradient

Gradients = dict[str, PerSequenceGradient]  # by the module's own parameter names
ScoreRule = Callable[[Any, Tensor, Tensor], Gradients]
# Of a layer whose forward is recomputed: a dense gradient for every sequence.
_MAX_RECOMPUTED_ENTRIES = 2**22


class CallRule(NamedTuple):
    """A rule that sees all arguments of a call and the gradients of all its outputs."""

    function: Callable[[Any, LayerCall, tuple[Tensor | None, ...]], Gradients]


def register_score_rule(module_class: type[nn.Module], rule: ScoreRule) -> None:
    """
    Teach the scoring pass a layer it does not know.

    Args:
        module_class (`type[torch.nn.Module]`):
            Class that defines the layer's `forward`. Subclasses that override `forward` need a rule of their own.
        rule (`Callable`):
            Called in the backward pass as `rule(module, inputs, grad_output)` with the layer's first input and the gradient
            of its output, batch first; returns, by parameter name, the per-sequence gradient:
            [`~scores.factors.OuterProduct`] for matrices or [`~scores.factors.DenseGradient`] of shape `(B, numel)`.
    """
    _RULES[module_class] = rule


def find_score_rule(module: nn.Module) -> ScoreRule | CallRule | None:
    """The rule for the class whose `forward` the module runs, or `None`: a subclass that computes something else must not
    inherit a rule by accident."""
    owner = forward_owner(module)
    if owner in _RULES:
        return _RULES[owner]
    # This package does not import transformers below the config.
    return _rule_of_transformers(module, owner.__name__) if owner.__module__.startswith("transformers.") else None


def apply_rule(
    rule: ScoreRule | CallRule, module: nn.Module, call: LayerCall, grad_outputs: tuple[Tensor | None, ...]
) -> Gradients:
    """The gradients that the module's rule gives for one call."""
    if isinstance(rule, CallRule):
        return rule.function(module, call, grad_outputs)
    (grad_output,) = grad_outputs
    assert grad_output is not None
    return rule(module, call.tensors()[0], grad_output)


# Layers that choose at random: another draw would choose other experts than those that the output's gradient belongs to.
_NOT_RECOMPUTED = ("PhimoeTopKRouter",)


def _rule_of_transformers(module: Any, name: str) -> ScoreRule | CallRule | None:
    """Layers by the name of their class or by their structure, others by recomputation if they are leaves."""
    attributes = vars(module)
    parameters = dict(module.named_parameters(recurse=False))
    if name == "Conv1D":
        return conv1d_rule
    if name == "FalconLinear":
        return linear_rule
    if name in _NOT_RECOMPUTED:
        return None
    if (
        name.endswith("RMSNorm")
        and not name.endswith("InputScaledRMSNorm")  # which scales before it normalises
        and parameters.keys() == {"weight"}
        and attributes.keys() & {"variance_epsilon", "eps"}
    ):
        return rms_norm_rule
    if name.endswith("ScaledWordEmbedding"):
        return scaled_embedding_rule
    if name == "Llama4TextExperts":
        return CallRule(dense_experts_rule)
    if routes_tokens(module):
        return CallRule(experts_rule)
    # Of its models: its integrations hold layers in packed formats.
    of_a_model = forward_owner(module).__module__.startswith("transformers.models.")
    is_leaf = len(parameters) == len(list(module.parameters()))
    shapes = [full_shape(parameter) for parameter in parameters.values()]
    small = all(len(shape) <= 2 and math.prod(shape) <= _MAX_RECOMPUTED_ENTRIES for shape in shapes)
    return CallRule(recomputed_rule) if of_a_model and is_leaf and small else None


def full_shape(parameter: Any) -> tuple[int, ...]:
    """Shape of a parameter before DeepSpeed ZeRO-3 partitioned it, which keeps it in `ds_shape`; `shape` is empty there."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def forward_owner(module: nn.Module) -> type:
    """The class whose `forward` the module runs."""
    return next(cls for cls in type(module).__mro__ if "forward" in cls.__dict__)


def linear_rule(module: nn.Linear, inputs: Tensor, grad_output: Tensor) -> Gradients:
    r"""`nn.Linear`: \\( \nabla W = \sum_t \delta_t a_t^\top \\), `bto,bti->boi`; \\( \nabla b = \sum_t \delta_t \\), `bto->bo`."""
    gradients: Gradients = {"weight": OuterProduct(grad_output.flatten(1, -2), inputs.flatten(1, -2))}
    return gradients if module.bias is None else gradients | {"bias": _sum_positions(grad_output)}


def conv1d_rule(module: Any, inputs: Tensor, grad_output: Tensor) -> Gradients:
    r"""`Conv1D` of transformers (GPT-2), a linear layer stored transposed: \\( \nabla W = \sum_t a_t \delta_t^\top \\),
    `bti,bto->bio`; \\( \nabla b = \sum_t \delta_t \\), `bto->bo`."""
    weight = OuterProduct(inputs.flatten(1, -2), grad_output.flatten(1, -2))
    return {"weight": weight, "bias": _sum_positions(grad_output)}


def embedding_rule(module: nn.Embedding, inputs: Tensor, grad_output: Tensor) -> Gradients:
    r"""`nn.Embedding` of tokens x: \\( \nabla W = \sum_t e_{x_t} \delta_t^\top \\), `btv,bto->bvo`, without the row of
    `padding_idx`."""
    if module.padding_idx is not None:
        grad_output = grad_output.masked_fill((inputs == module.padding_idx).unsqueeze(-1), 0.0)
    return {"weight": OuterProduct(IndexRows(inputs.flatten(1)), grad_output.flatten(1, -2))}


def scaled_embedding_rule(module: Any, inputs: Tensor, grad_output: Tensor) -> Gradients:
    r"""`nn.Embedding` times a constant (Gemma): [`embedding_rule`] of \\( s \delta \\)."""
    return embedding_rule(module, inputs, grad_output * module.embed_scale)


def layer_norm_rule(module: nn.LayerNorm, inputs: Tensor, grad_output: Tensor) -> Gradients:
    r"""`nn.LayerNorm`: \\( \nabla \gamma = \sum_t \delta_t \hat a_t \\), `bti,bti->bi`; \\( \nabla \beta = \sum_t \delta_t \\),
    `bti->bi`."""
    assert len(module.normalized_shape) == 1, "no rule for a norm over several axes"
    normalized = nn.functional.layer_norm(inputs, module.normalized_shape, eps=module.eps)
    gradients: Gradients = {"weight": _sum_positions(grad_output * normalized)}
    return gradients if module.bias is None else gradients | {"bias": _sum_positions(grad_output)}


def rms_norm_rule(module: Any, inputs: Tensor, grad_output: Tensor) -> Gradients:
    r"""RMSNorms of transformers, which normalise in float32 and scale by \\( \gamma \\) or \\( 1 + \gamma \\) (Gemma):
    \\( \nabla \gamma = \sum_t \delta_t \hat a_t \\), `bti,bti->bi`, for both."""
    eps = module.variance_epsilon if "variance_epsilon" in module.__dict__ else module.eps
    normalized = nn.functional.rms_norm(inputs.float(), inputs.shape[-1:], eps=eps).to(inputs.dtype)
    return {"weight": _sum_positions(grad_output * normalized)}


def recomputed_rule(module: Any, call: LayerCall, grad_outputs: tuple[Tensor | None, ...]) -> Gradients:
    r"""Any layer: its forward once more for each sequence, \\( \nabla p = \sum_o \delta_o^\top \partial o / \partial p \\). For layers
    that are little arithmetic, such as routers, norms with a gate and norms of other kinds. Random numbers, where a layer draws any,
    are drawn anew."""
    parameters = dict(module.named_parameters(recurse=False))
    # The parameters themselves have hooks of backends, which reduce gradients.
    leaves = {name: parameter.detach().requires_grad_() for name, parameter in parameters.items()}
    gradients: dict[str, list[Tensor]] = {name: [] for name in leaves}
    try:
        module._parameters.update(leaves)
        for i, (args, kwargs) in enumerate(call.of_sequences()):
            with torch.enable_grad(), call.autocast:
                outputs = float_tensors(module.forward(*args, **kwargs))
            used = [(o, g[i].reshape(o.shape)) for o, g in zip(outputs, grad_outputs, strict=True) if g is not None]
            found = torch.autograd.grad(
                [o for o, _ in used],
                list(leaves.values()),
                [g for _, g in used],
                allow_unused=True,
                materialize_grads=True,
            )
            for name, gradient in zip(leaves, found, strict=True):
                gradients[name].append(gradient.flatten())
    finally:
        module._parameters.update(parameters)
    return {name: DenseGradient(torch.stack(parts)) for name, parts in gradients.items()}


def _sum_positions(values: Tensor) -> DenseGradient:
    """Sum (B, ..., d) over all axes between, at least in float32."""
    return DenseGradient(values.flatten(1, -2).sum(dim=1, dtype=torch.promote_types(values.dtype, torch.float32)))


# Types whose `forward` is theirs.
_RULES: dict[type[nn.Module], ScoreRule] = {
    nn.Linear: linear_rule,
    nn.Embedding: embedding_rule,
    nn.LayerNorm: layer_norm_rule,
}
