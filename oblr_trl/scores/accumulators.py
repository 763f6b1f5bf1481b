"""What becomes of the per-sequence gradients of one pass: a sketch, or exact squared norms."""

from collections import Counter, defaultdict
from typing import Protocol

import torch
from torch import Tensor

from oblr_trl.scores.factors import (
    DenseGradient,
    DenseRows,
    HeadRows,
    IndexRows,
    OuterProduct,
    PerSequenceGradient,
    squared_norm,
)
from oblr_trl.scores.projections import Projections

# Vocabulary slice of the exact head: B x T x 2048 numbers at a time.
_VOCAB_TILE = 2048


class Accumulator(Protocol):
    """Receives every parameter's per-sequence gradient of one micro-batch, in any order."""

    def add(self, name: str, gradient: PerSequenceGradient, num_rows: int, num_uses: int) -> None:
        """Take in one use of the parameter `name`, which has `num_rows` rows and is used `num_uses` times in the pass."""

    def result(self) -> Tensor:
        """The reduction of everything added, one row per sequence."""


class SketchAccumulator:
    """Sums projected gradients into sketches of shape `(B, sketch_dim)`, at least in float32."""

    def __init__(self, batch_size: int, projections: Projections) -> None:
        self._projections = projections
        self._total = projections.empty_sum(batch_size)

    def add(self, name: str, gradient: PerSequenceGradient, num_rows: int, num_uses: int) -> None:
        """Project one gradient and add it."""
        if isinstance(gradient, DenseGradient):
            self._projections.add_dense(self._total, name, gradient.values)
            return
        rows = self._project_rows(name, gradient, num_rows)
        columns = self._projections.project_columns(name, gradient.columns)
        # Both are in the sketch's dtype, float32 at least: the sum over positions is where half precision would lose.
        self._projections.add_matrix(self._total, name, torch.bmm(rows.mT, columns))

    def _project_rows(self, name: str, gradient: OuterProduct, num_rows: int) -> Tensor:
        rows = gradient.rows
        if isinstance(rows, IndexRows):
            return self._projections.look_up_rows(name, rows.indices, num_rows)
        if isinstance(rows, HeadRows):
            assert rows.projected is not None, "the head pass was not given this accumulator's row projection"
            return rows.projected
        return self._projections.project_rows(name, rows.values)

    def result(self) -> Tensor:
        """The sketches, of shape `(B, sketch_dim)`."""
        return self._projections.sketch(self._total)


class ExactNormAccumulator:
    """Sums exact squared norms, of shape `(B,)`. Parameters used several times are held back until all uses are in."""

    def __init__(self, batch_size: int, dtype: torch.dtype, device: torch.device) -> None:
        self._squared_norms = torch.zeros(batch_size, dtype=dtype, device=device)
        self._products: defaultdict[str, list[OuterProduct]] = defaultdict(list)
        self._dense: dict[str, Tensor] = {}
        self._uses: Counter[str] = Counter()
        self._expected: dict[str, int] = {}

    def add(self, name: str, gradient: PerSequenceGradient, num_rows: int, num_uses: int) -> None:
        """Take in one gradient; the parameter's norm is added when its last use has come."""
        self._uses[name] += 1
        self._expected[name] = num_uses
        if isinstance(gradient, DenseGradient):
            values = gradient.values.to(self._squared_norms.dtype)
            self._dense[name] = self._dense[name] + values if name in self._dense else values
        else:
            self._products[name].append(_at_least(gradient, self._squared_norms.dtype))
        if self._uses[name] == num_uses:
            self._finish(name)

    def _finish(self, name: str) -> None:
        if products := self._products.pop(name, None):
            self._squared_norms += squared_norm(products, vocab_tile=_VOCAB_TILE).to(self._squared_norms.dtype)
        if (dense := self._dense.pop(name, None)) is not None:
            self._squared_norms += dense.square().sum(dim=1)
        del self._uses[name], self._expected[name]

    def result(self) -> Tensor:
        """The exact squared norms, of shape `(B,)`."""
        # Uses that never reached the loss (a branch without gradient) end here.
        for name in list(self._expected):
            self._finish(name)
        return self._squared_norms


def _at_least(product: OuterProduct, dtype: torch.dtype) -> OuterProduct:
    """Both factors in `dtype`: under mixed precision they may come in different ones."""
    rows = product.rows
    if isinstance(rows, DenseRows):
        rows = DenseRows(rows.values.to(dtype))
    return OuterProduct(rows, product.columns.to(dtype))
