"""Random projections of parameter gradients into one short vector, shared by all parameters.

A matrix gradient G (R x C) becomes `P^T G Q`, of `r x c <= k` numbers, and is added to the sketch. A side that is at most as wide
as its share stays as it is, otherwise it is projected onto a random subspace (orthonormal columns scaled by sqrt(dim / width), so
that E[P P^T] = I), as in [LoGra](https://huggingface.co/papers/2405.13954). The bases are shared by all parameters of one shape.
Every parameter flips the sign of its rows independently, and those of its columns together with the other layers of the same parent:
queries, keys and values, or gate and up, have one input, which is then projected once. Independent rows are enough: a sketch is linear in
them, so that the product of two parameters' sketches has mean 0 whatever the columns are. Its variance is that of independent columns
too, because no column meets itself: where in the sketch a parameter begins is random, but another column for each layer of a parent.

A vector, or a matrix so small that forming its gradient is less arithmetic than projecting both factors, is added entry by
entry: a count sketch, whose error is that of the whole sketch and not of one side. Every entry has an independent sign, and
every block of k entries an independent random start from which it wraps around, so that two entries share a place with
probability 1 / k at most, wherever a gradient's outliers are.

Products of different parameters vanish in expectation, and so `E<z_i, z_j> = <s_i, s_j>`. Where all parameters together are no
longer than the sketch, nothing is projected and nothing shares a place.

A stack of matrices (E x R x C, the weights of experts) is E matrices with signs of their own that share a place in the sketch: a
position adds to one of them, and positions of different experts are projected in one product.

Memory: for each dimension of a projected matrix one float32 basis of at most `dim x k / min(C, sqrt(k))` numbers, whatever the
depth; one byte per row of a projected matrix and per column of those of one parent; one byte per entry that is added as it is. Tables, which have a row for
every token of a vocabulary, are always projected from both sides unless it is tiny: neither V x V nor B x T x V numbers are
formed.

Shapes: B sequences, T positions, E matrices of a stack, R rows, C columns, V vocabulary, r and c their projected widths, k sketch length.
"""

import math
import zlib
from collections import Counter
from collections.abc import Collection, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

# Rows up to which a table is a matrix like any other: the identity of its rows then takes 1 MiB.
_TINY_VOCABULARY = 512
# Entries of a parameter that are projected at once: 8 MiB in float64.
_ENTRIES_AT_ONCE = 2**20
# The axes of a parameter. A vector is a matrix of one column.
ROWS, COLUMNS = 0, 1
_AXIS_NAMES = ("rows", "columns")


