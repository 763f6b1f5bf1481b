"""Per-sequence parameter gradients in factored form: what a layer rule returns, and exact inner products of it.

The gradient of a weight matrix, for one sequence, is a sum of outer products over positions. It is never formed here: a rule
returns the two factors, and an accumulator either projects both (`sketches.py`) or multiplies their Gram matrices
(`exact.py`).

Shapes: B sequences, T positions, R rows and C columns of the parameter.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class DenseRows:
    """Row factor held as a tensor.

    Args:
        values (`torch.Tensor` of shape `(B, T, R)`): One row vector per position.
    """

    values: Tensor


@dataclass
class IndexRows:
    """Row factor of a table look-up: the unit vector of one row per position.

    Args:
        indices (`torch.Tensor` of shape `(B, T)`): The row that each position looks up.
    """

    indices: Tensor


@dataclass
class HeadRows:
    r"""
    Row factor of an output projection followed by a log-softmax: \\( c_t (e_{y_t} - \mathrm{softmax}(l_t)) \\), R = V.

    Kept implicit, because (B, T, V) does not fit in memory: `logits` are recomputed from `hidden` tile by tile.

    Args:
        hidden (`torch.Tensor` of shape `(B, T, d)`): Input of the projection.
        weight (`torch.Tensor` of shape `(V, d)`): The projection.
        bias (`torch.Tensor` of shape `(V,)`, *optional*): Its bias.
        targets (`torch.Tensor` of shape `(B, T)`): The tokens \\( y_t \\).
        coefficients (`torch.Tensor` of shape `(B, T)`): \\( c_t \\), the seed of the token over the temperature.
        log_normalizer (`torch.Tensor` of shape `(B, T)`): log-sum-exp of the logits.
        other_probs (`torch.Tensor` of shape `(B, T)`): \\( 1 - \mathrm{softmax}(l_t)_{y_t} \\), which a difference would lose.
        temperature (`float`): What the logits are divided by.
        projected (`torch.Tensor` of shape `(B, T, r)`, *optional*): The factor times a projection, where it was asked for.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    targets: Tensor
    coefficients: Tensor
    log_normalizer: Tensor
    other_probs: Tensor
    temperature: float
    projected: Tensor | None = None

    def columns(self, start: int, end: int) -> Tensor:
        """The factor's columns for the vocabulary slice, of shape `(B, T, end - start)`."""
        bias = None if self.bias is None else self.bias[start:end].to(self.hidden.dtype)
        # In the precision of the pass, whose normaliser belongs to logits rounded like these.
        logits = torch.nn.functional.linear(self.hidden, self.weight[start:end].to(self.hidden.dtype), bias)
        logits = logits.to(self.log_normalizer.dtype)
        values = torch.exp(logits / self.temperature - self.log_normalizer.unsqueeze(-1)).neg_()
        inside = (self.targets >= start) & (self.targets < end)
        index = (self.targets - start).clamp(0, end - start - 1).unsqueeze(-1)
        values.scatter_(
            -1, index, torch.where(inside.unsqueeze(-1), self.other_probs.unsqueeze(-1), values.gather(-1, index))
        )
        return values * self.coefficients.unsqueeze(-1)


Rows = DenseRows | IndexRows | HeadRows


@dataclass
class OuterProduct:
    """
    Per-sequence gradient of a matrix parameter: the sum over positions of rows x columns.

    Args:
        rows (`DenseRows`, `IndexRows` or `HeadRows`): Factor along the parameter's first axis.
        columns (`torch.Tensor` of shape `(B, T, C)`): Factor along the parameter's second axis.
    """

    rows: Rows
    columns: Tensor


@dataclass
class DenseGradient:
    """
    Per-sequence gradient held as a tensor, for vectors such as biases and norm scales.

    Args:
        values (`torch.Tensor` of shape `(B, numel)`): One flattened gradient per sequence.
    """

    values: Tensor


PerSequenceGradient = OuterProduct | DenseGradient


def squared_norm(products: list[OuterProduct], *, vocab_tile: int) -> Tensor:
    r"""
    Exact \\( \|\sum_a R_a^\top C_a\|_F^2 \\) per sequence, of shape `(B,)`.

    Several products are several uses of one parameter (tied embeddings, a module called twice). Uses the Gram trick
    \\( \sum_{a,b} \langle R_a R_b^\top, C_a C_b^\top \rangle \\), or forms the gradient where that is less arithmetic
    ([Goodfellow 2015](https://huggingface.co/papers/1510.01799)).
    """
    if len(products) == 1 and isinstance(products[0].rows, DenseRows):
        rows, columns = products[0].rows.values, products[0].columns
        (num_positions, num_rows), num_columns = rows.shape[1:], columns.size(-1)
        if num_rows * num_columns < num_positions * (num_rows + num_columns):
            return torch.einsum("btr,btc->brc", rows, columns).square().sum(dim=(1, 2))
    total = products[0].columns.new_zeros(products[0].columns.size(0))
    for i, first in enumerate(products):
        for j, second in enumerate(products[i:], start=i):
            row_gram = _row_gram(first.rows, second.rows, vocab_tile)  # (B, T, T')
            column_gram = torch.einsum("btc,bsc->bts", first.columns, second.columns)  # (B, T, T')
            total = total + (1 if i == j else 2) * (row_gram * column_gram).sum(dim=(1, 2))
    return total


def _row_gram(first: Rows, second: Rows, vocab_tile: int) -> Tensor:
    """Inner products of two row factors at all pairs of positions, `(B, T, T')`."""
    match first, second:
        case DenseRows(a), DenseRows(b):
            return torch.einsum("btr,bsr->bts", a, b)
        case IndexRows(a), IndexRows(b):
            return (a.unsqueeze(2) == b.unsqueeze(1)).to(torch.get_default_dtype())
        case DenseRows(a), IndexRows(b):
            return a.gather(2, b.unsqueeze(1).expand(-1, a.size(1), -1))
        case HeadRows(), HeadRows() if first is second:
            gram = first.coefficients.new_zeros(*first.hidden.shape[:2], first.hidden.size(1))
            for start in range(0, first.weight.size(0), vocab_tile):
                tile = first.columns(start, min(start + vocab_tile, first.weight.size(0)))
                gram += torch.einsum("btv,bsv->bts", tile, tile)
            return gram
        case HeadRows(), IndexRows(b):
            return _head_at_indices(first, b, vocab_tile)
        case IndexRows(), HeadRows() | DenseRows():
            return _row_gram(second, first, vocab_tile).transpose(1, 2)
    raise NotImplementedError(f"No inner product of {type(first).__name__} and {type(second).__name__}.")


def _head_at_indices(head: HeadRows, indices: Tensor, vocab_tile: int) -> Tensor:
    """Entries of the head's row factor at each sequence's own vocabulary indices, `(B, T, T')`."""
    gram = head.coefficients.new_zeros(*head.hidden.shape[:2], indices.size(1))
    for start in range(0, head.weight.size(0), vocab_tile):
        end = min(start + vocab_tile, head.weight.size(0))
        inside = ((indices >= start) & (indices < end)).unsqueeze(1)  # (B, 1, T')
        index = (indices - start).clamp(0, end - start - 1).unsqueeze(1).expand(-1, head.hidden.size(1), -1)
        gram += torch.where(inside, head.columns(start, end).gather(2, index), 0.0)
    return gram
