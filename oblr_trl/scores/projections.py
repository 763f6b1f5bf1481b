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

import torch
from torch import Tensor

# Rows up to which a table is a matrix like any other: the identity of its rows then takes 1 MiB.
_TINY_VOCABULARY = 512


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
        self.sketch_dim = sketch_dim
        self.seed = seed
        self.dtype = dtype
        self.device = device
        self._bases: dict[tuple[str, int, int], Tensor] = {}
        self._signs: dict[str, Tensor] = {}
        self._widths: dict[str, tuple[int, int]] = {}
        # Where in the sketch each block of at most k numbers begins.
        self._starts: dict[str, list[int]] = {}
        all_fit, cursor = sum(math.prod(shape) for shape in shapes.values()) <= sketch_dim, 0
        for name, shape in shapes.items():
            size = math.prod(shape)
            widths = factored_widths(shape, sketch_dim, is_table=name in tables)
            if widths is not None:
                self._widths[name] = (shape[0], size // shape[0]) if all_fit else widths
                size = math.prod(self._widths[name])
            if all_fit:
                self._starts[name] = [cursor]
                cursor += size
            else:
                num_blocks = math.ceil(size / sketch_dim)
                draw = torch.randint(sketch_dim, (num_blocks,), generator=self._generator(f"{name}-starts"))
                self._starts[name] = draw.tolist()

    def rows(self, name: str, num_rows: int) -> Tensor:
        """Row projection of a table with the parameter's signs, of shape `(R, row_width)`."""
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

    def empty_sum(self, batch_size: int) -> Tensor:
        """What gradients are added to, of shape `(B, 2 k)`: a block that wraps around goes into the second half."""
        return torch.zeros(batch_size, 2 * self.sketch_dim, dtype=self.dtype, device=self.device)

    def sketch(self, total: Tensor) -> Tensor:
        """The sketch `(B, k)` of everything that was added to `total`."""
        return total[:, : self.sketch_dim] + total[:, self.sketch_dim :]

    def add_matrix(self, total: Tensor, name: str, values: Tensor) -> None:
        """Add a projected matrix gradient (B, row_width, column_width) to `total` (B, 2 k), in place."""
        add = self._add_flat if name in self._widths else self.add_dense
        add(total, name, values.flatten(1))

    def add_dense(self, total: Tensor, name: str, values: Tensor) -> None:
        """Add a dense per-sequence gradient (B, n) to `total` (B, 2 k) with independent signs, in place: exact in norm where
        n <= k, else a count sketch."""
        self._add_flat(total, name, values.to(total.dtype), self._sign(name, "dense", values.size(1)))

    def _add_flat(self, total: Tensor, name: str, values: Tensor, signs: Tensor | None = None) -> None:
        """Add `values` (B, n), times `signs` (n,) where given, block by block."""
        if signs is not None:
            signs = signs.to(total.dtype)
        for i, start in enumerate(self._starts[name]):
            entries = slice(i * self.sketch_dim, (i + 1) * self.sketch_dim)
            block = values[:, entries]
            place = total[:, start : start + block.size(1)]
            if signs is None:
                place += block
            else:
                # Signs and sum at once: for short sequences the product would take longer to write than the gradient to form.
                place.addcmul_(block, signs[entries])

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
