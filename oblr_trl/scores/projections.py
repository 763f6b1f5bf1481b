"""Random projections of parameter gradients into one short vector, shared by all parameters.

A matrix gradient G (R x C) becomes `P_rows^T G P_columns`, of `row_width x column_width <= k` numbers, and is added to the
sketch. A side that is at most as wide as its share stays as it is, otherwise it is projected onto a random subspace
(orthonormal columns scaled by sqrt(dim / width), so that E[P P^T] = I), as in [LoGra](https://huggingface.co/papers/2405.13954).
The bases are shared by all parameters of one shape, and every parameter flips the sign of its rows and columns independently.

A vector, or a matrix so small that forming its gradient is less arithmetic than projecting both factors, is added entry by
entry: a count sketch, whose error is that of the whole sketch and not of one side. Every entry has an independent sign, and
every block of k entries an independent random start from which it wraps around, so that two entries share a place with
probability 1 / k at most, wherever a gradient's outliers are.

Products of different parameters vanish in expectation, and so `E<z_i, z_j> = <s_i, s_j>`. Where all parameters together are no
longer than the sketch, nothing is projected and nothing shares a place.

Memory: for each dimension of a projected matrix one float32 basis of at most `dim x k / min(C, sqrt(k))` numbers, whatever the
depth; one byte per row and column of a projected matrix; one byte per entry that is added as it is. Tables, which have a row for
every token of a vocabulary, are always projected from both sides unless it is tiny: neither V x V nor B x T x V numbers are
formed.

Shapes: B sequences, T positions, R rows, C columns, V vocabulary, k sketch length.
"""

import math
import zlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import one_hot

# Rows up to which a table is a matrix like any other: the identity of its rows then takes 1 MiB.
_TINY_VOCABULARY = 512


class _Draws:
    """Signs and bases by name, drawn from the seed when they are first needed."""

    def __init__(self, seed: int, dtype: torch.dtype, device: torch.device) -> None:
        self.seed = seed
        self.dtype = dtype
        self.device = device
        self.drawn: dict[str, Tensor] = {}

    def generator(self, key: str) -> torch.Generator:
        # Hashed together: torch's CPU generator reads the low 32 bits of a seed and no others.
        return torch.Generator().manual_seed(zlib.crc32(f"{self.seed}-{key}".encode()))

    def signs(self, key: str, dim: int) -> Tensor:
        """Of shape `(dim,)`; kept in int8."""
        if key not in self.drawn:
            bits = torch.randint(0, 2, (dim,), generator=self.generator(key), dtype=torch.int8)
            self.drawn[key] = (2 * bits - 1).to(self.device)
        return self.drawn[key].to(self.dtype)

    def basis(self, axis: str, dim: int, width: int) -> Tensor:
        """Orthogonal columns of length sqrt(dim / width), of shape `(dim, width)`."""
        key = f"{axis}-{dim}-{width}"
        if key not in self.drawn:
            # Drawn on the CPU and in float32: the same numbers on every device and in every dtype.
            gaussian = torch.randn(dim, width, generator=self.generator(key))
            orthonormal, _ = torch.linalg.qr(gaussian.to(self.dtype))
            self.drawn[key] = (orthonormal * math.sqrt(dim / width)).to(self.device)
        return self.drawn[key]


@dataclass
class _Side:
    """One axis of a parameter and its projection P, `(dim, width)`: the identity where `width` is `dim`, else a shared basis; with
    signs of its own where it has a `sign_key`."""

    draws: _Draws
    axis: str
    dim: int
    width: int
    sign_key: str | None

    def matrix(self) -> Tensor:
        """P."""
        if self.width == self.dim:
            matrix = torch.eye(self.dim, dtype=self.draws.dtype, device=self.draws.device)
        else:
            matrix = self.draws.basis(self.axis, self.dim, self.width)
        return matrix if self.sign_key is None else matrix * self.draws.signs(self.sign_key, self.dim).unsqueeze(1)

    def project(self, values: Tensor) -> Tensor:
        """`values @ P`."""
        if self.width != self.dim:
            # In the activations' precision: a cast of the activations would cost more than the product.
            return (values @ self.matrix().to(values.dtype)).to(self.draws.dtype)
        values = values.to(self.draws.dtype)
        return values if self.sign_key is None else values * self.draws.signs(self.sign_key, self.dim)

    def project_some(self, values: Tensor, first: int) -> Tensor:
        """`P[first : first + R].T @ values` of R rows, `(R, C)`."""
        if self.width != self.dim:
            return self.matrix()[first : first + values.size(0)].T @ values
        full = values.new_zeros(self.dim, values.size(1))
        full[first : first + values.size(0)] = values
        return full if self.sign_key is None else full * self.draws.signs(self.sign_key, self.dim).unsqueeze(1)

    def look_up(self, indices: Tensor) -> Tensor:
        """Rows of P, the projections of unit vectors."""
        if self.width == self.dim:
            rows = one_hot(indices, self.dim).to(self.draws.dtype)
        else:
            rows = self.draws.basis(self.axis, self.dim, self.width)[indices]
        if self.sign_key is None:
            return rows
        return rows * self.draws.signs(self.sign_key, self.dim)[indices].unsqueeze(-1)


class _Parameter(NamedTuple):
    """How one parameter is added to the sketch."""

    rows: _Side
    columns: _Side
    entry_sign_key: str | None  # where every entry has a sign, instead of every row and column
    starts: list[int]  # where in the sketch each block of at most k numbers begins


