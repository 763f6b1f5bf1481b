r"""Per-sequence parameter gradients in factored form, as layer rules return them, and their exact norms.

The gradient of a weight matrix, for one sequence, is a sum of outer products over positions, \\( \sum_t r_t c_t^\top \\). It is not
formed here: the accumulators (`accumulators.py`) either project both factors or multiply their Gram matrices.

Shapes: B sequences, T positions, R rows and C columns of the parameter, V vocabulary, d hidden features.
"""

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

    Kept implicit, because (B, T, V) does not fit in memory: the logits l are recomputed from `hidden` tile by tile.
    """

    hidden: Tensor  # (B, T, d)
    weight: Tensor  # (V, d)
    bias: Tensor | None  # (V,)
    targets: Tensor  # (B, T), the tokens y
    coefficients: Tensor  # (B, T), c: the seed of the token over the temperature
    log_normalizer: Tensor  # (B, T), log-sum-exp of the logits over the temperature
    other_probs: Tensor  # (B, T), 1 - softmax(l)_y, which a difference would lose
    temperature: float
    projected: Tensor | None = None  # (B, T, r), the factor times a projection, where it was asked for

    def tiles(self) -> Iterator[tuple[int, Tensor]]:
        """Start of every vocabulary slice, and the factor's columns for it, of shape `(B, T, slice)`."""
        for start in range(0, self.weight.size(0), _VOCAB_TILE):
            vocab = slice(start, start + _VOCAB_TILE)
            bias = None if self.bias is None else self.bias[vocab].to(self.hidden.dtype)
            # In the precision of the pass, whose normaliser belongs to logits rounded like these.
            logits = torch.nn.functional.linear(self.hidden, self.weight[vocab].to(self.hidden.dtype), bias)
            logits = logits.to(self.log_normalizer.dtype)
            values = torch.exp(logits / self.temperature - self.log_normalizer.unsqueeze(-1)).neg_()
            inside, index = locate(self.targets.unsqueeze(-1), start, values.size(-1))
            values.scatter_(-1, index, torch.where(inside, self.other_probs.unsqueeze(-1), values.gather(-1, index)))
            yield start, values * self.coefficients.unsqueeze(-1)


def locate(tokens: Tensor, start: int, size: int) -> tuple[Tensor, Tensor]:
    """Whether each token lies in the vocabulary slice of `size` that begins at `start`, and an index into the slice; clamped
    where it does not."""
    local = tokens - start
    return (local >= 0) & (local < size), local.clamp(0, size - 1)


Rows = Tensor | IndexRows | HeadRows


@dataclass
class OuterProduct:
    """Per-sequence gradient of a matrix parameter, `einsum("btr,btc->brc", rows, columns)`."""

    rows: Rows  # (B, T, R), or what stands for it: the factor along the parameter's first axis
    columns: Tensor  # (B, T, C), along its second axis


@dataclass
class DenseGradient:
    """Per-sequence gradient held as a tensor, for vectors such as biases and norm scales."""

    values: Tensor  # (B, numel), flattened


PerSequenceGradient = OuterProduct | DenseGradient


def squared_norm(products: list[OuterProduct]) -> Tensor:
    r"""
    Exact \\( \|\sum_a R_a^\top C_a\|_F^2 \\) per sequence, of shape `(B,)`.

    Several products are several uses of one parameter (tied embeddings, a module called twice). Uses the Gram trick
    \\( \sum_{a,b} \langle R_a R_b^\top, C_a C_b^\top \rangle \\), or forms the gradient where that is less arithmetic
    ([Goodfellow 2015](https://huggingface.co/papers/1510.01799)).
    """
    rows, columns = products[0].rows, products[0].columns
    if len(products) == 1 and isinstance(rows, Tensor):
        (num_positions, num_rows), num_columns = rows.shape[1:], columns.size(-1)
        if num_rows * num_columns < num_positions * (num_rows + num_columns):
            return torch.einsum("btr,btc->brc", rows, columns).square().sum(dim=(1, 2))
    total = columns.new_zeros(columns.size(0))
    for i, first in enumerate(products):
        for j, second in enumerate(products[i:], start=i):
            column_gram = torch.einsum("btc,bsc->bts", first.columns, second.columns)
            total += (1 if i == j else 2) * (_row_gram(first.rows, second.rows) * column_gram).sum(dim=(1, 2))
    return total


def _row_gram(first: Rows, second: Rows) -> Tensor:
    """Inner products of two row factors at all pairs of positions, `(B, T, T')`. The output projection's use of a matrix comes
    before its use as an embedding."""
    match first, second:
        case Tensor(), Tensor():
            return torch.einsum("btr,bsr->bts", first, second)
        case IndexRows(a), IndexRows(b):
            return (a.unsqueeze(2) == b.unsqueeze(1)).to(torch.get_default_dtype())
        case HeadRows(), HeadRows() if first is second:
            gram = first.coefficients.new_zeros(*first.targets.shape, first.targets.size(1))
            for _, tile in first.tiles():
                gram += torch.einsum("btv,bsv->bts", tile, tile)
            return gram
        case HeadRows(), IndexRows(b):
            gram = first.coefficients.new_zeros(*first.targets.shape, b.size(1))
            for start, tile in first.tiles():
                inside, index = locate(b.unsqueeze(1).expand_as(gram), start, tile.size(2))
                gram += torch.where(inside, tile.gather(2, index), 0.0)
            return gram
    raise NotImplementedError(f"No inner product of {type(first).__name__} and {type(second).__name__}.")
