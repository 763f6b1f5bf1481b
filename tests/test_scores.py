"""Exact norms and sketches against one float64 backward per sequence."""

import pytest
import torch
from transformers import OlmoConfig, OlmoForCausalLM

from oblr_trl.scores import reference_scores, score_sketches
from tests.tiny_models import ARCHITECTURES, random_batch, tiny_model

SCOPES = [("all", None), ("last_k", 1), ("last_k", 2), ("lm_head", None)]


def float64_model(architecture, checkpointing=False):
    model = tiny_model(architecture).double()
    model.train(checkpointing)  # transformers checkpoints in training mode only; there is no dropout here
    if checkpointing:
        model.gradient_checkpointing_enable()
    return model


def token_weights(completion_mask):
    generator = torch.Generator().manual_seed(5)
    return torch.rand(completion_mask.shape, generator=generator, dtype=torch.float64) + 0.2


def relative_error(estimate, truth):
    """Largest error over sequences that have a score at all; the others must be exactly zero."""
    empty = truth == 0
    assert (estimate[empty] == 0).all()
    return ((estimate - truth).abs() / truth)[~empty].max().item()


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_exact_norms_and_wide_sketches_equal_the_oracle(architecture, padding, checkpointing):
    model = float64_model(architecture, checkpointing)
    batch = random_batch(padding)
    weights = token_weights(batch[2])
    for scope, last_k in SCOPES:
        options = {"token_weights": weights, "scope": scope, "last_k": last_k}
        scores = reference_scores(model, *batch, **options)
        gram = scores @ scores.T
        norms = gram.diagonal().sqrt()

        exact = score_sketches(model, *batch, method="exact", **options)
        assert exact.dtype == torch.float64
        assert not exact.requires_grad
        assert relative_error(exact, norms.square()) < 1e-10

        sketches = score_sketches(model, *batch, sketch_dim=65536, **options)
        error = (sketches @ sketches.T - gram).abs()
        assert (error <= 0.05 * norms.outer(norms)).all()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(("scope", "last_k"), SCOPES)
def test_default_sketches_give_weights_with_a_median_error_of_five_percent(architecture, scope, last_k):
    # Wider than the sketch's side of 64, so that real projections are at work in every block.
    model = tiny_model(architecture, hidden_size=128).eval()
    batch = random_batch(batch_size=12)
    options = {"scope": scope, "last_k": last_k}
    exact = score_sketches(model, *batch, method="exact", **options)
    errors = []
    for seed in range(5):
        sketched = score_sketches(model, *batch, seed=seed, **options).square().sum(dim=1)
        errors.append(((sketched - exact).abs() / exact)[exact > 0])
    assert torch.cat(errors).median() <= 0.05


def test_sketches_are_unbiased_over_their_seed():
    """The mean of <z_i, z_j> over draws is <s_i, s_j>, for projected, formed and dense parameters alike."""
    model = tiny_model("gpt2", hidden_size=96, num_layers=1).double().eval()
    batch = random_batch(batch_size=3)
    scores = reference_scores(model, *batch)
    gram = scores @ scores.T
    draws = []
    for seed in range(300):
        sketches = score_sketches(model, *batch, sketch_dim=64, seed=seed)
        draws.append(sketches @ sketches.T)
    stacked = torch.stack(draws)
    standard_error = stacked.std(dim=0) / len(draws) ** 0.5
    z = (stacked.mean(dim=0) - gram).abs() / standard_error.clamp(min=1e-12)
    assert z.max() < 4.5
    assert standard_error.max() > 0  # something was projected


def test_tied_embeddings_are_one_matrix():
    """The oracle's norm of a tied matrix holds the cross term of its two uses; two separate norms would not."""
    model = float64_model("qwen3")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name == "model.embed_tokens.weight")
    batch = random_batch()
    whole = score_sketches(model, *batch, method="exact")
    assert relative_error(whole, reference_scores(model, *batch).square().sum(dim=1)) < 1e-10
    head_only = score_sketches(model, *batch, method="exact", scope="lm_head")
    assert (whole[1:] - head_only[1:]).abs().min() > 1e-6


