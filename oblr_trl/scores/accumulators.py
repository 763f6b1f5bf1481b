"""Reduction of one micro-batch's per-sequence gradients, added in any order, to sketches or to exact squared norms."""

from collections import defaultdict
from collections.abc import Collection

import torch
from torch import Tensor

from oblr_trl.scores.factors import DenseGradient, HeadRows, IndexRows, OuterProduct, PerSequenceGradient, squared_norm
from oblr_trl.scores.projections import COLUMNS, ROWS, Projections


class SketchAccumulator:
    """Sums projected gradients into sketches of shape `(B, sketch_dim)`, at least in float32."""

    def __init__(self, batch_size: int, projections: Projections) -> None:
        self._projections = projections
        self._total = projections.empty_sum(batch_size)

    def add(self, name: str, gradient: PerSequenceGradient) -> None:
        """Project the gradient of one use of a parameter and add it."""
        if isinstance(gradient, DenseGradient):
            self._projections.add(self._total, name, gradient.values)
            return
        columns = self._projections.project(name, COLUMNS, gradient.columns)
        # Both are in the sketch's dtype, float32 at least: the sum over positions is where half precision would lose.
        projected = torch.einsum("btr,btc->brc", self._project_rows(name, gradient), columns)
        self._projections.add_projected(self._total, name, projected)

    def _project_rows(self, name: str, gradient: OuterProduct) -> Tensor:
        match gradient.rows:
            case IndexRows(indices):
                return self._projections.projection(name, ROWS)[indices]
            case HeadRows(projected=projected):
                assert projected is not None, "the head pass was not given this accumulator's row projection"
                return projected
            case values:
                return self._projections.project(name, ROWS, values)

    def result(self) -> Tensor:
        """The sketches, of shape `(B, sketch_dim)`."""
        return self._projections.sketch(self._total)


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
            product = OuterProduct(rows, gradient.columns.to(dtype))
        if name in self._shared:
            self._held[name].append(product)
        else:
            self._squared_norms += squared_norm([product])

    def result(self) -> Tensor:
        """The exact squared norms, of shape `(B,)`."""
        for products in self._held.values():
            self._squared_norms += squared_norm(products)
        return self._squared_norms
