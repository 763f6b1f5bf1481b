"""Seed of every token in the scoring pass: the factor by which the loss multiplies its score.

Shapes: B completions, C completion tokens.
"""

import torch
from torch import Tensor

# Losses whose gradient in the first pass over a batch is advantage x a token weight that is known before it.
LINEAR_LOSS_TYPES = ("dr_grpo", "dapo", "grpo", "bnpo", "cispo", "luspo", "sapo", "vespo")


def differentiates_sequences(loss_type: str, importance_sampling_level: str) -> bool:
    """Whether the loss differentiates one importance ratio per sequence. `cispo` and `vespo` weight the gradient of every token,
    whatever the level of their ratio."""
    return importance_sampling_level == "sequence" and loss_type not in ("cispo", "vespo")


def applied_importance_ratio(
    ratio: Tensor, loss_mask: Tensor, *, loss_type: str, importance_sampling_level: str
) -> Tensor:
    r"""
    What vLLM's correction multiplies \\( \nabla \log \pi(o_t) \\) by.

    That is the ratio itself, except where the loss differentiates the ratio of a sequence, whose gradient is the mean over its
    tokens: \\( \sum_t c_t \nabla \tfrac{1}{|o|} \sum_s \log \pi(o_s) \\) gives every token the mean of the \\( c_t \\). `vespo` makes
    of the ratio w of a sequence a weight \\( \varphi(w) = w^k e^{\lambda (1 - w)} \\) whose k and \\( \lambda \\) depend on the sign of
    the advantage, which the baseline decides and must not see: here it is \\( \varphi(1) = 1 \\), right to first order in w - 1.

    Args:
        ratio (`torch.Tensor` of shape `(B, C)` or `(B, 1)`): vLLM's importance ratio, of tokens or of sequences.
        loss_mask (`torch.Tensor` of shape `(B, C)`): Completion mask x tool mask.
        loss_type (`str`): Loss type of [`~trl.GRPOConfig`].
        importance_sampling_level (`str`): `"token"` or `"sequence"`: level of the ratio that the loss differentiates.

    Returns:
        `torch.Tensor` of shape `(B, C)` or `(B, 1)`.
    """
    if loss_type == "vespo":
        return torch.ones_like(ratio[:, :1])
    if not differentiates_sequences(loss_type, importance_sampling_level):
        return ratio
    return (ratio * loss_mask).sum(dim=1, keepdim=True) / loss_mask.sum(dim=1, keepdim=True).clamp(min=1)


def loss_token_weights(
    loss_type: str, loss_mask: Tensor, importance_ratio: Tensor | None = None, *, micro_batch_size: int | None = None
) -> Tensor:
    r"""
    What the loss multiplies \\( A \nabla \log \pi(o_t) \\) by at importance ratio 1, up to one constant per batch.

    `grpo` and `sapo` average over each completion's tokens, \\( 1 / |o_i| \\); the others, but `bnpo`, divide by a constant, so the
    sum over tokens stays: the paper's sequence score. `sapo` and `vespo` bend the ratio r only away from 1: the soft clip
    \\( \tfrac{4}{\tau} \sigma(\tau (r - 1)) \\) has slope \\( 4 \sigma'(0) = 1 \\) there at any temperature \\( \tau \\), and
    `vespo`'s weight is 1, see [`applied_importance_ratio`].

    `bnpo` divides the m completions of a micro-batch by their number of tokens, \\( m / (|o_i| + \sum_j |o_j|) \\) up to a constant. The
    m - 1 others are drawn after scoring from all B - 1, so their mean stands in for their sum, which is right to first order in the
    spread of lengths: the draw adds noise, and by Jensen's inequality a little weight. m = B is exact and m = 1 is `grpo`.

    Args:
        loss_type (`str`): One of [`LINEAR_LOSS_TYPES`].
        loss_mask (`torch.Tensor` of shape `(B, C)`): Completion mask x tool mask.
        importance_ratio (`torch.Tensor` of shape `(B, C)` or `(B, 1)`, *optional*): [`applied_importance_ratio`].
        micro_batch_size (`int`, *optional*): m, from 1 to B. If not given, B.

    Returns:
        `torch.Tensor` of shape `(B, C)`: The token weights, in float32.
    """
    weights = loss_mask.float()
    lengths = weights.sum(dim=1, keepdim=True)  # (B, 1)
    if loss_type in ("grpo", "sapo"):
        weights = weights / lengths.clamp(min=1)
    elif loss_type == "bnpo":
        m = micro_batch_size or len(lengths)
        others = (lengths.sum() - lengths) / max(len(lengths) - 1, 1)
        weights = weights * m / (lengths + (m - 1) * others).clamp(min=1)
    return weights if importance_ratio is None else weights * importance_ratio
