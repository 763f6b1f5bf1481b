"""Scores in half precision are those of float64, also where the policy has next to no entropy.

Half precision rounds to 2^-9 (bfloat16) or 2^-11 of a number. What is lost must be that fraction of the score, and not of the
far larger rows of the output projection that a low-entropy policy's score is a difference of.
"""

import copy
import functools

import pytest
import torch

from oblr_trl.scores import ScorePass, score_sketches
from oblr_trl.scores.head import head_pass
from tests.low_entropy import PRECISIONS, SCOPES, quantities, sequences, sharpened, trained_policy
from tests.tiny_models import random_batch, tiny_model

TOKENS = sequences(32, torch.Generator().manual_seed(1))


@functools.cache
def policy(other_prob):
    return sharpened(policy(None), TOKENS, other_prob) if other_prob else trained_policy(seed=0)


@pytest.mark.parametrize("other_prob", [3e-2, 4.8e-3, 4.2e-4])
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_low_entropy_policy_has_the_squared_norms_and_the_rho_of_float64(precision, scope, other_prob):
    model = copy.deepcopy(policy(other_prob)).to(PRECISIONS[precision][0])
    truth = quantities(copy.deepcopy(model).double(), TOKENS, None, scope)
    found = quantities(model, TOKENS, precision, scope)
    for method in ("sketch", "exact"):
        assert found[method].dtype == torch.float32
        assert 1 / 1.15 < (found[method] / truth[method]).median() < 1.15, method
    assert 0.9 < found["rho"] / truth["rho"] < 1.1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_heads_gradients_keep_their_precision_where_p_is_near_1(dtype):
    # Margins of 10 nats: 1 - p of about 20 e^-10 = 9e-4, of which float32 is right to 1e-3 and a rounded 1 - p to 2^-8 / 9e-4.
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(20, 32, generator=generator).to(dtype)
    targets = torch.arange(20)
    hidden = (weight.float() * (10 / 32)).to(dtype)  # <h, W_y> is about 10, <h, W_v> about 0 +- 2
    bias = torch.zeros(20)
    projection = torch.randn(20, 8, generator=generator)
    exact = [tensor.double() for tensor in (hidden, weight, bias)]
    truth = head_pass(*exact, targets, [weight.double(), projection.double()])
    found = head_pass(hidden, weight, bias, targets, [weight, projection])
    for expected, got in zip(truth.gradients, found.gradients, strict=True):
        # Logits of 10 are rounded to 2^-5 at worst, so probabilities to 3 %.
        assert ((got - expected).norm(dim=1) / expected.norm(dim=1)).max() < 0.05
    assert ((found.other_probs - truth.other_probs).abs() / truth.other_probs).max() < 0.05


@pytest.mark.parametrize("autocast", [False, True])
def test_small_token_weights_do_not_underflow_in_float16(autocast):
    """`grpo` divides by the length of a completion; float16 has nothing below 6e-8."""
    weights = torch.full((32, 12), 2.0**-12)
    model = policy(4.2e-4)
    truth = ScorePass(model, methods=("exact",))
    found = ScorePass(model if autocast else copy.deepcopy(model).half(), methods=("exact",))
    inputs = {"input_ids": TOKENS, "attention_mask": torch.ones_like(TOKENS)}
    expected = truth(inputs, TOKENS[:, 4:], weights).squared_norms
    with torch.autocast("cpu", dtype=torch.float16, enabled=autocast):
        got = found(inputs, TOKENS[:, 4:], weights).squared_norms
    assert (got / expected).min() > 0.9
    assert (got / expected).max() < 1.1


def test_masked_tokens_with_huge_logits_do_not_spoil_exact_norms():
    """The normaliser of a token that is not scored is never computed: exp(logit) alone would overflow."""
    model = tiny_model("qwen3_untied")
    model.lm_head.weight.data.mul_(1000.0)
    input_ids, attention_mask, completion_mask = random_batch()
    squared_norms = score_sketches(model, input_ids, attention_mask, completion_mask, scope="lm_head", method="exact")
    assert squared_norms.isfinite().all()


def test_float32_and_float64_share_their_projections():
    model, batch = tiny_model(hidden_size=128), random_batch()
    single = score_sketches(model, *batch, sketch_dim=1024)
    torch.testing.assert_close(
        score_sketches(model.double(), *batch, sketch_dim=1024).float(), single, rtol=1e-3, atol=1e-3
    )
