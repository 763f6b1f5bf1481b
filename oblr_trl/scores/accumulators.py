"""Reduction of one micro-batch's per-sequence gradients, added in any order, to sketches or to exact squared norms."""

from collections import Counter, defaultdict

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


class SketchAccumulator:
    """Sums projected gradients into sketches of shape `(B, sketch_dim)`, at least in float32."""

    def __init__(self, batch_size: int, projections: Projections) -> None:
        self._projections = projections
        self._total = projections.empty_sum(batch_size)

    def add(self, name: str, gradient: PerSequenceGradient, num_uses: int) -> None:
        """Project the gradient of one use of a parameter and add it."""
        if isinstance(gradient, DenseGradient):
            self._projections.add_dense(self._total, name, gradient.values)
            return
        columns = self._projections.project_columns(name, gradient.columns)
        # Both are in the sketch's dtype, float32 at least: the sum over positions is where half precision would lose.
        self._projections.add_matrix(self._total, name, torch.bmm(self._rows(name, gradient).mT, columns))

    def _rows(self, name: str, gradient: OuterProduct) -> Tensor:
        match gradient.rows:
            case IndexRows(indices):
                return self._projections.look_up_rows(name, indices)
            case DenseRows(values):
                return self._projections.project_rows(name, values)
            case HeadRows(projected=projected):
                assert projected is not None, "the head pass was not given this accumulator's row projection"
                return projected

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

    def add(self, name: str, gradient: PerSequenceGradient, num_uses: int) -> None:
        """Take in the gradient of one of `num_uses` uses of a parameter, whose norm is added when the last one has come."""
        self._uses[name] += 1
        dtype = self._squared_norms.dtype
        if isinstance(gradient, DenseGradient):
            values = gradient.values.to(dtype)
            self._dense[name] = self._dense[name] + values if name in self._dense else values
        else:  # both factors in one dtype: under mixed precision they may come in different ones
            rows = gradient.rows
            rows = DenseRows(rows.values.to(dtype)) if isinstance(rows, DenseRows) else rows
            self._products[name].append(OuterProduct(rows, gradient.columns.to(dtype)))
        if self._uses[name] == num_uses:
            self._finish(name)

    def _finish(self, name: str) -> None:
        if products := self._products.pop(name, None):
            self._squared_norms += squared_norm(products).to(self._squared_norms.dtype)
        if (dense := self._dense.pop(name, None)) is not None:
            self._squared_norms += dense.square().sum(dim=1)

    def result(self) -> Tensor:
        """The exact squared norms, of shape `(B,)`."""
        for name in (
            *self._products,
            *self._dense,
        ):  # whose other uses never reached the loss (a branch without gradient)
            self._finish(name)
        return self._squared_norms


Accumulator = SketchAccumulator | ExactNormAccumulator
