"""The random projections alone: unbiased norms, independence of parameters, exactness where nothing is projected."""

import pytest
import torch
from transformers import PhiConfig, PhiForCausalLM

from benchmarks.score_memory import measure_memory
from oblr_trl.scores import score_sketches
from oblr_trl.scores.projections import Projections

# A projected matrix twice (they share their bases), a matrix that is formed, and a vector longer than the sketch.
SHAPES = {"first": (40, 30), "second": (40, 30), "small": (5, 6), "vector": (100,)}


def projections(seed, sketch_dim=16, shapes=SHAPES, tables=()):
    return Projections(
        shapes, tables=tables, sketch_dim=sketch_dim, seed=seed, dtype=torch.float64, device=torch.device("cpu")
    )


def sketch_of_ones(names, **options):
    """Sketch of the gradient whose every entry is one: the worst case for signs that are missing."""
    drawn = projections(**options)
    total = drawn.empty_sum(1)
    for name in names:
        shape = SHAPES[name]
        if len(shape) == 1:
            drawn.add_dense(total, name, torch.ones(1, *shape, dtype=torch.float64))
        else:
            rows = drawn.project_rows(name, torch.ones(1, 1, shape[0], dtype=torch.float64))
            columns = drawn.project_columns(name, torch.ones(1, 1, shape[1], dtype=torch.float64))
            drawn.add_matrix(total, name, torch.bmm(rows.mT, columns))
    return drawn.sketch(total)


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


def squared_norms_over_seeds(shapes, gradients, sketch_dim, num_seeds=200):
    """Of the sketches of dense gradients, relative to the truth."""
    truth = sum(gradient.square().sum() for gradient in gradients.values())
    results = []
    for seed in range(num_seeds):
        drawn = projections(seed, sketch_dim, shapes)
        total = drawn.empty_sum(1)
        for name, gradient in gradients.items():
            drawn.add_dense(total, name, gradient.reshape(1, -1))
        results.append(drawn.sketch(total).square().sum() / truth)
    return torch.stack(results)


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
        gradients[name] = gradient
    ratios = squared_norms_over_seeds(shapes, gradients, sketch_dim=4096)
    assert ratios.mean().item() == pytest.approx(1, abs=0.02)
    assert ratios.std() < 0.04


def test_a_vector_wraps_around_the_sketch_and_keeps_its_norm():
    """17 numbers in 16 places: the last one is a block of its own and shares the place of one entry i of the first block.

    So 15 places hold +-1 and one holds +-1 +-1: ||z||^2 = 15 + (0 or 4), and the sum of absolute values 15 + (0 or 2).
    """
    shapes, starts = {"vector": (17,), "rest": (40, 30)}, set()
    for seed in range(50):
        drawn = projections(seed, 16, shapes)
        total = drawn.empty_sum(1)
        drawn.add_dense(total, "vector", torch.ones(1, 17, dtype=torch.float64))
        sketch = drawn.sketch(total)
        starts.add(drawn._starts["vector"][0])
        assert total[:, 16:].any() or drawn._starts["vector"][0] == 0
        assert sketch.square().sum().item() in (15, 19)
        assert sketch.abs().sum().item() in (15, 17)
    assert len(starts) > 8  # of 16


def test_blocks_that_wrap_around_keep_inner_products():
    """A vector no longer than the sketch is exact wherever it starts: two of them have the inner product of their sketches."""
    shapes = {"vector": (16,), "rest": (40, 30)}
    first, second = torch.randn(2, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for seed in range(20):
        drawn = projections(seed, 16, shapes)
        total = drawn.empty_sum(2)
        drawn.add_dense(total, "vector", torch.stack([first, second]))
        sketches = drawn.sketch(total)
        torch.testing.assert_close(
            sketches @ sketches.T, torch.stack([first, second]) @ torch.stack([first, second]).T
        )


def test_a_large_vocabulary_with_a_head_bias_and_few_hidden_features_takes_little_memory():
    """Phi's head has a bias, and 32 hidden features are fewer than the sketch's side of 64: V x V numbers would be 10 GB.

    Two bases of V x 128 and V x 64 float32 numbers are 38 MB, as much again carries their signs for a moment, and a tile of
    logits has 16 x 8192.
    """
    config = PhiConfig(
        vocab_size=50_000,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=1,
        pad_token_id=0,
    )
    model = PhiForCausalLM(config).eval()
    input_ids = torch.arange(24).view(2, 12)
    ones = torch.ones_like(input_ids)
    for scope in ("all", "lm_head"):
        memory = measure_memory(
            lambda scope=scope: score_sketches(model, input_ids, ones, ones[:, :8], scope=scope), torch.device("cpu")
        )
        assert memory.peak - memory.before < 200e6


def test_wide_heads_with_a_bias_are_unbiased():
    """A table's bias is projected like a matrix of one column; unprojected it would need V x V numbers."""
    shapes = {"weight": (700, 20), "bias": (700,)}
    gradients = torch.randn(700, generator=torch.Generator().manual_seed(0), dtype=torch.float64).view(1, 1, 700)
    draws = []
    for seed in range(300):
        drawn = projections(seed, 64, shapes, tables=("weight", "bias"))
        total = drawn.empty_sum(1)
        columns = {
            "weight": torch.ones(1, 1, 20, dtype=torch.float64),
            "bias": torch.ones(1, 1, 1, dtype=torch.float64),
        }
        for name in shapes:
            rows = gradients @ drawn.rows(name, 700)
            assert rows.size(-1) <= 64
            drawn.add_matrix(total, name, torch.bmm(rows.mT, drawn.project_columns(name, columns[name])))
        draws.append(drawn.sketch(total).square().sum())
    # ||g||^2 (20 + 1), the weight's gradient being g in each of its 20 columns.
    draws = torch.stack(draws)
    truth = 21 * gradients.square().sum()
    assert (draws.mean() - truth).abs() < 4 * draws.std() / 300**0.5