class _Parameter(NamedTuple):
    """How one parameter is added to the sketch."""

    num_matrices: int  # E, of a stack
    dims: tuple[int, int]  # R and C
    widths: tuple[int, int]  # r and c
    is_factored: bool  # signs of rows and columns, else of every entry
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
        self._seed = seed
        self._drawn: dict[str, Tensor] = {}
        self._parameters: dict[str, _Parameter] = {}
        siblings: Counter[tuple[str, int]] = Counter()
        all_fit, cursor = sum(math.prod(shape) for shape in shapes.values()) <= sketch_dim, 0
        for name, shape in shapes.items():
            num_matrices = shape[0] if len(shape) == 3 else 1
            matrix = shape[-2:] if len(shape) == 3 else shape
            dims = (matrix[0], math.prod(matrix[1:])) if shape else (1, 1)
            factored = None if all_fit else factored_widths(shape, sketch_dim, is_table=name in tables)
            widths = factored or dims
            generator = self._generator(f"{name}-starts")
            if all_fit:
                starts = [cursor]
                cursor += math.prod(shape)
            elif factored is None:
                num_blocks = math.ceil(math.prod(shape) / sketch_dim)
                starts = torch.randint(sketch_dim, (num_blocks,), generator=generator).tolist()
            else:
                # In another column than those of the same parent that share its Q.
                siblings[parent(name), widths[COLUMNS]] += 1
                column = self._generator(parent(name)).initial_seed() + siblings[parent(name), widths[COLUMNS]]
                row = int(torch.randint(sketch_dim // widths[COLUMNS], (), generator=generator))
                starts = [row * widths[COLUMNS] + column % widths[COLUMNS]]
            self._parameters[name] = _Parameter(num_matrices, dims, widths, factored is not None, starts)

    def projection(self, name: str, axis: int, chosen: slice | Tensor | None = None) -> Tensor:
        """P, of shape `(R, r)`, or Q, of shape `(C, c)`, or only some of its rows: those of a vocabulary are many."""
        parameter = self._parameters[name]
        dim, width = parameter.dims[axis], parameter.widths[axis]
        identity = width == dim
        matrix = torch.eye(dim, dtype=self.dtype, device=self.device) if identity else self._basis(axis, dim, width)
        matrix = matrix if chosen is None else matrix[chosen]
        if not parameter.is_factored:
            return matrix
        signs = self._side_signs(name, axis)
        return matrix * (signs if chosen is None else signs[chosen]).unsqueeze(-1)

    def project(self, name: str, axis: int, values: Tensor, matrices: Tensor | None = None) -> Tensor:
        """`values @ P`, of shape `(..., r)`, or `values @ Q`, of shape `(..., c)`; at least in the dtype of the bases. `matrices` (...)
        says of which matrices of a stack."""
        parameter, dtype = self._parameters[name], torch.promote_types(values.dtype, self.dtype)
        if matrices is not None and parameter.is_factored:
            values = values * self._side_signs(name, axis).unflatten(0, (parameter.num_matrices, -1))[matrices]
            if parameter.widths[axis] == parameter.dims[axis]:
                return values.to(dtype)
            basis = self._basis(axis, parameter.dims[axis], parameter.widths[axis])
            return (values @ basis.to(values.dtype)).to(dtype)
        if parameter.widths[axis] < parameter.dims[axis]:
            # In the activations' precision: a cast of the activations would cost more than the product.
            return (values @ self.projection(name, axis).to(values.dtype)).to(dtype)
        values = values.to(dtype)
        return values * self._side_signs(name, axis) if parameter.is_factored else values

    def add_projected(self, total: Tensor, name: str, values: Tensor) -> None:
        """Add `P^T G Q`, of shape `(B, r, c)`, to `total` (B, 2 k), in place; a block that wraps around goes into the second half."""
        parameter, values = self._parameters[name], values.flatten(1)
        if parameter.is_factored:
            total.narrow(1, parameter.starts[0], values.size(1)).add_(values)
            return
        blocks, signs = (
            part.split(self.sketch_dim, dim=-1) for part in (values, self._signs(f"{name}-dense", values.size(1)))
        )
        for start, block, of_block in zip(parameter.starts, blocks, signs, strict=True):
            # Signs and sum at once: for short sequences the product would take longer to write than the gradient to form.
            total.narrow(1, start, block.size(1)).addcmul_(block, of_block)

    def project_entries(self, name: str, values: Tensor, start: int, dtype: torch.dtype) -> Tensor:
        """`P^T G Q` in `dtype`, flattened, of a parameter G that is 0 but for `(n,)` consecutive entries of it, flattened, from `start` on."""
        projected = torch.zeros(self._num_projected(name), dtype=dtype, device=self.device)
        num_columns = self._parameters[name].dims[COLUMNS]
        while values.numel():
            # Whole rows where they can be had: others are copied to be padded.
            size = num_columns * max(_ENTRIES_AT_ONCE // num_columns, 1) - start % num_columns
            projected += self._project_part(name, values[:size].to(projected), start).flatten()
            values, start = values[size:], start + size
        return projected

    def _project_part(self, name: str, values: Tensor, start: int) -> Tensor:
        parameter = self._parameters[name]
        if parameter.num_matrices > 1:
            return self._project_entries_of_stack(name, parameter, values, start)
        (num_rows, num_columns), (row_width, _) = parameter.dims, parameter.widths
        first, last = start // num_columns, (start + values.numel() - 1) // num_columns + 1
        before, after = start - first * num_columns, last * num_columns - start - values.numel()
        block = nn.functional.pad(values, (before, after)) if before or after else values
        block = self.project(name, COLUMNS, block.view(-1, num_columns))  # (last - first, c)
        if row_width < num_rows:
            rows = self.projection(name, ROWS, slice(first, last)).to(block.dtype).T @ block
        else:
            rows = self.project(name, ROWS, nn.functional.pad(block.T, (first, num_rows - last))).T
        return rows.unsqueeze(0)

    def _project_entries_of_stack(self, name: str, parameter: _Parameter, values: Tensor, start: int) -> Tensor:
        end, size = start + values.numel(), math.prod(parameter.dims)
        whole = not parameter.is_factored  # is added entry by entry, all of them
        first, last = (0, parameter.num_matrices) if whole else (start // size, (end - 1) // size + 1)
        block = nn.functional.pad(values, (start - first * size, last * size - end)).view(-1, *parameter.dims)
        if whole:
            return block.unsqueeze(0)
        matrices = torch.arange(first, last, device=values.device).unsqueeze(1)
        block = self.project(name, COLUMNS, block, matrices)  # (last - first, R, c)
        return self.project(name, ROWS, block.mT, matrices).sum(dim=0).T.unsqueeze(0)

    def unflatten(self, name: str, values: Tensor) -> tuple[Tensor, Tensor | None]:
        """Values of the parameter's shape, `(B, *shape)` or flattened, as matrices `(B, R, C)` or `(B, E, R, C)`, and which of a stack
        they are."""
        parameter = self._parameters[name]
        if parameter.num_matrices == 1:
            return values.reshape(-1, *parameter.dims), None
        values = values.reshape(-1, parameter.num_matrices, *parameter.dims)
        return values, torch.arange(parameter.num_matrices, device=values.device).unsqueeze(1)

    def form(self, name: str, rows: Tensor, columns: Tensor, matrices: Tensor) -> Tensor:
        """The gradient of a small stack, of shape `(B, E, R, C)`."""
        parts = [
            torch.einsum("btr,btc->brc", rows * (matrices == matrix).unsqueeze(2), columns)
            for matrix in range(self._parameters[name].num_matrices)
        ]
        return torch.stack(parts, dim=1)

    def columns_key(self, name: str) -> tuple[object, ...]:
        """Equal for parameters whose Q is the same."""
        parameter = self._parameters[name]
        signs = parent(name) if parameter.is_factored else None
        return signs, parameter.dims[COLUMNS], parameter.widths[COLUMNS]

    def is_factored(self, name: str) -> bool:
        """Whether a parameter is projected from both sides."""
        return self._parameters[name].is_factored

    def _num_projected(self, name: str) -> int:
        parameter = self._parameters[name]
        return math.prod(parameter.widths if parameter.is_factored else (parameter.num_matrices, *parameter.dims))

    def split_by_parameter(self, values: Tensor) -> dict[str, Tensor]:
        """Views of `(n,)` numbers, those of `P^T G Q` of each parameter, one after another."""
        return dict(zip(self.shapes, values.split([self._num_projected(name) for name in self.shapes]), strict=True))

    def halves(self, name: str, axis: int) -> Tensor:
        """Sums `(..., r)` or `(..., c)` numbers over both halves of a projection, of shape `(r, 2)` or `(c, 2)`, and doubles the sums; a
        side that is not projected has no halves, and both sums are over all of it."""
        parameter = self._parameters[name]
        width = parameter.widths[axis]
        key = f"halves-{width}-{width < parameter.dims[axis]}"
        if key not in self._drawn:
            sums = torch.ones(width, 2, dtype=self.dtype)
            if 1 < width < parameter.dims[axis]:
                sums = nn.functional.one_hot(torch.arange(width) % 2, 2).to(self.dtype)
                sums *= width / sums.sum(dim=0)
            self._drawn[key] = sums.to(self.device)
        return self._drawn[key]

    def _generator(self, key: str) -> torch.Generator:
        # Hashed together: torch's CPU generator reads the low 32 bits of a seed and no others.
        return torch.Generator().manual_seed(zlib.crc32(f"{self._seed}-{key}".encode()))

    def _signs(self, key: str, dim: int) -> Tensor:
        """Random signs, of shape `(dim,)`, drawn when they are first needed and kept in int8."""
        if key not in self._drawn:
            bits = torch.randint(0, 2, (dim,), generator=self._generator(key), dtype=torch.int8)
            self._drawn[key] = (2 * bits - 1).to(self.device)
        return self._drawn[key]

    def _side_signs(self, name: str, axis: int) -> Tensor:
        parameter = self._parameters[name]
        dim = parameter.num_matrices * parameter.dims[axis]
        return self._signs(f"{name}-rows" if axis == ROWS else f"{parent(name)}-columns-{dim}", dim)

    def _basis(self, axis: int, dim: int, width: int) -> Tensor:
        """Orthogonal columns of length sqrt(dim / width), of shape `(dim, width)`."""
        key = f"{_AXIS_NAMES[axis]}-{dim}-{width}"
        if key not in self._drawn:
            # Drawn on the CPU and in float32: the same numbers on every device and in every dtype.
            gaussian = torch.randn(dim, width, generator=self._generator(key))
            orthonormal, _ = torch.linalg.qr(gaussian.to(self.dtype))
            self._drawn[key] = (orthonormal * math.sqrt(dim / width)).to(self.device)
        return self._drawn[key]


def parent(name: str) -> str:
    """Name of the layer that holds the layer of a parameter, or the parameter's own where there is none."""
    layers = name.rsplit(".", 2)
    return layers[0] if len(layers) == 3 else name


def factored_widths(shape: tuple[int, ...], sketch_dim: int, *, is_table: bool) -> tuple[int, int] | None:
    """[`projected_widths`] of a parameter that is projected from both sides, `None` for one that is added as it is: a vector,
    or a matrix whose gradient takes no more arithmetic per position to form than its factors to project."""
    if len(shape) == 3 and min(shape[1:]) > 1:  # a stack, of which no gradient is formed
        return projected_widths(shape[1], shape[2], sketch_dim)
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
