"""Exact norms and sketches against one float64 backward per sequence."""

import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM, OlmoConfig, OlmoForCausalLM

from oblr_trl.scores import ScorePass, reference_scores, score_sketches
from oblr_trl.scores.parameters import local_parameter_sketch
from oblr_trl.scores.score_pass import ScoreOutput
from oblr_trl.scores.scoring_model import ScoringModel, weighted_lengths
from tests.tiny_models import ARCHITECTURES, random_batch, tiny_model

SCOPES = [("all", None), ("last_k", 1), ("last_k", 2), ("lm_head", None)]


def float64_model(architecture="qwen3", checkpointing=False):
    model = tiny_model(architecture).double()
    model.train(checkpointing)  # transformers checkpoints in training mode only; there is no dropout here
    if checkpointing:
        model.gradient_checkpointing_enable()
    return model


def relative_error(estimate, truth):
    """Largest error over sequences that have a score at all; the others must be exactly zero."""
    empty = truth == 0
    assert (estimate[empty] == 0).all()
    return ((estimate - truth).abs() / truth)[~empty].max().item()


def assert_equal_to_the_oracle(model, batch=None, **options):
    """Exact norms to rounding, and inner products of sketches, to 5 % where the parameters are more than they have places."""
    batch = random_batch() if batch is None else batch
    scores = reference_scores(model, *batch, **options)
    gram = scores @ scores.T
    norms = gram.diagonal().sqrt()
    exact = score_sketches(model, *batch, method="exact", **options)
    assert exact.dtype == torch.float64
    assert not exact.requires_grad
    assert relative_error(exact, norms.square()) < 1e-10
    sketches = score_sketches(model, *batch, sketch_dim=65536, **options)
    tolerance = 1e-10 if scores.size(1) <= 65536 else 0.05
    assert ((sketches @ sketches.T - gram).abs() <= tolerance * norms.outer(norms)).all()
    assert (norms[1:] > 0).all()  # the first completion of the batch is empty


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_exact_norms_and_wide_sketches_equal_the_oracle(architecture, padding, checkpointing):
    model, batch = float64_model(architecture, checkpointing), random_batch(padding)
    weights = torch.rand(batch[2].shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64) + 0.2
    for scope, last_k in SCOPES:
        assert_equal_to_the_oracle(model, batch, token_weights=weights, scope=scope, last_k=last_k)


def with_a_head_bias():
    model = float64_model("qwen3_untied")
    model.set_output_embeddings(nn.Linear(64, model.config.vocab_size).double())
    return model


def with_a_module_in_two_blocks():
    model = float64_model("llama")
    model.model.layers[1].mlp.up_proj = model.model.layers[0].mlp.up_proj
    return model


def with_a_norm_without_bias():
    model = float64_model("llama")
    model.model.norm = nn.LayerNorm(64, bias=False).double()
    return model


@pytest.mark.parametrize("model", [with_a_head_bias, with_a_module_in_two_blocks, with_a_norm_without_bias])
@pytest.mark.parametrize("scope", ["all", "lm_head"])
def test_unusual_layers_equal_the_oracle(model, scope):
    assert_equal_to_the_oracle(model(), scope=scope)


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
    draws = [score_sketches(model, *batch, sketch_dim=64, seed=seed) for seed in range(300)]
    grams = torch.stack([sketches @ sketches.T for sketches in draws])
    standard_error = grams.std(dim=0) / len(draws) ** 0.5
    z = (grams.mean(dim=0) - scores @ scores.T).abs() / standard_error.clamp(min=1e-12)
    assert z.max() < 4.5
    assert standard_error.max() > 0  # something was projected


@pytest.mark.parametrize(
    ("checkpointing", "options"), [(False, {"micro_batch_size": 1}), (False, {"micro_batch_size": 2}), (True, {})]
)
def test_neither_micro_batches_nor_checkpointing_change_the_sketches(checkpointing, options):
    """Not only their norms: the coordinates must agree, since sketches of different runs are compared."""
    batch = random_batch()
    whole = score_sketches(float64_model(), *batch)
    sketches = score_sketches(float64_model(checkpointing=checkpointing), *batch, **options)
    torch.testing.assert_close(sketches, whole, rtol=1e-9, atol=1e-9)


