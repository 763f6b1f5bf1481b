"""Seed of every token in the scoring pass: the factor by which the loss multiplies its score.

Shapes: B completions, C completion tokens.
"""

from torch import Tensor

# Losses whose gradient is advantage x a token weight that is known before training.
LINEAR_LOSS_TYPES = ("dr_grpo", "dapo", "grpo", "bnpo", "cispo", "luspo")


def differentiates_sequences(loss_type: str, importance_sampling_level: str) -> bool:
    """Whether the loss differentiates one importance ratio per sequence. `cispo` weights the gradient of every token, whatever
    the level of its ratio."""
    return importance_sampling_level == "sequence" and loss_type != "cispo"


def applied_importance_ratio(
    ratio: Tensor, loss_mask: Tensor, *, loss_type: str, importance_sampling_level: str
) -> Tensor:
    r"""
    What vLLM's correction multiplies \\( \nabla \log \pi(o_t) \\) by.

    That is the ratio itself, except where the loss differentiates the ratio of a sequence, whose gradient is the mean over its
    tokens: \\( \sum_t c_t \nabla \tfrac{1}{|o|} \sum_s \log \pi(o_s) \\) gives every token the mean of the \\( c_t \\).

    Args:
        ratio (`torch.Tensor` of shape `(B, C)` or `(B, 1)`): vLLM's importance ratio, of tokens or of sequences.
        loss_mask (`torch.Tensor` of shape `(B, C)`): Completion mask x tool mask.
        loss_type (`str`): Loss type of [`~trl.GRPOConfig`].
        importance_sampling_level (`str`): `"token"` or `"sequence"`: level of the ratio that the loss differentiates.

    Returns:
        `torch.Tensor` of shape `(B, C)` or `(B, 1)`.
    """
    if not differentiates_sequences(loss_type, importance_sampling_level):
        return ratio
    return (ratio * loss_mask).sum(dim=1, keepdim=True) / loss_mask.sum(dim=1, keepdim=True).clamp(min=1)


def loss_token_weights(loss_type: str, loss_mask: Tensor, importance_ratio: Tensor | None = None) -> Tensor:
    r"""
    What the loss multiplies \\( A \nabla \log \pi(o_t) \\) by at importance ratio 1, up to one constant per batch.

    `grpo` averages over each completion's tokens, \\( 1 / |o_i| \\); `bnpo` over all tokens of the process; the others divide
    by a constant, so the sum over tokens stays: the paper's sequence score.

    Args:
        loss_type (`str`): Loss type of [`~trl.GRPOConfig`], linear in the advantage.
        loss_mask (`torch.Tensor` of shape `(B, C)`): Completion mask x tool mask.
        importance_ratio (`torch.Tensor` of shape `(B, C)` or `(B, 1)`, *optional*): [`applied_importance_ratio`].

    Returns:
        `torch.Tensor` of shape `(B, C)`: The token weights, in float32.
    """
    weights = loss_mask.float()
    if loss_type == "grpo":
        weights = weights / weights.sum(dim=1, keepdim=True).clamp(min=1)
    elif loss_type == "bnpo":
        weights = weights * weights.size(0) / weights.sum().clamp(min=1)
    return weights if importance_ratio is None else weights * importance_ratio
