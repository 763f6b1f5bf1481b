r"""The output projection and log-softmax, forward and gradient in one pass over the vocabulary.

Differs from a fused cross-entropy in what it sums: in addition to the log-normaliser it carries `softmax @ weight`, which gives
the gradient of the hidden states, and `softmax @ projection`, which gives the head's own sketch. All three come from one set of
logits tiles by the online softmax, so neither the logits nor a second pass over the vocabulary is needed.

The softmax is that over all tokens but the target y, because a low-entropy policy's gradient is a small difference of large numbers,
\\( W_y - \sum_v p_v W_v \\), and what half precision rounds off them exceeds it. The same without the difference:
\\( (1 - p_y) (W_y - \sum_{v \ne y} q_v W_v) \\), where q is the softmax without the target.

Shapes: M token positions, d hidden features, V vocabulary, r projected vocabulary.
"""

from typing import NamedTuple

import torch
from torch import Tensor

# Tiles of at most 1024 x 8192 logits (32 MiB in float32): large enough for full arithmetic speed, far below M x V.
_TOKEN_TILE = 1024
_VOCAB_TILE = 8192


class HeadPass(NamedTuple):
    r"""
    Result of [`head_pass`].

    Args:
        log_probs (`torch.Tensor` of shape `(M,)`): \\( \log p(y) \\).
        log_normalizer (`torch.Tensor` of shape `(M,)`): log-sum-exp of the logits over temperature.
        other_probs (`torch.Tensor` of shape `(M,)`): \\( 1 - p(y) \\), accurate where it is small.
        grad_hidden (`torch.Tensor` of shape `(M, d)`, *optional*): \\( \nabla_h \log p(y) \\).
        projected_rows (`torch.Tensor` of shape `(M, r)`, *optional*):
            \\( (e_y - \mathrm{softmax})^\top P / \tau \\): the row factor of the weight's gradient, projected.
    """

    log_probs: Tensor
    log_normalizer: Tensor
    other_probs: Tensor
    grad_hidden: Tensor | None
    projected_rows: Tensor | None


@torch.no_grad()
def head_pass(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    projection: Tensor | None = None,
    needs_grad_hidden: bool = True,
) -> HeadPass:
    r"""
    Log-probabilities of `targets` under softmax(hidden weight^T / temperature), with their gradients.

    Products run in the dtype of `hidden`; every sum over the vocabulary is kept in float32 at least.

    Args:
        hidden (`torch.Tensor` of shape `(M, d)`):
            Inputs of the output projection.
        weight (`torch.Tensor` of shape `(V, d)`):
            Output projection.
        bias (`torch.Tensor` of shape `(V,)`, *optional*):
            Bias of the output projection.
        targets (`torch.Tensor` of shape `(M,)`):
            Tokens to score, in [0, V).
        temperature (`float`, *optional*, defaults to `1.0`):
            What the logits are divided by.
        projection (`torch.Tensor` of shape `(V, r)`, *optional*):
            Projection of the vocabulary axis.
        needs_grad_hidden (`bool`, *optional*, defaults to `True`):
            Whether the gradient of the hidden states is wanted.

    Returns:
        [`HeadPass`].
    """
    tiles = [
        _token_tile(hidden_tile, weight, bias, target_tile, temperature, projection, needs_grad_hidden)
        for hidden_tile, target_tile in zip(hidden.split(_TOKEN_TILE), targets.split(_TOKEN_TILE), strict=True)
    ]
    log_probs, log_normalizer, other_probs, grad_hidden, projected = zip(*tiles, strict=True)
    return HeadPass(
        torch.cat(log_probs),
        torch.cat(log_normalizer),
        torch.cat(other_probs),
        torch.cat(grad_hidden) if needs_grad_hidden else None,
        torch.cat(projected) if projection is not None else None,
    )


def _token_tile(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperature: float,
    projection: Tensor | None,
    needs_grad_hidden: bool,
) -> HeadPass:
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    # What the softmax without the target averages: rows of the weight, rows of the projection, or both.
    wanted = [weight] if needs_grad_hidden else []
    wanted += [projection] if projection is not None else []
    averages = [hidden.new_zeros(hidden.size(0), values.size(1), dtype=dtype) for values in wanted]
    maximum = hidden.new_full((hidden.size(0), 1), -torch.inf, dtype=dtype)
    normalizer = torch.zeros_like(maximum)
    target_logits = maximum.new_zeros(hidden.size(0))

    for start in range(0, weight.size(0), _VOCAB_TILE):
        vocab = slice(start, start + _VOCAB_TILE)
        bias_tile = None if bias is None else bias[vocab].to(hidden.dtype)
        logits = torch.nn.functional.linear(hidden, weight[vocab].to(hidden.dtype), bias_tile).to(dtype)
        logits.div_(temperature)  # in place: one tile at a time
        # Taken from the tile, rounded as every other logit: the loss does the same, so that its ratio to these is 1.
        local = targets - start
        inside = (local >= 0) & (local < logits.size(1))
        index = local.clamp(0, logits.size(1) - 1).unsqueeze(1)
        at_target = logits.gather(1, index)
        target_logits += torch.where(inside, at_target.squeeze(1), 0.0)
        logits.scatter_(1, index, torch.where(inside.unsqueeze(1), -torch.inf, at_target))
        new_maximum = torch.maximum(maximum, logits.amax(dim=1, keepdim=True))
        rescale = torch.exp(maximum - new_maximum)
        probs = logits.sub_(new_maximum).exp_()
        normalizer = normalizer * rescale + probs.sum(dim=1, keepdim=True)
        probs = probs.to(hidden.dtype)
        averages = [
            average.mul_(rescale).add_(probs @ values[vocab].to(hidden.dtype))
            for average, values in zip(averages, wanted, strict=True)
        ]
        maximum = new_maximum

    log_odds = target_logits - (maximum + normalizer.log()).squeeze(1)  # of the target against all others
    log_probs, other_probs = torch.nn.functional.logsigmoid(log_odds), torch.sigmoid(-log_odds)
    gradients = [
        values[targets].to(dtype).sub_(average / normalizer).mul_(other_probs.unsqueeze(1) / temperature)
        for average, values in zip(averages, wanted, strict=True)
    ]
    return HeadPass(
        log_probs,
        target_logits - log_probs,
        other_probs,
        gradients[0] if needs_grad_hidden else None,
        gradients[-1] if projection is not None else None,
    )
