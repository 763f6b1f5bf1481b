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


def test_a_sample_and_the_cheaper_weights_of_all_have_the_ratio_too(base, run_named):
    """TRL's forward for the old log-probabilities gives the weights of the output projection; the sample takes another chunk."""
    run = run_named("sample")
    first, second = run.batches()
    assert run.recorded("num_forwards") == [2, 3]
    assert max(run.recorded("largest_logp_error")) < 1e-5
    assert first["sketches"].shape[:2] == (4, 4)
    assert second["sketches"].shape[:2] == (2, 4)
    ratio = expected_ratio(second, "sequence_truncate", 0.7, 1.5).expand(second["completion_mask"].shape)
    of_head, of_all = (oracle_squared_norms(base, second, scope, ratio) for scope in ("lm_head", "all"))
    assert largest_difference(second["weights"], of_head) < SKETCH_ERROR
    sampled = of_all.view(4, 4)[[0, 2]].flatten()
    assert largest_difference(second["sketches"].square().sum(dim=-1), sampled) < SKETCH_ERROR
    assert (
        largest_difference(second["weights"], oracle_squared_norms(base, second, "lm_head", None)) > 2 * SKETCH_ERROR
    )


def test_with_every_default_the_scores_of_a_stale_engine_have_the_ratio_too(base, run_named):
    batches = run_named("stale").batches()
    assert len(batches) == 3

    for batch in batches[1:]:
        ratio = batch["importance_sampling_ratio"].double()
        torch.testing.assert_close(ratio, expected_ratio(batch, "sequence_mask", 0.0, 3.0), rtol=1e-5, atol=1e-6)
        with_ratio = oracle_squared_norms(base, batch, "all", ratio.expand(batch["completion_mask"].shape))
        assert largest_difference(batch["weights"], with_ratio) < SKETCH_ERROR
        assert largest_difference(batch["weights"], oracle_squared_norms(base, batch, "all", None)) > 2 * SKETCH_ERROR
