"""The scores are those of the loss with vLLM's importance ratio in it, whether one ratio for a sequence or one for a token."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from oblr_trl.scores.reference import reference_scores
from tests.vllm.plans import RATIO_RUNS

RUNS = sorted(RATIO_RUNS)

# Of squared norms from sketches of length 4096: a standard deviation of 0.02 each, 0.05 at worst here.
SKETCH_ERROR = 0.1


def oracle_squared_norms(base, batch, scope, token_weights):
    """Squared norms of the scores in float64, of the model as it was when the batch was generated."""
    model = AutoModelForCausalLM.from_pretrained(base["model_name_or_path"], dtype=torch.float64)
    model.load_state_dict(batch["model"])
    scores = reference_scores(
        model,
        torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1),
        torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1),
        batch["completion_mask"],
        token_weights=token_weights,
        scope=scope,
    )
    return scores.square().sum(dim=1)


def expected_ratio(batch, mode, low, high):
    """TRL's formula, from the recorded log-probabilities."""
    mask = batch["completion_mask"].double()
    difference = (batch["old_per_token_logps"].double() - batch["sampling_per_token_logps"].double()) * mask
    ratio = (difference.sum(dim=1, keepdim=True) if mode.startswith("sequence") else difference).exp()
    if mode.endswith("truncate"):
        return ratio.clamp(low, high)
    return ratio.masked_fill((ratio < low) | (ratio > high), 0.0)


def largest_difference(squared_norms, others):
    """As a fraction of the largest squared norm: a ratio of 0 makes a score vanish, which no relative error would bear."""
    return ((squared_norms.flatten() - others).abs().max() / others.max()).item()


@pytest.mark.parametrize("name", RUNS)
def test_the_scores_of_a_run_are_those_of_the_oracle_with_the_ratio(base, run_named, name):
    scope, method, mode, *averaged = name.split("-")
    batches = run_named(name).batches()
    assert len(batches) == 2

    for batch in batches:
        ratio = batch["importance_sampling_ratio"].double()
        torch.testing.assert_close(ratio, expected_ratio(batch, mode, 0.7, 1.5), rtol=1e-5, atol=1e-6)
        mask = batch["completion_mask"]
        if averaged:
            ratio = (ratio * mask).sum(dim=1, keepdim=True) / mask.sum(dim=1, keepdim=True)
        with_ratio = oracle_squared_norms(base, batch, scope, ratio.expand(mask.shape))
        assert largest_difference(batch["weights"], with_ratio) < (1e-5 if method == "exact" else SKETCH_ERROR)
        assert largest_difference(batch["sketches"].square().sum(dim=-1), with_ratio) < SKETCH_ERROR
        assert largest_difference(batch["weights"], oracle_squared_norms(base, batch, scope, None)) > 2 * SKETCH_ERROR


def test_with_every_default_the_scores_of_a_stale_engine_have_the_ratio_too(base, run_named):
    batches = run_named("stale").batches()
    assert len(batches) == 3

    for batch in batches[1:]:
        ratio = batch["importance_sampling_ratio"].double()
        torch.testing.assert_close(ratio, expected_ratio(batch, "sequence_mask", 0.0, 3.0), rtol=1e-5, atol=1e-6)
        with_ratio = oracle_squared_norms(base, batch, "all", ratio.expand(batch["completion_mask"].shape))
        assert largest_difference(batch["weights"], with_ratio) < SKETCH_ERROR
        assert largest_difference(batch["weights"], oracle_squared_norms(base, batch, "all", None)) > 2 * SKETCH_ERROR
