r"""Exact squared norms of per-sequence gradients, from Gram matrices of their factors.

Shapes: B sequences, T and T' positions, R rows and C columns of the parameter, V vocabulary.
"""

from collections import defaultdict
from collections.abc import Collection

import torch
from torch import Tensor

from oblr_trl.scores.factors import DenseGradient, HeadRows, IndexRows, OuterProduct, PerSequenceGradient, Rows


class ExactNormAccumulator:
    """Adds exact squared norms to `zeros`, of shape `(B,)`. Gradients of `shared` parameters, which are used several times, are held
    back until all uses are in."""

    def __init__(self, zeros: Tensor, shared: Collection[str]) -> None:
        self._squared_norms = zeros
        self._shared = shared
        self._held: defaultdict[str, list[OuterProduct]] = defaultdict(list)

    def add(self, name: str, gradient: PerSequenceGradient) -> None:
        """Take in the gradient of one use of a parameter."""
        # Both factors in one dtype: under mixed precision they may come in different ones.
        dtype = self._squared_norms.dtype
        if isinstance(gradient, DenseGradient):
            values = gradient.values.to(dtype).unsqueeze(1)  # (B, 1, numel)
            product = OuterProduct(values, torch.ones_like(values[..., :1]))
        else:
            rows = gradient.rows.to(dtype) if isinstance(gradient.rows, Tensor) else gradient.rows
            product = OuterProduct(rows, gradient.columns.to(dtype), gradient.matrices)
        if name in self._shared:
            self._held[name].append(product)
        else:
            self._squared_norms += squared_norm([product])

    def result(self) -> Tensor:
        """The exact squared norms, of shape `(B,)`."""
        while self._held:  # let go: inputs of layers refer to the graph, whose taps refer to this object
            _, products = self._held.popitem()
            self._squared_norms += squared_norm(products)
        return self._squared_norms


def squared_norm(products: list[OuterProduct]) -> Tensor:
    r"""
    Exact \\( \|\sum_a R_a^\top C_a\|_F^2 \\) per sequence, of shape `(B,)`.

    Several products are several uses of one parameter (tied embeddings, a module called twice). Uses the Gram trick
    \\( \sum_{a,b} \langle R_a R_b^\top, C_a C_b^\top \rangle \\), or forms the gradient where that is less arithmetic
    ([Goodfellow 2015](https://huggingface.co/papers/1510.01799)).
    """
    rows, columns = products[0].rows, products[0].columns
    if len(products) == 1 and isinstance(rows, Tensor) and products[0].matrices is None:
        (num_positions, num_rows), num_columns = rows.shape[1:], columns.size(-1)
        if num_rows * num_columns < num_positions * (num_rows + num_columns):
            return torch.einsum("btr,btc->brc", rows, columns).square().sum(dim=(1, 2))
    total = columns.new_zeros(columns.size(0))
    for i, first in enumerate(products):
        for j, second in enumerate(products[i:], start=i):
            column_gram = torch.einsum("btc,bsc->bts", first.columns, second.columns)
            if (
                first.matrices is not None and second.matrices is not None
            ):  # those of different matrices are orthogonal
                column_gram *= first.matrices.unsqueeze(2) == second.matrices.unsqueeze(1)
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
            for tile in first.tiles():
                gram += torch.einsum("btv,bsv->bts", tile, tile)
            return gram
        case HeadRows(), IndexRows(b):
            return first.at(b)
    raise NotImplementedError(f"No inner product of {type(first).__name__} and {type(second).__name__}.")
