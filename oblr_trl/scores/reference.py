"""The slow obvious way: one forward and one backward per sequence, full gradients. The oracle of tests and benchmarks."""

import copy
from typing import Any

import torch
from torch import Tensor, nn


def reference_scores(
    model: Any,
    input_ids: Tensor,
    attention_mask: Tensor,
    completion_mask: Tensor,
    *,
    token_weights: Tensor | None = None,
    scope: str = "all",
    last_k: int | None = None,
    dtype: torch.dtype | None = None,
    temperature: float = 1.0,
) -> Tensor:
    r"""
    Full scores \\( s_i = \nabla_\theta \sum_t m_{i,t} c_{i,t} \log \pi_\theta(o_{i,t}) \\), by autograd, one sequence at a
    time. Arguments are those of [`score_sketches`]; with `dtype=torch.float64` a copy of the model is computed in float64.

    Returns:
        `torch.Tensor` of shape `(B, num_parameters_in_scope)`: One flattened gradient per sequence.
    """
    if dtype is not None:
        model = copy.deepcopy(model).to(dtype)
    parameters = _parameters_in_scope(model, scope)
    num_tokens = completion_mask.size(1)
    weights = completion_mask if token_weights is None else token_weights * completion_mask
    scores = []
    handles = _cut_graph(model, scope, last_k)
    required = [parameter.requires_grad for parameter in parameters]
    try:
        for parameter in parameters:
            parameter.requires_grad_(True)
        for i in range(input_ids.size(0)):
            row = slice(i, i + 1)
            with torch.enable_grad():
                logits = model(input_ids=input_ids[row], attention_mask=attention_mask[row], use_cache=False).logits
                log_probs = (logits[:, -num_tokens - 1 : -1] / temperature).log_softmax(-1)
                per_token_logps = log_probs.gather(-1, input_ids[row, -num_tokens:].unsqueeze(-1)).squeeze(-1)
                objective = (per_token_logps * weights[row]).sum()
                gradients = torch.autograd.grad(objective, parameters, allow_unused=True, materialize_grads=True)
            scores.append(torch.cat([gradient.flatten() for gradient in gradients]))
    finally:
        for handle in handles:
            handle.remove()
        for parameter, flag in zip(parameters, required, strict=True):
            parameter.requires_grad_(flag)
    return torch.stack(scores)


def _parameters_in_scope(model: Any, scope: str) -> list[nn.Parameter]:
    if scope == "lm_head":
        return list(model.get_output_embeddings().parameters())
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _cut_graph(model: Any, scope: str, last_k: int | None) -> list:
    """Hooks that detach the hidden states where a smaller scope ends; parameters below then get no gradient."""
    if scope == "all":
        return []
    if scope == "lm_head":
        return [model.get_output_embeddings().register_forward_pre_hook(lambda module, args: (args[0].detach(),))]
    num_layers = model.config.get_text_config().num_hidden_layers
    blocks = next(m for m in model.get_decoder().modules() if isinstance(m, nn.ModuleList) and len(m) == num_layers)
    assert last_k is not None
    return [
        blocks[-last_k].register_forward_pre_hook(
            lambda module, args, kwargs: ((args[0].detach(), *args[1:]), kwargs), with_kwargs=True
        )
    ]
