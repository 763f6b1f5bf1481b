"""Layer rules: the gradient of one layer's parameters, per sequence, from the layer's input and output gradient.

The role of `grad_sample` rules in [Opacus](https://github.com/meta-pytorch/opacus), except that a rule returns factors of
a gradient, which are then projected, and that it never reads a parameter: backends may have sharded it.

Shapes: B sequences, T positions (all axes between the first and the last, flattened), d_in and d_out features.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from oblr_trl.scores.factors import DenseGradient, DenseRows, IndexRows, OuterProduct, PerSequenceGradient

Gradients = dict[str, PerSequenceGradient]  # by the module's own parameter names
ScoreRule = Callable[[nn.Module, Tensor, Tensor], Gradients]


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
    owner = next(cls for cls in type(module).__mro__ if "forward" in cls.__dict__)
    if owner in _RULES:
        return _RULES[owner]
    if owner.__module__.startswith("transformers."):
        return _RULES_BY_CLASS_NAME.get("RMSNorm" if owner.__name__.endswith("RMSNorm") else owner.__name__)
    return None


def linear_rule(module: nn.Module, inputs: Tensor, grad_output: Tensor) -> Gradients:
    r"""`nn.Linear`: \\( \nabla W = \sum_t \delta_t a_t^\top \\) (d_out x d_in), \\( \nabla b = \sum_t \delta_t \\)."""
    weight = OuterProduct(DenseRows(grad_output.flatten(1, -2)), inputs.flatten(1, -2))
    return {"weight": weight} | ({} if module.bias is None else {"bias": _sum_positions(grad_output)})


def conv1d_rule(module: nn.Module, inputs: Tensor, grad_output: Tensor) -> Gradients:
    r"""`Conv1D` of transformers (GPT-2), a linear layer stored transposed: \\( \nabla W = \sum_t a_t \delta_t^\top \\)."""
    weight = OuterProduct(DenseRows(inputs.flatten(1, -2)), grad_output.flatten(1, -2))
    return {"weight": weight, "bias": _sum_positions(grad_output)}


def embedding_rule(module: nn.Module, inputs: Tensor, grad_output: Tensor) -> Gradients:
    r"""`nn.Embedding`: \\( \nabla W = \sum_t e_{x_t} \delta_t^\top \\), without the row of `padding_idx`."""
    assert isinstance(module, nn.Embedding)
    if module.scale_grad_by_freq or module.max_norm is not None:
        raise ValueError(
            "Embeddings with `scale_grad_by_freq` or `max_norm` have no per-sequence gradient: their gradient depends on the "
            "other sequences of the batch. Build the embedding without them, or freeze it."
        )
    if module.padding_idx is not None:
        grad_output = grad_output.masked_fill((inputs == module.padding_idx).unsqueeze(-1), 0.0)
    return {"weight": OuterProduct(IndexRows(inputs.flatten(1)), grad_output.flatten(1, -2))}


def norm_rule(module: nn.Module, inputs: Tensor, grad_output: Tensor) -> Gradients:
    r"""`nn.LayerNorm` and `nn.RMSNorm`: \\( \nabla \gamma = \sum_t \delta_t \hat x_t,\ \nabla \beta = \sum_t \delta_t \\)."""
    assert isinstance(module, nn.LayerNorm | nn.RMSNorm)
    if isinstance(module, nn.LayerNorm):
        normalized = nn.functional.layer_norm(inputs, module.normalized_shape, eps=module.eps)
    else:
        normalized = nn.functional.rms_norm(inputs, module.normalized_shape, eps=module.eps)
    num_axes = len(module.normalized_shape)
    grad_output, normalized = grad_output.flatten(-num_axes), normalized.flatten(-num_axes)
    gradients: Gradients = {"weight": _sum_positions(grad_output * normalized)}
    if isinstance(module, nn.LayerNorm) and module.bias is not None:
        gradients["bias"] = _sum_positions(grad_output)
    return gradients


def transformers_rms_norm_rule(module: Any, inputs: Tensor, grad_output: Tensor) -> Gradients:
    r"""RMSNorms of transformers, which normalise in float32 and scale by \\( \gamma \\) or \\( 1 + \gamma \\) (Gemma):
    \\( \nabla \gamma = \sum_t \delta_t \hat x_t \\) for both."""
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
    nn.LayerNorm: norm_rule,
    nn.RMSNorm: norm_rule,
}
_RULES_BY_CLASS_NAME: dict[str, ScoreRule] = {"Conv1D": conv1d_rule, "RMSNorm": transformers_rms_norm_rule}
