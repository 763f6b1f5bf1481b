r"""Rules of experts that are stacks of matrices: `gate_up_proj` (or `up_proj`) and `down_proj`, of shape `(E, ., .)`.

For a position s that is routed to expert e with weight w, from input x: \\( h = U_e x \\), \\( a = \mathrm{gate}(h) \\),
\\( y = D_e a \\), and the layer's output is the sum of the \\( w y \\) of a token. With the layer's output gradient \\( \delta \\):
\\( \nabla D_e = \sum_s w_s \delta_s a_s^\top \\) and \\( \nabla U_e = \sum_s \nabla_h a_s^\top D_e^\top w_s \delta_s\, x_s^\top \\). None of
h and a leaves the layer, whatever computes it (transformers' `experts_implementation`), so they are computed once more.

Shapes: B sequences, S = T K pairs of a token and one of its K experts, E experts, d features, i intermediate features.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from oblr_trl.scores.calls import LayerCall
from oblr_trl.scores.factors import IndexRows, OuterProduct


def holds_experts(module: Any) -> bool:
    """Whether a layer is one of transformers' `@use_experts_implementation`."""
    return vars(module).keys() >= {"has_gate", "has_bias", "is_transposed"}


def routes_tokens(module: Any) -> bool:
    """Whether a layer [`holds_experts`], without what the rule does not know: experts that are spread over processes, or followed
    by a norm."""
    unknown = ("_is_expert_parallel", "has_post_expert_norm")
    return holds_experts(module) and not any(vars(module).get(name) for name in unknown)


def experts_rule(module: Any, call: LayerCall, grad_outputs: tuple[Tensor | None, ...]) -> dict[str, Any]:
    """Experts that are called with hidden states, the indices of each token's experts, and their weights."""
    hidden, indices, weights = call.tensors()  # (B, T, d), (B, T, K), (B, T, K)
    (delta,) = grad_outputs
    assert delta is not None
    gate = module._apply_gate if module.has_gate else module.act_fn
    name = "gate_up_proj" if module.has_gate else "up_proj"
    num_chosen = indices.size(-1)
    inputs = hidden.repeat_interleave(num_chosen, dim=1)  # (B, S, d)
    weighted = delta.repeat_interleave(num_chosen, dim=1) * weights.flatten(1).unsqueeze(2)
    return _gradients(module, name, gate, inputs, indices.flatten(1), weighted, is_transposed=module.is_transposed)


def dense_experts_rule(module: Any, call: LayerCall, grad_outputs: tuple[Tensor | None, ...]) -> dict[str, Any]:
    """Llama 4's experts, each of which is called with all tokens, weighted before: expert by expert along the first axis."""
    num_experts, batch_size = module.num_experts, call.layout.batch_size
    (delta,) = grad_outputs
    assert delta is not None

    def by_sequence(values: Tensor) -> Tensor:
        return values.reshape(num_experts, batch_size, -1, values.size(-1)).transpose(0, 1).flatten(1, 2)

    def gate(gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return up * module.act_fn(gate)

    inputs = by_sequence(call.tensors()[0])
    experts = torch.arange(num_experts, device=inputs.device).repeat_interleave(inputs.size(1) // num_experts)
    experts = experts.expand(batch_size, -1)
    return _gradients(module, "gate_up_proj", gate, inputs, experts, by_sequence(delta), is_transposed=True)


def _gradients(
    module: Any,
    up_name: str,
    gate: Callable[[Tensor], Tensor],
    inputs: Tensor,  # (B, S, d)
    experts: Tensor,  # (B, S)
    grad_output: Tensor,  # (B, S, d), of every expert's own output
    *,
    is_transposed: bool,  # (E, in, out) instead of (E, out, in)
) -> dict[str, Any]:
    parameters = dict(module.named_parameters(recurse=False))
    up, down = parameters[up_name].detach(), parameters["down_proj"].detach()
    up_bias = parameters.get(f"{up_name}_bias")
    # Pairs in the order of their experts, so that each matrix is used once.
    order = experts.flatten().argsort(stable=True)
    counts = experts.flatten().bincount(minlength=up.size(0)).tolist()

    def sort(values: Tensor) -> Tensor:
        return values.flatten(0, 1)[order].to(up.dtype)

    def unsort(values: Tensor) -> Tensor:
        return torch.empty_like(values).index_copy_(0, order, values).unflatten(0, experts.shape)

    def multiply(values: Tensor, stack: Tensor, transpose: bool) -> Tensor:
        parts = [
            p @ (matrix.mT if transpose else matrix) for p, matrix in zip(values.split(counts), stack, strict=True)
        ]
        return torch.cat(parts)

    with torch.enable_grad():
        hidden = multiply(sort(inputs), up, not is_transposed)
        if up_bias is not None:
            hidden += up_bias.detach()[experts.flatten()[order]]
        hidden.requires_grad_()
        activations = gate(hidden)
    grad_activations = multiply(sort(grad_output), down, is_transposed)
    (grad_hidden,) = torch.autograd.grad(activations, hidden, grad_activations)
    grad_hidden, activations = unsort(grad_hidden), unsort(activations.detach())

    def product(out: Tensor, into: Tensor) -> OuterProduct:
        return OuterProduct(into, out, experts) if is_transposed else OuterProduct(out, into, experts)

    gradients = {up_name: product(grad_hidden, inputs), "down_proj": product(grad_output, activations)}
    if up_bias is not None:
        gradients[f"{up_name}_bias"] = OuterProduct(IndexRows(experts), grad_hidden)
        gradients["down_proj_bias"] = OuterProduct(IndexRows(experts), grad_output)
    return gradients
