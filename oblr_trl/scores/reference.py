"""The slow obvious way: one forward and one backward per sequence, full gradients. The oracle of tests and benchmarks."""

import copy
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from oblr_trl.scores.scopes import decoder_blocks


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
    head = model.get_output_embeddings()
    in_scope = head.parameters() if scope == "lm_head" else (p for p in model.parameters() if p.requires_grad)
    parameters = list(in_scope)
    num_tokens = completion_mask.size(1)
    weights = completion_mask if token_weights is None else token_weights * completion_mask
    scores = []
    with ExitStack() as stack:
        if scope != "all":
            # The hidden states are detached where a smaller scope ends; parameters below then get no gradient.
            layers = [head] if scope == "lm_head" else decoder_blocks(model)
            hook = layers[-(last_k or 1)].register_forward_pre_hook(lambda _, args: (args[0].detach(), *args[1:]))
            stack.callback(hook.remove)
        for parameter in parameters:
            stack.callback(parameter.requires_grad_, parameter.requires_grad)
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
    return torch.stack(scores)