class Projections:
    """
    Projections of a fixed set of parameters, drawn from a seed alone: equal on every process and device.

    Args:
        shapes (`Mapping[str, tuple[int, ...]]`): Name and shape of every parameter that is sketched, in a fixed order.
        tables (`Collection[str]`): Which of them are embeddings, or weight or bias of the output projection.
        sketch_dim (`int`): Length k of the sketch.
        seed (`int`): Seed of all draws.
        dtype (`torch.dtype`): Dtype of the bases.
        device (`torch.device`): Where the projections live.
    """

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        *,
        tables: Collection[str],
        sketch_dim: int,
        seed: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.shapes = dict(shapes)
        self.sketch_dim = sketch_dim
        self.dtype = dtype
        self.device = device
        self._draws = _Draws(seed, dtype, device)
        self._parameters: dict[str, _Parameter] = {}
        all_fit, cursor = sum(math.prod(shape) for shape in shapes.values()) <= sketch_dim, 0
        for name, shape in shapes.items():
            dims = (shape[0], math.prod(shape[1:])) if shape else (1, 1)
            widths = factored_widths(shape, sketch_dim, is_table=name in tables)
            is_factored = widths is not None
            if widths is None or all_fit:
                widths = dims
            rows, columns = (
                _Side(self._draws, axis, dim, width, f"{name}-{axis}" if is_factored else None)
                for axis, dim, width in zip(("rows", "columns"), dims, widths, strict=True)
            )
            size = math.prod(widths)
            if all_fit:
                starts = [cursor]
                cursor += size
            else:
                generator = self._draws.generator(f"{name}-starts")
                starts = torch.randint(sketch_dim, (math.ceil(size / sketch_dim),), generator=generator).tolist()
            self._parameters[name] = _Parameter(rows, columns, None if is_factored else f"{name}-dense", starts)

    def rows(self, name: str) -> Tensor:
        """The projection of a parameter's rows, of shape `(R, row_width)`."""
        return self._parameters[name].rows.matrix()

    def project_rows(self, name: str, values: Tensor) -> Tensor:
        """Project `(B, T, R)` to `(B, T, row_width)`."""
        return self._parameters[name].rows.project(values)

    def project_columns(self, name: str, values: Tensor) -> Tensor:
        """Project `(B, T, C)` to `(B, T, column_width)`."""
        return self._parameters[name].columns.project(values)

    def look_up_rows(self, name: str, indices: Tensor) -> Tensor:
        """Project the unit vectors of `indices`, `(B, T)`, to `(B, T, row_width)`."""
        return self._parameters[name].rows.look_up(indices)

    def empty_sum(self, batch_size: int) -> Tensor:
        """What gradients are added to, of shape `(B, 2 k)`: a block that wraps around goes into the second half."""
        return torch.zeros(batch_size, 2 * self.sketch_dim, dtype=self.dtype, device=self.device)

    def sketch(self, total: Tensor) -> Tensor:
        """The sketch `(B, k)` of everything that was added to `total`."""
        return total[:, : self.sketch_dim] + total[:, self.sketch_dim :]

    def add_matrix(self, total: Tensor, name: str, values: Tensor) -> None:
        """Add a gradient with projected factors, `(B, row_width, column_width)`, to `total` (B, 2 k), in place."""
        parameter, values = self._parameters[name], values.flatten(1)
        key = parameter.entry_sign_key
        signs = None if key is None else self._draws.signs(key, values.size(1))
        for i, start in enumerate(parameter.starts):
            entries = slice(i * self.sketch_dim, (i + 1) * self.sketch_dim)
            block = values[:, entries]
            place = total[:, start : start + block.size(1)]
            if signs is None:
                place += block
            else:
                # Signs and sum at once: for short sequences the product would take longer to write than the gradient to form.
                place.addcmul_(block, signs[entries])

    def add_dense(self, total: Tensor, name: str, values: Tensor) -> None:
        """Add a gradient that is held in full, `(B, numel)`, to `total` (B, 2 k), in place."""
        rows, columns = self._parameters[name].rows, self._parameters[name].columns
        values = values.to(total.dtype).view(-1, rows.dim, columns.dim)
        # Each axis is the last one once: (B, C, R) to (B, C, r), then (B, r, C) to (B, r, c).
        self.add_matrix(total, name, columns.project(rows.project(values.mT).mT))

    def add_entries(self, total: Tensor, name: str, values: Tensor, start: int) -> None:
        """Add `(n,)` consecutive entries of a flattened matrix, from entry `start` on, to `total` (1, 2 k), in place."""
        rows, columns = self._parameters[name].rows, self._parameters[name].columns
        first, last = start // columns.dim, (start + values.numel() - 1) // columns.dim + 1
        block = values.new_zeros((last - first) * columns.dim)
        block[start - first * columns.dim :][: values.numel()] = values
        self.add_matrix(
            total, name, rows.project_some(columns.project(block.view(-1, columns.dim)), first).unsqueeze(0)
        )

    def num_bytes(self) -> int:
        """Memory held by all projections, in bytes."""
        return sum(tensor.nbytes for tensor in self._draws.drawn.values())


def factored_widths(shape: tuple[int, ...], sketch_dim: int, *, is_table: bool) -> tuple[int, int] | None:
    """[`projected_widths`] of a parameter that is projected from both sides, `None` for one that is added as it is: a vector,
    or a matrix whose gradient takes no more arithmetic per position to form than its factors to project."""
    is_table = is_table and shape[0] > _TINY_VOCABULARY
    if len(shape) != 2 and not is_table:
        return None
    num_rows, num_columns = shape if len(shape) == 2 else (shape[0], 1)
    row_width, column_width = projected_widths(num_rows, num_columns, sketch_dim)
    projecting = num_rows * row_width + num_columns * column_width + row_width * column_width
    return None if num_rows * num_columns <= projecting and not is_table else (row_width, column_width)


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
