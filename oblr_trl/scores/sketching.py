"""Score sketches of any causal language model of transformers, without a trainer."""

from typing import Any

import torch
from torch import Tensor

from oblr_trl.scores.score_pass import ScorePass


def score_sketches(
    model: Any,
    input_ids: Tensor,
    attention_mask: Tensor,
    completion_mask: Tensor,
    *,
    token_weights: Tensor | None = None,
    scope: str = "all",
    last_k: int | None = None,
    sketch_dim: int = 4096,
    method: str = "sketch",
    seed: int = 0,
    micro_batch_size: int | None = None,
) -> Tensor:
    r"""
    Per-sequence policy scores of a causal language model, as short sketches or exact squared norms.

    The score of sequence i is \\( s_i = \nabla_\theta \sum_t m_{i,t}\, c_{i,t} \log \pi_\theta(o_{i,t} \mid o_{i,<t}) \\), with
    completion mask m and token weights c. Sketches satisfy \\( E\langle z_i, z_j \rangle = \langle s_i, s_j \rangle \\) over
    the draw of `seed`, and are exact while the parameters in scope are no more than `sketch_dim`
    ([LoGra](https://huggingface.co/papers/2405.13954)). The model is left as it was: no hook, no `.grad`, no changed
    `requires_grad`, also after an exception. Dropout is active if the model is in training mode.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]): Causal language model with a linear head.
        input_ids (`torch.Tensor` of shape `(B, P + C)`): Prompt and completion tokens, padded on either side.
        attention_mask (`torch.Tensor` of shape `(B, P + C)`): 1 for tokens, 0 for padding.
        completion_mask (`torch.Tensor` of shape `(B, C)`): 1 for the completion tokens among the last C columns.
        token_weights (`torch.Tensor` of shape `(B, C)`, *optional*):
            Weight of each token's log-probability; 1 if not given.
        scope (`str`, *optional*, defaults to `"all"`):
            `"all"`: every trainable parameter. `"auto"`: those of all layers that have a score rule; the output projection if there
            are none. `"last_k"`: trainable parameters of the last `last_k` blocks and of everything
            above them. `"lm_head"`: the output projection, trainable or not; needs no backward pass. Tied embeddings are one
            matrix; the scopes that follow see its use as output projection only.
        last_k (`int`, *optional*): Number of blocks for `scope="last_k"`.
        sketch_dim (`int`, *optional*, defaults to `4096`): Length of a sketch.
        method (`str`, *optional*, defaults to `"sketch"`): `"sketch"` or `"exact"`.
        seed (`int`, *optional*, defaults to `0`): Seed of the random projections.
        micro_batch_size (`int`, *optional*): Sequences per pass; all at once if not given.

    Returns:
        `torch.Tensor`: `(B, sketch_dim)` for sketches, `(B,)` for exact squared norms; float32, or float64 for a float64
        model. A sequence without completion token gives zeros.

    Raises:
        `ValueError`: For an unknown method, or a scope that cannot be resolved.
    """
    num_tokens = completion_mask.size(1)
    ones = torch.ones(completion_mask.shape, device=completion_mask.device)
    weights = (ones if token_weights is None else token_weights) * completion_mask
    score_pass = ScorePass(model, scope=scope, last_k=last_k, methods=(method,), sketch_dim=sketch_dim, seed=seed)
    results = []
    for rows in torch.arange(input_ids.size(0)).split(micro_batch_size or max(input_ids.size(0), 1)):
        inputs = {"input_ids": input_ids[rows], "attention_mask": attention_mask[rows]}
        output = score_pass(inputs, input_ids[rows, -num_tokens:], weights[rows])
        results.append(output.sketches if method == "sketch" else output.squared_norms)
    return torch.cat([result for result in results if result is not None])
