"""The random projections alone: unbiased norms, independence of parameters, exactness where nothing is projected."""

import pytest
import torch
from transformers import PhiConfig, PhiForCausalLM

from benchmarks.score_memory import measure_memory
from oblr_trl.scores import score_sketches
from oblr_trl.scores.projections import Projections

# A projected matrix twice (they share their bases), a matrix that is formed, and a vector longer than the sketch.
SHAPES = {"first": (40, 30), "second": (40, 30), "small": (5, 6), "vector": (100,)}


def projections(seed, sketch_dim=16, shapes=SHAPES, tables=(), dtype=torch.float64):
    device = torch.device("cpu")
    return Projections(shapes, tables=tables, sketch_dim=sketch_dim, seed=seed, dtype=dtype, device=device)


def sketch(gradients, seed, **options):
    """Of full gradients by name, all with a first axis of sequences."""
    drawn = projections(seed, **options)
    total = drawn.empty_sum(len(next(iter(gradients.values()))))
    for name, gradient in gradients.items():
        drawn.add_dense(total, name, gradient.flatten(1))
    return drawn.sketch(total)


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
    """Row factors may be a tensor, or indices of unit vectors; the same, too, by the matrix of the projection."""
    drawn, (num_rows, num_columns) = projections(0, sketch_dim), SHAPES[name]
    indices = torch.tensor([[3, num_rows - 1, 3]])
    one_hot = torch.nn.functional.one_hot(indices, num_rows).double()
    projected_rows = drawn.look_up_rows(name, indices)
    torch.testing.assert_close(projected_rows, drawn.project_rows(name, one_hot))
    torch.testing.assert_close(projected_rows, one_hot @ drawn.rows(name))

    columns = torch.randn(1, 3, num_columns, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    total = drawn.empty_sum(1)
    drawn.add_matrix(total, name, torch.bmm(projected_rows.mT, drawn.project_columns(name, columns)))
    expected = sketch({name: torch.bmm(one_hot.mT, columns)}, 0, sketch_dim=sketch_dim)
    torch.testing.assert_close(drawn.sketch(total), expected)


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


def test_a_vector_wraps_around_the_sketch_and_keeps_its_norm():
    """17 numbers in 16 places: the last one is a block of its own and shares the place of one entry i of the first block.

    So 15 places hold +-1 and one holds +-1 +-1: ||z||^2 = 15 + (0 or 4), and the sum of absolute values 15 + (0 or 2).
    """
    shared = set()
    for seed in range(50):
        sketched = sketch({"vector": torch.ones(1, 17, dtype=torch.float64)}, seed, shapes={"vector": (17,)})
        assert sketched.square().sum().item() in (15, 19)
        assert sketched.abs().sum().item() in (15, 17)
        shared |= set((sketched[0].abs() != 1).nonzero().flatten().tolist())
    assert len(shared) > 8  # of 16


def test_blocks_that_wrap_around_keep_inner_products():
    """A vector no longer than the sketch is exact wherever it starts: two of them have the inner product of their sketches."""
    vectors = torch.randn(2, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for seed in range(20):
        sketches = sketch({"vector": vectors}, seed, shapes={"vector": (16,), "rest": (40, 30)})
        torch.testing.assert_close(sketches @ sketches.T, vectors @ vectors.T)


def test_wide_heads_with_a_bias_are_unbiased():
    """A table's bias is projected like a matrix of one column; unprojected it would need V x V numbers."""
    options = {"sketch_dim": 64, "shapes": {"weight": (700, 20), "bias": (700,)}, "tables": ("weight", "bias")}
    assert all(projections(0, **options).rows(name).size(1) <= 64 for name in ("weight", "bias"))
    bias = torch.randn(1, 700, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    gradients = {"weight": bias.unsqueeze(2).expand(-1, -1, 20), "bias": bias}
    # ||g||^2 (20 + 1), the weight's gradient being g in each of its 20 columns.
    assert_unbiased(squared_norms(gradients, 300, **options), 21 * bias.square().sum())


def test_a_large_vocabulary_with_a_head_bias_and_few_hidden_features_takes_little_memory():
    """Phi's head has a bias, and 32 hidden features are fewer than the sketch's side of 64: V x V numbers would be 10 GB.

    Two bases of V x 128 and V x 64 float32 numbers are 38 MB, as much again carries their signs for a moment, and a tile of
    logits has 16 x 8192.
    """
    sizes = {"vocab_size": 50_000, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    model = PhiForCausalLM(PhiConfig(num_attention_heads=1, pad_token_id=0, **sizes)).eval()
    input_ids = torch.arange(24).view(2, 12)
    mask = torch.ones_like(input_ids)
    for scope in ("all", "lm_head"):
        memory = measure_memory(
            lambda scope=scope: score_sketches(model, input_ids, mask, mask[:, :8], scope=scope), torch.device("cpu")
        )
        assert memory.peak - memory.before < 200e6
