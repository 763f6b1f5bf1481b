r"""Per-sequence parameter gradients in factored form, as layer rules return them.

The gradient of a weight matrix, for one sequence, is a sum of outer products over positions, \\( \sum_t r_t c_t^\top \\). It is not
formed here: either both factors are projected (`projections.py`) or their Gram matrices multiplied (`exact_norms.py`).

Shapes: B sequences, T positions, R rows and C columns of the parameter, V vocabulary, d hidden features.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

# Vocabulary slice of the exact head: B x T x 2048 numbers at a time.
_VOCAB_TILE = 2048


@dataclass
class IndexRows:
    """Row factor of a table look-up: the unit vector of the row that each position looks up."""

    indices: Tensor  # (B, T)


@dataclass
class HeadRows:
    r"""
    Row factor of an output projection followed by a log-softmax: \\( c_t (e_{y_t} - \mathrm{softmax}(l_t)) \\), R = V.

    Kept implicit, because (B, T, V) does not fit in memory: the logits l are recomputed from `hidden` where they are needed.
    """

    hidden: Tensor  # (B, T, d)
    weight: Tensor  # (V, d)
    bias: Tensor | None  # (V,)
    targets: Tensor  # (B, T), the tokens y
    coefficients: Tensor  # (B, T), c: the seed of the token over the temperature
    log_normalizer: Tensor  # (B, T), log-sum-exp of the logits over the temperature
    other_probs: Tensor  # (B, T), 1 - softmax(l)_y, which a difference would lose
    temperature: float
    softcap: float
    projected: Tensor | None = None  # (B, T, r), the factor times a projection, where it was asked for

    def at(self, tokens: Tensor) -> Tensor:
        """The columns of the factor for `tokens`, (B, S), of shape `(B, T, S)`."""
        bias = None if self.bias is None else self.bias[tokens].unsqueeze(1)
        return self._columns(tokens, self.weight[tokens], bias)

    def tiles(self) -> Iterator[Tensor]:
        """All columns, a vocabulary slice at a time."""
        tokens = torch.arange(self.weight.size(0), device=self.weight.device).unsqueeze(0)
        for start in range(0, self.weight.size(0), _VOCAB_TILE):
            vocab = slice(start, start + _VOCAB_TILE)
            bias = None if self.bias is None else self.bias[vocab]
            yield self._columns(tokens[:, vocab], self.weight[vocab], bias)

    def _columns(self, tokens: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        # In the precision of the pass, whose normaliser belongs to logits rounded like these.
        logits = self.hidden @ weight.to(self.hidden.dtype).mT
        if bias is not None:
            logits += bias.to(self.hidden.dtype)
        logits = logits.to(self.log_normalizer.dtype)
        slopes = cap_logits(logits, self.softcap)
        probs = logits.div_(self.temperature).sub_(self.log_normalizer.unsqueeze(2)).exp_()
        is_target = self.targets.unsqueeze(2) == tokens.unsqueeze(1)
        columns = torch.where(is_target, self.other_probs.unsqueeze(2), -probs) * self.coefficients.unsqueeze(2)
        return columns if slopes is None else columns * slopes


def cap_logits(logits: Tensor, softcap: float) -> Tensor | None:
    r"""Let logits l be \\( c \tanh(l / c) \\), in place, and return the slope \\( 1 - \tanh^2(l / c) \\); `None` without a cap."""
    if softcap == math.inf:
        return None
    logits.div_(softcap).tanh_()
    slopes = 1 - logits.square()
    logits.mul_(softcap)
    return slopes


Rows = Tensor | IndexRows | HeadRows


@dataclass
class OuterProduct:
    """Per-sequence gradient of a matrix parameter, `einsum("btr,btc->brc", rows, columns)`, or of a stack of matrices
    `(E, R, C)`, where each position adds to one of them."""

    rows: Rows  # (B, T, R), or what stands for it: the factor along the matrix's first axis
    columns: Tensor  # (B, T, C), along its second axis
    matrices: Tensor | None = None  # (B, T), which of the stack


@dataclass
class DenseGradient:
    """Per-sequence gradient held as a tensor, for vectors such as biases and norm scales."""

    values: Tensor  # (B, numel), flattened


PerSequenceGradient = OuterProduct | DenseGradient
