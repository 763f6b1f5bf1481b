r"""The output projection and log-softmax, forward and gradient in one pass over the vocabulary.

Differs from a fused cross-entropy in what it sums: in addition to the log-normaliser it carries `softmax @ U` for given matrices
U. With the projection's own weight this is the gradient of the hidden states, with a random projection the head's own sketch. All
come from one set of logits tiles by the online softmax, so neither the logits nor a second pass over the vocabulary is needed.

The softmax is that over all tokens but the target y, because a low-entropy policy's gradient is a small difference of large numbers,
\\( U_y - \sum_v p_v U_v \\), and what half precision rounds off them exceeds it. The same without the difference:
\\( (1 - p_y) (U_y - \sum_{v \ne y} q_v U_v) \\), where q is the softmax without the target.

Shapes: B sequences, T completion tokens, M of these tokens with a weight, d hidden features, V vocabulary.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from oblr_trl.scores.factors import HeadRows, OuterProduct, cap_logits

# Tiles of at most 1024 x 8192 logits (32 MiB in float32): large enough for full arithmetic speed, far below M x V.
_TOKEN_TILE = 1024
_VOCAB_TILE = 8192


class HeadPass(NamedTuple):
    """Result of [`head_pass`]."""

    log_probs: Tensor  # (M,), log p(y)
    log_normalizer: Tensor  # (M,), log-sum-exp of the logits over the temperature
    other_probs: Tensor  # (M,), 1 - p(y), accurate where it is small
    gradients: tuple[Tensor, ...]  # (M, u) for every U: (e_y - softmax) U / temperature


@torch.no_grad()
def head_pass(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    matrices: Sequence[Tensor],
    *,
    temperature: float = 1.0,
    softcap: float = math.inf,
) -> HeadPass:
    """
    Log-probabilities of `targets` (M,) under softmax(cap(hidden weight^T + bias) / temperature), cap(l) = softcap tanh(l / softcap),
    `hidden` being (M, d), and the gradient of l multiplied by each of `matrices` (V, u); `weight` (V, d) gives the gradient of
    `hidden`.

    Products run in the dtype of `hidden`; every sum over the vocabulary is kept in float32 at least.
    """
    if hidden.size(0) > _TOKEN_TILE:
        tiles = [
            head_pass(hidden_tile, weight, bias, target_tile, matrices, temperature=temperature, softcap=softcap)
            for hidden_tile, target_tile in zip(hidden.split(_TOKEN_TILE), targets.split(_TOKEN_TILE), strict=True)
        ]
        return HeadPass(
            torch.cat([tile.log_probs for tile in tiles]),
            torch.cat([tile.log_normalizer for tile in tiles]),
            torch.cat([tile.other_probs for tile in tiles]),
            tuple(torch.cat(parts) for parts in zip(*(tile.gradients for tile in tiles), strict=True)),
        )
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    averages = [hidden.new_zeros(hidden.size(0), matrix.size(1), dtype=dtype) for matrix in matrices]
    maximum = hidden.new_full((hidden.size(0), 1), -torch.inf, dtype=dtype)
    normalizer = torch.zeros_like(maximum)
    target_logits, target_slopes = torch.zeros_like(maximum), torch.zeros_like(maximum)

    for start in range(0, weight.size(0), _VOCAB_TILE):
        vocab = slice(start, start + _VOCAB_TILE)
        bias_tile = None if bias is None else bias[vocab].to(hidden.dtype)
        logits = nn.functional.linear(hidden, weight[vocab].to(hidden.dtype), bias_tile).to(dtype)
        slopes = cap_logits(logits, softcap)  # in place, like what follows: one tile at a time
        logits.div_(temperature)
        # Taken from the tile, rounded as every other logit: the loss does the same, so that its ratio to these is 1.
        local = targets.unsqueeze(1) - start
        inside, index = (local >= 0) & (local < logits.size(1)), local.clamp(0, logits.size(1) - 1)
        at_target = logits.gather(1, index)
        target_logits += torch.where(inside, at_target, 0.0)
        target_slopes += inside if slopes is None else torch.where(inside, slopes.gather(1, index), 0.0)
        logits.scatter_(1, index, torch.where(inside, -torch.inf, at_target))
        new_maximum = torch.maximum(maximum, logits.amax(dim=1, keepdim=True))
        rescale = torch.exp(maximum - new_maximum)
        probs = logits.sub_(new_maximum).exp_()
        normalizer = normalizer * rescale + probs.sum(dim=1, keepdim=True)
        probs = (probs if slopes is None else probs.mul_(slopes)).to(hidden.dtype)
        for average, matrix in zip(averages, matrices, strict=True):
            average.mul_(rescale).add_(probs @ matrix[vocab].to(hidden.dtype))
        maximum = new_maximum

    log_odds = target_logits - (maximum + normalizer.log())  # of the target against all others
    log_probs, other_probs = nn.functional.logsigmoid(log_odds), torch.sigmoid(-log_odds)
    gradients = tuple(
        matrix[targets].to(dtype).mul_(target_slopes).sub_(average / normalizer).mul_(other_probs / temperature)
        for average, matrix in zip(averages, matrices, strict=True)
    )
    return HeadPass(log_probs.squeeze(1), (target_logits - log_probs).squeeze(1), other_probs.squeeze(1), gradients)


class HeadScores(NamedTuple):
    """Result of [`score_head`]."""

    log_probs: Tensor  # (B, T), 0 where the token's weight is
    scale: Tensor  # (B, 1), the power of two by which each sequence's gradients are larger than asked for
    products: dict[str, OuterProduct]  # gradients of the head's own parameters, by their own names
    grad_hidden: Tensor | None  # (B, T, d), if it was asked for


def score_head(
    head: nn.Linear,
    hidden: Tensor,
    targets: Tensor,
    token_weights: Tensor,
    names: Collection[str],
    projections: Mapping[str, Tensor],
    *,
    temperature: float,
    softcap: float = math.inf,
    needs_grad_hidden: bool,
    copy_parameters: bool,
) -> HeadScores:
    r"""
    Gradients of \\( \sum_t c_t \log p(y_t) \\) by the head's parameters and its inputs `hidden`, (B, T, d); tokens whose weight c
    is 0 take no arithmetic.

    `names` are those of the parameters in question, and `projections` of their rows, `(V, r)`, are there for sketches. `copy_parameters` is for
    exact norms, which are taken after the head's call, where the backend frees the weight at its end.
    """
    # As indices: on a GPU every use of a mask in their place waits until all that was begun is done.
    scored = token_weights.nonzero(as_tuple=True)

    def spread(values: Tensor, elsewhere: float = 0.0) -> Tensor:
        """From scored positions back to (B, T, ...)."""
        out = values.new_full((*token_weights.shape, *values.shape[1:]), elsewhere)
        out[scored] = values
        return out

    matrices = [*projections.values(), *([head.weight] if needs_grad_hidden else [])]
    result = head_pass(
        hidden[scored], head.weight, head.bias, targets[scored], matrices, temperature=temperature, softcap=softcap
    )
    token_weights = token_weights.to(result.log_probs.dtype)
    gradients = [spread(gradient).mul_(token_weights.unsqueeze(-1)) for gradient in result.gradients]
    scale = _inverse_power_of_two(gradients[-1]) if needs_grad_hidden else torch.ones_like(token_weights[:, :1])
    for gradient in gradients:
        gradient.mul_(scale.unsqueeze(-1))
    grad_hidden = gradients.pop() if needs_grad_hidden else None

    def kept(parameter: Tensor) -> Tensor:
        return parameter.detach().clone() if copy_parameters else parameter

    rows = HeadRows(
        hidden=hidden,
        weight=kept(head.weight),
        bias=None if head.bias is None else kept(head.bias),
        targets=targets,
        coefficients=token_weights * scale / temperature,
        log_normalizer=spread(result.log_normalizer, torch.inf),
        other_probs=spread(result.other_probs),
        temperature=temperature,
        softcap=softcap,
    )
    columns = {"weight": hidden, "bias": torch.ones_like(hidden[..., :1])}
    projected = dict(zip(projections, gradients, strict=True))
    products = {name: OuterProduct(replace(rows, projected=projected.get(name)), columns[name]) for name in names}
    return HeadScores(spread(result.log_probs), scale, products, grad_hidden)


def _inverse_power_of_two(gradients: Tensor) -> Tensor:
    """What brings each sequence's largest entry to [1/2, 1), exactly: gradients of long completions, or of tokens with p near 1,
    are below what float16 resolves. Of shape `(B, 1)`, and at most 2^60, whose square is still finite."""
    _, exponents = torch.frexp(gradients.abs().amax(dim=(1, 2)))
    return torch.ldexp(torch.ones_like(gradients[:, :1, 0]), exponents.clamp(min=-60).neg().unsqueeze(1))
