r"""Layer rules: the gradient of one layer's parameters, per sequence, from the layer's input and output gradient.

The role of `grad_sample` rules in [Opacus](https://github.com/meta-pytorch/opacus), except that a rule returns factors of
a gradient, which are then projected, and that it never reads a parameter: backends may have sharded it.

Shapes: B sequences, T positions (all axes between the first and the last, flattened), d_in and d_out features. In formulas a is
the input, \\( \delta \\) the output gradient, and in the einsums that follow them o counts d_out and i counts d_in.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from oblr_trl.scores.factors import DenseGradient, IndexRows, OuterProduct, PerSequenceGradient

Gradients = dict[str, PerSequenceGradient]  # by the module's own parameter names
ScoreRule = Callable[[Any, Tensor, Tensor], Gradients]


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


def find_score_rule(module: nn.Module) -> ScoreRule | None:
    """The rule for the class whose `forward` the module runs, or `None`: a subclass that computes something else must not
    inherit a rule by accident."""
    owner = forward_owner(module)
    if owner in _RULES:
        return _RULES[owner]
    if owner.__module__.startswith("transformers."):
        return _RULES_BY_CLASS_NAME.get("RMSNorm" if owner.__name__.endswith("RMSNorm") else owner.__name__)
    return None


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
    x = inputs.float()
    normalized = (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)).to(inputs.dtype)
    return {"weight": _sum_positions(grad_output * normalized)}


def _sum_positions(values: Tensor) -> DenseGradient:
    """Sum (B, ..., d) over all axes between, at least in float32."""
    return DenseGradient(values.flatten(1, -2).sum(dim=1, dtype=torch.promote_types(values.dtype, torch.float32)))


# Types whose `forward` is theirs, and layers of transformers by the name of their class: this package does not import transformers
# below the config.
_RULES: dict[type[nn.Module], ScoreRule] = {
    nn.Linear: linear_rule,
    nn.Embedding: embedding_rule,
    nn.LayerNorm: layer_norm_rule,
}
_RULES_BY_CLASS_NAME: dict[str, ScoreRule] = {"Conv1D": conv1d_rule, "RMSNorm": rms_norm_rule}
