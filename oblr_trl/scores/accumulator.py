"""Sums the projected gradients of one micro-batch into score sketches.

Shapes: B sequences, T positions, R rows, C columns, r and c their projected widths, k sketch length.
"""

import torch
from torch import Tensor

from oblr_trl.scores.factors import DenseGradient, HeadRows, IndexRows, OuterProduct, PerSequenceGradient
from oblr_trl.scores.movement import InnerProducts
from oblr_trl.scores.projections import COLUMNS, ROWS, Projections


class SketchAccumulator:
    """Sums projected gradients of one micro-batch, added in any order, into sketches, and their inner products with an `update`, the
    difference of two sketches of [`~scores.parameters.local_parameter_sketch`], if one is given; at least in float32."""

    def __init__(self, batch_size: int, projections: Projections, update: Tensor | None = None) -> None:
        self._projections = projections
        self._products = None if update is None else InnerProducts(batch_size, projections, update)
        self._last_columns: tuple[tuple[object, ...], Tensor, Tensor] | None = None
        shape = (batch_size, 2 * projections.sketch_dim)
        self._total = torch.zeros(shape, dtype=projections.dtype, device=projections.device)

    def add(self, name: str, gradient: PerSequenceGradient) -> Tensor:
        """Add `P^T G Q` for the gradient G of one use of a parameter, and return it, of shape `(B, r, c)`."""
        drawn = self._projections
        if isinstance(gradient, DenseGradient):
            projected = gradient.values.to(drawn.dtype)
            if drawn.is_factored(name):
                values, matrices = drawn.unflatten(name, projected)
                # Each axis is the last one once: (B, C, R) to (B, C, r), then (B, r, C) to (B, r, c).
                projected = drawn.project(name, COLUMNS, drawn.project(name, ROWS, values.mT, matrices).mT, matrices)
                projected = projected if matrices is None else projected.sum(dim=1)
        else:
            # Both are in the sketch's dtype, float32 at least: the sum over positions is where half precision would lose.
            rows, columns = self._project_rows(name, gradient), self._project_columns(name, gradient)
            if gradient.matrices is not None and not drawn.is_factored(name):
                projected = drawn.form(name, rows, columns, gradient.matrices)
            else:
                projected = torch.bmm(rows.mT, columns)
        drawn.add_projected(self._total, name, projected)
        if self._products is not None:
            self._products.add(name, projected)
        return projected

    def _project_rows(self, name: str, gradient: OuterProduct) -> Tensor:
        match gradient.rows:
            case IndexRows(indices):
                return self._projections.projection(name, ROWS, indices)
            case HeadRows(projected=projected):
                assert projected is not None, "the head pass was not given this accumulator's row projection"
                return projected
            case values:
                return self._projections.project(name, ROWS, values, gradient.matrices)

    def _project_columns(self, name: str, gradient: OuterProduct) -> Tensor:
        columns = gradient.columns
        if gradient.matrices is not None:
            return self._projections.project(name, COLUMNS, columns, gradient.matrices)
        # The tensor that was projected last is kept, so that its place in memory tells whether this is the same one.
        key = (
            *self._projections.columns_key(name),
            columns.data_ptr(),
            columns.shape,
            columns.stride(),
            columns.dtype,
        )
        if self._last_columns is None or self._last_columns[0] != key:
            # Without its graph, whose taps refer to this object.
            self._last_columns = (key, columns.detach(), self._projections.project(name, COLUMNS, columns))
        return self._last_columns[2]

    def result(self) -> Tensor:
        """The sketches, of shape `(B, k)`."""
        self._last_columns = None
        return self._total.unflatten(1, (2, -1)).sum(dim=1)

    def products(self) -> Tensor | None:
        """Estimates of the inner products with the update, of shape `(B, 4)`; `None` without one."""
        return None if self._products is None else self._products.result()