def test_lora_scores_are_those_of_the_adapters():
    model = float64_model("qwen3_lora")
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert reference_scores(model, *random_batch()).size(1) == trainable
    assert trainable < sum(parameter.numel() for parameter in model.parameters()) / 2


def test_micro_batches_do_not_change_the_scores():
    model = tiny_model().double().eval()
    batch = random_batch()
    whole = score_sketches(model, *batch)
    for size in (1, 2):
        torch.testing.assert_close(score_sketches(model, *batch, micro_batch_size=size), whole, rtol=1e-9, atol=1e-9)


def test_checkpointing_does_not_change_the_sketches():
    """Not only their norms: the coordinates must agree, since sketches of different runs are compared."""
    batch = random_batch()
    plain = score_sketches(float64_model("qwen3"), *batch)
    checkpointed = score_sketches(float64_model("qwen3", checkpointing=True), *batch)
    torch.testing.assert_close(plain, checkpointed, rtol=1e-9, atol=1e-9)


def test_a_module_called_twice_is_one_parameter():
    model = tiny_model("llama").double().eval()
    layers = model.model.layers
    layers[1].mlp.up_proj = layers[0].mlp.up_proj  # shared between two blocks
    batch = random_batch()
    truth = reference_scores(model, *batch).square().sum(dim=1)
    assert relative_error(score_sketches(model, *batch, method="exact"), truth) < 1e-10
    sketches = score_sketches(model, *batch, sketch_dim=65536)
    assert relative_error(sketches.square().sum(dim=1), truth) < 0.05


@pytest.mark.parametrize("method", ["sketch", "exact"])
def test_mixed_precision_stays_close_and_accumulates_in_float32(method):
    batch = random_batch()
    truth = score_sketches(tiny_model().double().eval(), *batch, method="exact")
    half = tiny_model().to(torch.bfloat16).eval()
    options = {"method": method} | ({"sketch_dim": 65536} if method == "sketch" else {})

    def squared_norms(result):
        assert result.dtype == torch.float32
        return result.square().sum(dim=1) if method == "sketch" else result

    assert relative_error(squared_norms(score_sketches(half, *batch, **options)).double(), truth) < 0.1
    with torch.autocast("cpu", dtype=torch.bfloat16):
        autocast = score_sketches(tiny_model().eval(), *batch, **options)
    assert relative_error(squared_norms(autocast).double(), truth) < 0.1


def test_scores_do_not_depend_on_the_amount_of_padding():
    model = tiny_model().double().eval()
    input_ids, attention_mask, completion_mask = random_batch("right")
    before = score_sketches(model, input_ids, attention_mask, completion_mask, method="exact")
    zeros = torch.zeros(input_ids.size(0), 4, dtype=torch.long)
    wider = [torch.cat([tensor, zeros], dim=1) for tensor in (input_ids, attention_mask, completion_mask)]
    torch.testing.assert_close(score_sketches(model, *wider, method="exact"), before, rtol=1e-6, atol=0)


def test_a_model_that_changes_a_layers_output_in_place_is_scored():
    """OLMo clamps the outputs of its query, key and value projections in place, here about half of them."""
    torch.manual_seed(0)
    config = OlmoConfig(
        vocab_size=40,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        clip_qkv=0.1,
        pad_token_id=0,
    )
    model = OlmoForCausalLM(config).double().eval()
    batch = random_batch()
    truth = reference_scores(model, *batch).square().sum(dim=1)
    assert relative_error(score_sketches(model, *batch, method="exact"), truth) < 1e-10
    model.config.clip_qkv = None
    assert (
        relative_error(reference_scores(model, *batch).square().sum(dim=1), truth) > 1e-3
    )  # else nothing was clamped
