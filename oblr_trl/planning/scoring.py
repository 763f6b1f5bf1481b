"""Memory and arithmetic of the scoring pass: projections, sketches, what is sent between processes, operations per token."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from oblr_trl.planning.setup import Setup
from oblr_trl.planning.shapes import ModelShape
from oblr_trl.scores.projections import factored_widths, projected_widths

_FLOAT32 = 4


def scoped_shapes(setup: Setup) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Parameters that the pass sketches, as `oblr_trl.scores.scopes` finds them and only those that are tapped."""
    assert setup.scoring is not None
    shape, scoring = setup.shape, setup.scoring
    head = ("lm_head.weight", (shape.vocab_size, shape.hidden_size))
    if scoring.scope == "lm_head":
        yield head
        return
    first = 0 if scoring.scope == "all" else shape.num_layers - (scoring.last_k or 0)
    source = shape.parameter_shapes() if setup.adapter is None else setup.adapter.parameter_shapes(shape)
    for name, sizes in source:
        layer = _layer(name)
        if layer is not None and layer < first:
            continue
        if name == "model.embed_tokens.weight":  # tied, it is the head's matrix too; untied, last_k does not reach it
            if shape.tied:
                yield head
            elif scoring.scope == "all":
                yield name, sizes
            continue
        yield name, sizes


def _layer(name: str) -> int | None:
    parts = name.split(".")
    return int(parts[parts.index("layers") + 1]) if "layers" in parts else None


def projection_bytes(shapes: Iterator[tuple[str, tuple[int, ...]]], sketch_dim: int) -> int:
    """Bytes of all projections when every one has been drawn: one float32 basis per shape, one sign per row and column."""
    bases: dict[tuple[str, int, int], int] = {}
    signs = 0
    for name, sizes in shapes:
        widths = factored_widths(sizes, sketch_dim, is_table=name in ("lm_head.weight", "model.embed_tokens.weight"))
        if widths is None:
            signs += math.prod(sizes)
            continue
        for side, dim, width in zip(("rows", "columns"), sizes, widths, strict=True):
            signs += dim
            if width != dim:
                bases[side, dim, width] = dim * width * _FLOAT32
    return sum(bases.values()) + signs


def head_row_width(shape: ModelShape, sketch_dim: int) -> int:
    """Width r that the vocabulary axis is projected to."""
    return projected_widths(shape.vocab_size, shape.hidden_size, sketch_dim)[0]


def sketch_bytes(setup: Setup) -> int:
    """Sketches on one process: those of its own completions, and all of them after the gather."""
    assert setup.scoring is not None
    completions = setup.schedule.completions_per_process + setup.schedule.completions_per_batch
    return completions * setup.scoring.sketch_dim * _FLOAT32


def gather_bytes(num_completions: int, sketch_dim: int, num_processes: int) -> int:
    """Bytes that one process receives when the sketches of all are gathered."""
    return num_completions * sketch_dim * _FLOAT32 * (num_processes - 1) // num_processes


@dataclass(frozen=True)
class Operations:
    """
    Floating-point operations per token, a multiplication and an addition counted as two.

    Args:
        forward (`float`): Forward pass of the whole model.
        train (`float`): Forward and backward with all weight gradients.
        score_all (`float`): Scoring pass, scope `"all"`.
        score_last_k (`float`): Scoring pass, scope `"last_k"`.
        score_lm_head (`float`): Scoring pass, scope `"lm_head"`.
        ride_extra (`float`): What `"lm_head"` adds to a forward pass for the old log-probabilities.
    """

    forward: float
    train: float
    score_all: float
    score_last_k: float
    score_lm_head: float
    ride_extra: float


def operations_per_token(
    shape: ModelShape,
    *,
    length: int,
    sketch_dim: int,
    last_k: int,
    checkpointing: bool,
    completion_share: float = 1.0,
) -> Operations:
    """
    Operations of full fine-tuning, per token of a sequence.

    A product with a matrix of n weights takes 2 n operations in each of forward, gradient of activations and gradient of
    weights; causal attention takes 2 q T a layer forward (half of 4 q T) and twice that backward; checkpointing runs the
    blocks forward once more. The output projection runs on completion tokens alone. TRL's fused one computes its logits
    again in the backward pass, that of the scoring pass does not.
    """
    attention = 2 * shape.query_size * length * shape.num_layers
    blocks = 2 * shape.num_linear_parameters()
    head = 2 * shape.vocab_size * shape.hidden_size * completion_share
    recompute = blocks + attention if checkpointing else 0
    forward = blocks + attention + head
    below = blocks + 2 * attention + recompute  # gradients of activations in all blocks
    sketches = shape.num_layers * sum(
        _sketch_operations(*sizes, sketch_dim) for sizes in shape.linear_shapes().values()
    )
    head_sketch = _sketch_operations(shape.vocab_size, shape.hidden_size, sketch_dim) * completion_share
    share = last_k / shape.num_layers
    return Operations(
        forward=forward,
        train=forward + below + blocks + 3 * head,
        score_all=forward + head + below + sketches + head_sketch,
        score_last_k=forward + head + share * (below + sketches) + head_sketch,
        score_lm_head=forward + head_sketch,
        ride_extra=head_sketch,
    )


def _sketch_operations(num_rows: int, num_columns: int, sketch_dim: int) -> int:
    """Projecting both factors of one position's outer product, and their product."""
    row_width, column_width = projected_widths(num_rows, num_columns, sketch_dim)
    rows = 2 * num_rows * row_width if row_width != num_rows else 0
    columns = 2 * num_columns * column_width if column_width != num_columns else 0
    return rows + columns + 2 * row_width * column_width
