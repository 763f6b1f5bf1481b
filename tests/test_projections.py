"""The random projections alone: unbiased norms, independence of parameters, exactness where nothing is projected."""

import pytest
import torch

from oblr_trl.scores.projections import Projections

# A projected matrix twice (they share their bases), a matrix that is formed, and a vector longer than the sketch.
SHAPES = {"first": (40, 30), "second": (40, 30), "small": (5, 6), "vector": (100,)}


def projections(seed, sketch_dim=16, shapes=SHAPES):
    return Projections(shapes, sketch_dim=sketch_dim, seed=seed, dtype=torch.float64, device=torch.device("cpu"))


def sketch_of_ones(names, **options):
    """Sketch of the gradient whose every entry is one: the worst case for signs that are missing."""
    drawn = projections(**options)
    sketch = torch.zeros(1, drawn.sketch_dim, dtype=torch.float64)
    for name in names:
        shape = SHAPES[name]
        if len(shape) == 1:
            drawn.add_dense(sketch, name, torch.ones(1, *shape, dtype=torch.float64))
        else:
            rows = drawn.project_rows(name, torch.ones(1, 1, shape[0], dtype=torch.float64))
            columns = drawn.project_columns(name, torch.ones(1, 1, shape[1], dtype=torch.float64))
            drawn.add_matrix(sketch, name, torch.bmm(rows.mT, columns))
    return sketch


@pytest.mark.parametrize(
    ("names", "squared_norm"),
    [(["first"], 1200), (["small"], 30), (["vector"], 100), (["first", "second"], 2400), (list(SHAPES), 2530)],
)
def test_squared_norms_are_unbiased_and_parameters_do_not_mix(names, squared_norm):
    """Two equal gradients of two parameters have twice the squared norm of one; without independent signs, four times."""
    draws = torch.stack([sketch_of_ones(names, seed=seed).square().sum() for seed in range(600)])
    standard_error = draws.std() / len(draws) ** 0.5
    assert (draws.mean() - squared_norm).abs() < 4 * standard_error + 1e-9


def test_a_model_smaller_than_the_sketch_is_not_projected():
    sketch = sketch_of_ones(list(SHAPES), seed=0, sketch_dim=4096)
    assert sketch.square().sum().item() == pytest.approx(2530, rel=1e-12)
    assert (sketch != 0).sum() == 2530


def test_the_same_seed_gives_the_same_projection_and_another_one_another():
    assert torch.equal(sketch_of_ones(["first"], seed=3), sketch_of_ones(["first"], seed=3))
    assert not torch.equal(sketch_of_ones(["first"], seed=3), sketch_of_ones(["first"], seed=4))


def test_looking_rows_up_is_projecting_unit_vectors():
    drawn = projections(seed=0)
    indices = torch.tensor([[3, 39, 3]])
    one_hot = torch.nn.functional.one_hot(indices, 40).double()
    torch.testing.assert_close(drawn.look_up_rows("first", indices, 40), drawn.project_rows("first", one_hot))
    torch.testing.assert_close(one_hot @ drawn.rows("first", 40), drawn.project_rows("first", one_hot))