def test_chunks_end_with_their_longest_completion_and_scores_return_to_their_rows():
    score_pass, (input_ids, attention_mask, completion_mask) = ScorePass(float64_model()), random_batch(batch_size=6)
    # The parameters themselves, as an update: any will do.
    score_pass.update = local_parameter_sketch(score_pass)
    weights, widths = completion_mask.double(), []
    expected = score_pass({"input_ids": input_ids, "attention_mask": attention_mask}, input_ids[:, -9:], weights)

    def recorded_pass(model_inputs, *args):
        assert model_inputs["attention_mask"].shape == model_inputs["input_ids"].shape
        widths.append(model_inputs["input_ids"].size(1))
        return score_pass(model_inputs, *args)

    recorded_pass.model, recorded_pass.scoped_parameters = score_pass.model, score_pass.scoped_parameters
    lengths = weighted_lengths(weights)
    assert torch.equal(lengths, completion_mask.sum(dim=1))
    order = lengths.argsort(descending=True)
    scoring_model = ScoringModel(recorded_pass, weights, order)
    for rows in order.split(2):
        inputs = {"input_ids": input_ids[rows], "attention_mask": attention_mask[rows]}
        assert scoring_model(labels=None, fused_lm_head=True, **inputs).log_probs.shape == (2, 9)
    result = scoring_model.result(lambda tensor: tensor)
    torch.testing.assert_close(result.log_probs, expected.log_probs)
    torch.testing.assert_close(result.sketches, expected.sketches)
    torch.testing.assert_close(result.products, expected.products)
    # A weight that became known after the pass is that of the score in every result.
    sequence_weights = torch.arange(6.0, dtype=torch.float64).unsqueeze(1)
    weighted = scoring_model.result(lambda tensor: tensor, sequence_weights)
    torch.testing.assert_close(weighted.sketches, sequence_weights * expected.sketches)
    torch.testing.assert_close(weighted.products, sequence_weights * expected.products)
    # 7 tokens of the prompt and those of the longest completion of two; the shortest one is empty.
    assert widths == [7 + int(length) for length in lengths[order][::2]]
    assert widths[0] > widths[-1]


def test_chunks_keep_their_padding_where_rotary_frequencies_depend_on_it():
    """LongRoPE turns by other angles in batches of more than 12 tokens; the loss sees all 16 columns, whatever a chunk needs."""
    factors = {"short_factor": [1.0] * 16, "long_factor": [3.0] * 16, "original_max_position_embeddings": 12}
    config = tiny_model("llama").config
    config.rope_parameters = {"rope_type": "longrope", "rope_theta": 1e4, "factor": 2.0} | factors
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).double().eval()
    input_ids, attention_mask, completion_mask = random_batch(batch_size=6)
    expected = score_sketches(model, input_ids, attention_mask, completion_mask)
    weights = completion_mask.double()
    order = weighted_lengths(weights).argsort(descending=True)
    scoring_model = ScoringModel(ScorePass(model), weights, order)
    for rows in order.split(2):
        inputs = {"input_ids": input_ids[rows], "attention_mask": attention_mask[rows]}
        scoring_model(labels=None, fused_lm_head=True, **inputs)
    torch.testing.assert_close(scoring_model.result(lambda tensor: tensor).sketches, expected)


def test_scores_do_not_depend_on_the_amount_of_padding():
    model, batch = float64_model(), random_batch("right")
    before = score_sketches(model, *batch, method="exact")
    zeros = torch.zeros(batch[0].size(0), 4, dtype=torch.long)
    wider = [torch.cat([tensor, zeros], dim=1) for tensor in batch]
    torch.testing.assert_close(score_sketches(model, *wider, method="exact"), before, rtol=1e-6, atol=0)


def test_a_model_that_changes_a_layers_output_in_place_is_scored():
    """OLMo clamps the outputs of its query, key and value projections in place, here about half of them."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
    config = OlmoConfig(num_attention_heads=2, clip_qkv=0.1, pad_token_id=0, **sizes)
    model = OlmoForCausalLM(config).double().eval()
    batch = random_batch()
    truth = reference_scores(model, *batch).square().sum(dim=1)
    assert relative_error(score_sketches(model, *batch, method="exact"), truth) < 1e-10
    model.config.clip_qkv = None
    unclamped = reference_scores(model, *batch).square().sum(dim=1)
    assert relative_error(unclamped, truth) > 1e-3  # else nothing was clamped


def test_a_batch_with_images_keeps_all_columns():
    """A tool may have put images into completions that have no weight, and their features come whole."""
    widths = []

    def score_pass(model_inputs, targets, token_weights, scoped):
        widths.extend([model_inputs["input_ids"].size(1), targets.size(1), token_weights.size(1)])
        return ScoreOutput(torch.zeros(2, 9))

    score_pass.model, score_pass.scoped_parameters = nn.Module(), lambda: None
    input_ids = torch.ones(2, 16, dtype=torch.long)
    scoring_model = ScoringModel(score_pass, torch.zeros(2, 9))
    scoring_model(labels=None, fused_lm_head=True, input_ids=input_ids, pixel_values=torch.zeros(4, 3))
    assert widths == [16, 9, 9]
