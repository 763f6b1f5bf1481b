"""The random projections alone: unbiased norms, independence of parameters, exactness where nothing is projected."""

import pytest
import torch

from oblr_trl.scores.accumulator import SketchAccumulator
from oblr_trl.scores.factors import DenseGradient, IndexRows, OuterProduct
from oblr_trl.scores.projections import COLUMNS, ROWS, Projections

# A projected matrix twice (they share their bases), a matrix that is formed, and a vector longer than the sketch.
SHAPES = {"first": (40, 30), "second": (40, 30), "small": (5, 6), "vector": (100,)}


def projections(seed, sketch_dim=16, shapes=SHAPES, tables=(), dtype=torch.float64):
    device = torch.device("cpu")
    return Projections(shapes, tables=tables, sketch_dim=sketch_dim, seed=seed, dtype=dtype, device=device)


def sketch(gradients, seed, **options):
    """Of full gradients by name, all with a first axis of sequences."""
    accumulator = SketchAccumulator(len(next(iter(gradients.values()))), projections(seed, **options))
    for name, gradient in gradients.items():
        accumulator.add(name, DenseGradient(gradient.flatten(1)))
    return accumulator.result()


def ones(*names):
    """The worst case for signs that are missing."""
    return {name: torch.ones(1, *SHAPES[name], dtype=torch.float64) for name in names}


def squared_norms(gradients, num_seeds, **options):
    return torch.stack([sketch(gradients, seed, **options).square().sum() for seed in range(num_seeds)])


def assert_unbiased(draws, truth):
    assert (draws.mean() - truth).abs() < 4 * draws.std() / len(draws) ** 0.5 + 1e-9


@pytest.mark.parametrize(
    ("names", "squared_norm"),
    [(["first"], 1200), (["small"], 30), (["vector"], 100), (["first", "second"], 2400), (list(SHAPES), 2530)],
)
def test_squared_norms_are_unbiased_and_parameters_do_not_mix(names, squared_norm):
    """Two equal gradients of two parameters have twice the squared norm of one; without independent signs, four times."""
    assert_unbiased(squared_norms(ones(*names), 600), squared_norm)


SIBLINGS = {f"block.{name}.weight": (size, 30) for name, size in (("q", 40), ("k", 40), ("v", 24))}


def products(columns_of_second, num_seeds=1500):
    """Of the sketches of equal rank-one gradients of q and k, over seeds; both in one layer unless the second's parent is another."""
    names = ("block.q.weight", "block.k.weight" if columns_of_second == "shared" else "other.k.weight")
    gradient = torch.randn(40, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64).expand(1, 40, 30)
    shapes = dict.fromkeys(names, (40, 30))
    sketches = [[sketch({name: gradient}, seed, shapes=shapes)[0] for name in names] for seed in range(num_seeds)]
    return torch.tensor([first @ second for first, second in sketches]) / gradient.square().sum()


def test_layers_of_one_parent_share_their_columns_and_do_not_mix_all_the_same():
    """Rows of independent signs suffice: products of different parameters have mean 0, and as small a variance with shared columns."""
    shared, independent = products("shared"), products("independent")
    for draws in (shared, independent):
        assert_unbiased(draws, 0.0)
    assert shared.std() < 1.1 * independent.std()


def test_layers_of_one_parent_project_their_input_once(monkeypatch):
    """And have the sketches of their gradients."""
    generator = torch.Generator().manual_seed(0)
    columns = torch.randn(2, 5, 30, generator=generator, dtype=torch.float64)
    products = {
        name: OuterProduct(torch.randn(2, 5, shape[0], generator=generator, dtype=torch.float64), columns)
        for name, shape in SIBLINGS.items()
    }
    dense = {name: torch.einsum("btr,btc->brc", product.rows, columns) for name, product in products.items()}
    expected = sketch(dense, 0, shapes=SIBLINGS)
    projected = []
    plain = Projections.project
    monkeypatch.setattr(
        Projections,
        "project",
        lambda self, name, axis, *args: projected.append(axis) or plain(self, name, axis, *args),
    )
    accumulator = SketchAccumulator(2, projections(0, shapes=SIBLINGS))
    for name, product in products.items():
        accumulator.add(name, product)
    torch.testing.assert_close(accumulator.result(), expected)
    assert projected == [ROWS, COLUMNS, ROWS, ROWS]
    # Another input in the same place, which the first has left, is another one.
    accumulator.add("block.q.weight", OuterProduct(products["block.q.weight"].rows, columns + 1))
    accumulator.add("block.k.weight", OuterProduct(products["block.k.weight"].rows, columns + 2))
    assert projected[4:] == [ROWS, COLUMNS] * 2


