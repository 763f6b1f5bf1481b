"""Random projections of parameter gradients into one short vector, shared by all parameters.

A matrix gradient G (R x C) becomes `P_rows^T G P_columns`, of `row_width x column_width <= sketch_dim` numbers, and is added
to the sketch. A matrix so small that forming its gradient is less arithmetic than projecting both factors is formed and
folded into the sketch entry by entry, with independent signs: a count sketch, whose error is that of the whole sketch and
not of one side. A side that is at most as wide as its share stays as it is, otherwise it is projected onto a random subspace
(orthonormal columns scaled by sqrt(dim / width), so that E[P P^T] = I). The bases are shared by all parameters of one shape,
and every parameter flips the sign of its rows and columns independently: hence memory does not grow with depth beyond
one byte per row and column, products of different parameters vanish in expectation, and so
`E<z_i, z_j> = <s_i, s_j>`. The factored projection is the one of [LoGra](https://huggingface.co/papers/2405.13954).

Shapes: B sequences, T positions, R rows, C columns.
"""

import math
import zlib
from collections.abc import Mapping

import torch
from torch import Tensor


class Projections:
    """
    Projections of a fixed set of parameters, drawn from a seed alone: equal on every process and device.

    Args:
        shapes (`Mapping[str, tuple[int, ...]]`): Name and shape of every parameter that is sketched, in a fixed order.
        sketch_dim (`int`): Length k of the sketch.
        seed (`int`): Seed of all draws.
        dtype (`torch.dtype`): Dtype of the bases.
        device (`torch.device`): Where the projections live.
    """

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        *,
        sketch_dim: int,
        seed: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.sketch_dim = sketch_dim
        self.seed = seed
        self.dtype = dtype
        self.device = device
        self._bases: dict[tuple[str, int, int], Tensor] = {}
        self._signs: dict[str, Tensor] = {}
        self._widths: dict[str, tuple[int, int]] = {}
        self._offsets: dict[str, int] = {}
        cursor = 0
        for name, shape in shapes.items():
            if len(shape) == 2 and not is_small(*shape, sketch_dim):
                self._widths[name] = projected_widths(shape[0], shape[1], sketch_dim)
                size = math.prod(self._widths[name])
            else:
                size = math.prod(shape)
            # Laid out one after the other, so that a model smaller than the sketch is not projected at all.
            self._offsets[name] = cursor % sketch_dim
            cursor += size

    def rows(self, name: str, num_rows: int) -> Tensor:
        """Row projection of a matrix parameter with the parameter's signs, of shape `(R, row_width)`."""
        if name not in self._widths:
            return torch.eye(num_rows, dtype=self.dtype, device=self.device)
        return self._signed_base(name, "rows", num_rows, self._widths[name][0])

    def project_rows(self, name: str, values: Tensor) -> Tensor:
        """Project `(B, T, R)` to `(B, T, row_width)`."""
        return self._project(name, "rows", values, 0)

    def project_columns(self, name: str, values: Tensor) -> Tensor:
        """Project `(B, T, C)` to `(B, T, column_width)`."""
        return self._project(name, "columns", values, 1)

    def look_up_rows(self, name: str, indices: Tensor, num_rows: int) -> Tensor:
        """Project unit vectors: rows of the projection, of shape `(B, T, row_width)`."""
        if name not in self._widths:
            return torch.nn.functional.one_hot(indices, num_rows).to(self.dtype)
        width = self._widths[name][0]
        signs = self._sign(name, "rows", num_rows)[indices].to(self.dtype).unsqueeze(-1)
        if width == num_rows:
            return torch.nn.functional.one_hot(indices, num_rows).to(self.dtype) * signs
        return self._base("rows", num_rows, width)[indices] * signs

    def add_matrix(self, sketch: Tensor, name: str, values: Tensor) -> None:
        """Add a projected matrix gradient (B, row_width, column_width) to `sketch` (B, k), in place."""
        add = self._add_flat if name in self._widths else self.add_dense
        add(sketch, name, values.flatten(1))

    def add_dense(self, sketch: Tensor, name: str, values: Tensor) -> None:
        """Add a dense per-sequence gradient (B, n) to `sketch` (B, k) with independent signs, in place: exact in norm where
        n <= k, else a count sketch."""
        self._add_flat(sketch, name, values.to(sketch.dtype), self._sign(name, "dense", values.size(1)))

    def _add_flat(self, sketch: Tensor, name: str, values: Tensor, signs: Tensor | None = None) -> None:
        """Add `values` (B, n), times `signs` (n,) where given, at the parameter's place, wrapping around."""
        start, done = self._offsets[name], 0
        if signs is not None:
            signs = signs.to(sketch.dtype)
        while done < values.size(1):
            part = values[:, done : done + self.sketch_dim - start]
            place = sketch[:, start : start + part.size(1)]
            if signs is None:
                place += part
            else:
                # Signs and sum at once: for short sequences the product would take longer to write than the gradient to form.
                place.addcmul_(part, signs[done : done + part.size(1)])
            done += part.size(1)
            start = 0

    def num_bytes(self) -> int:
        """Memory held by all projections, in bytes."""
        return sum(tensor.numel() * tensor.element_size() for tensor in (*self._bases.values(), *self._signs.values()))

    def _project(self, name: str, side: str, values: Tensor, axis: int) -> Tensor:
        if name not in self._widths:
            return values.to(self.dtype)
        dim, width = values.size(-1), self._widths[name][axis]
        if width == dim:
            return values.to(self.dtype) * self._sign(name, side, dim).to(self.dtype)
        # In the activations' precision: a cast of the activations would cost more than the product.
        return (values @ self._signed_base(name, side, dim, width).to(values.dtype)).to(self.dtype)

    def _signed_base(self, name: str, side: str, dim: int, width: int) -> Tensor:
        signs = self._sign(name, side, dim).to(self.dtype)
        return torch.diag(signs) if width == dim else self._base(side, dim, width) * signs.unsqueeze(1)

    def _base(self, side: str, dim: int, width: int) -> Tensor:
        key = (side, dim, width)
        if key not in self._bases:
            # Drawn on the CPU and in float32: the same numbers on every device and in every dtype.
            gaussian = torch.randn(dim, width, generator=self._generator(f"{side}-{dim}-{width}"))
            basis, _ = torch.linalg.qr(gaussian.to(self.dtype))
            self._bases[key] = (basis * math.sqrt(dim / width)).to(self.device)
        return self._bases[key]

    def _sign(self, name: str, side: str, dim: int) -> Tensor:
        key = f"{name}-{side}"
        if key not in self._signs:
            bits = torch.randint(0, 2, (dim,), generator=self._generator(key), dtype=torch.int8)
            self._signs[key] = (2 * bits - 1).to(self.device)
        return self._signs[key]

    def _generator(self, key: str) -> torch.Generator:
        # Hashed together: torch's CPU generator reads the low 32 bits of a seed and no others.
        return torch.Generator().manual_seed(zlib.crc32(f"{self.seed}-{key}".encode()))


def is_small(num_rows: int, num_columns: int, sketch_dim: int) -> bool:
    """Whether forming the R x C gradient takes no more arithmetic per position than projecting its factors."""
    row_width, column_width = projected_widths(num_rows, num_columns, sketch_dim)
    projecting = num_rows * row_width + num_columns * column_width + row_width * column_width
    return num_rows * num_columns <= projecting


def projected_widths(num_rows: int, num_columns: int, sketch_dim: int) -> tuple[int, int]:
    """Widths of both sides with a product of at most `sketch_dim`: a square, unless one side is short and the other one
    can use its room."""
    side = math.isqrt(sketch_dim)
    # The vocabulary is the one axis where more room would cost much memory, and it comes as rows: columns take it first.
    row_width = min(num_rows, side)
    column_width = min(num_columns, sketch_dim // row_width)
    if num_columns == 1:
        return row_width, 1
    return min(num_rows, sketch_dim // column_width), column_width