def test_a_model_smaller_than_the_sketch_is_not_projected():
    sketched = sketch(ones(*SHAPES), 0, sketch_dim=4096)
    assert sketched.square().sum().item() == pytest.approx(2530, rel=1e-12)
    assert (sketched != 0).sum() == 2530


def test_the_same_seed_gives_the_same_projection_and_another_one_another():
    assert torch.equal(sketch(ones("first"), 3), sketch(ones("first"), 3))
    assert not torch.equal(sketch(ones("first"), 3), sketch(ones("first"), 4))


@pytest.mark.parametrize("sketch_dim", [16, 4096])
@pytest.mark.parametrize("name", ["first", "small"])
def test_factors_have_the_sketch_of_the_gradient_that_they_are_of(name, sketch_dim):
    """Row factors may be a tensor, or indices of unit vectors."""
    num_rows, num_columns = SHAPES[name]
    indices = torch.tensor([[3, num_rows - 1, 3]])
    one_hot = torch.nn.functional.one_hot(indices, num_rows).double()
    columns = torch.randn(1, 3, num_columns, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = sketch({name: torch.bmm(one_hot.mT, columns)}, 0, sketch_dim=sketch_dim)
    for rows in (one_hot, IndexRows(indices)):
        accumulator = SketchAccumulator(1, projections(0, sketch_dim))
        accumulator.add(name, OuterProduct(rows, columns))
        torch.testing.assert_close(accumulator.result(), expected)


@pytest.mark.parametrize("shape", [(8, 4096), (8192, 2), (4096,), (1024,)], ids=str)
def test_an_outlier_channel_of_every_layer_does_not_fall_into_one_place(shape):
    """The same input channel dominates LoRA's A, the same output channel B and the norms, in all of 24 layers.

    A random projection's squared norm has a standard deviation of sqrt(2 / k) = 0.022 at most. One place for a channel would
    make the sketch a sum of +- numbers, whose square has a standard deviation of about sqrt(2).
    """
    generator = torch.Generator().manual_seed(0)
    shapes = {f"layers.{i}": shape for i in range(24)}
    gradients = {}
    for name in shapes:
        gradient = 0.001 * torch.randn(shape, generator=generator, dtype=torch.float64)
        gradient[..., 17 % shape[-1]] += 1.0 if len(shape) == 1 or shape[0] == 8 else 0.0
        if shape[0] == 8192:
            gradient[17] += 1.0
        gradients[name] = gradient.unsqueeze(0)
    truth = sum(gradient.square().sum() for gradient in gradients.values())
    ratios = squared_norms(gradients, 200, sketch_dim=4096, shapes=shapes) / truth
    assert ratios.mean().item() == pytest.approx(1, abs=0.02)
    assert ratios.std() < 0.04


def test_blocks_that_wrap_around_keep_inner_products():
    """A vector no longer than the sketch is exact wherever it starts: two of them have the inner product of their sketches."""
    vectors = torch.randn(2, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for seed in range(20):
        sketches = sketch({"vector": vectors}, seed, shapes={"vector": (16,), "rest": (40, 30)})
        torch.testing.assert_close(sketches @ sketches.T, vectors @ vectors.T)


def test_wide_heads_with_a_bias_are_unbiased():
    """A table's bias is projected like a matrix of one column; unprojected it would need V x V numbers."""
    options = {"sketch_dim": 64, "shapes": {"weight": (700, 20), "bias": (700,)}, "tables": ("weight", "bias")}
    assert all(projections(0, **options).projection(name, ROWS).size(1) <= 64 for name in ("weight", "bias"))
    bias = torch.randn(1, 700, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    gradients = {"weight": bias.unsqueeze(2).expand(-1, -1, 20), "bias": bias}
    # ||g||^2 (20 + 1), the weight's gradient being g in each of its 20 columns.
    assert_unbiased(squared_norms(gradients, 300, **options), 21 * bias.square().sum())
