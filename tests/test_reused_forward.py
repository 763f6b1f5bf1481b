"""The scoring pass reuses the old-log-prob forward: it takes the place of the parent's, where there is one.

With vLLM, which always needs one, the same is shown in tests/vllm.
"""

import pytest
import torch
from peft import LoraConfig
from trl import GRPOTrainer

from oblr_trl import OBLRPOConfig, OBLRPOTrainer
from oblr_trl.scores.completion_scorer import CompletionScorer
from oblr_trl.scores.scoring_model import ScoringModel
from tests.recording import Recording
from tests.tiny_models import construct, tiny_model, train

# Two optimizer steps on every generation batch: from the second on the policy is not the one that generated it.
OFF_POLICY = {
    "per_device_train_batch_size": 16,
    "gradient_accumulation_steps": 2,
    "steps_per_generation": 4,
    "max_steps": 2,
}

AVERAGED = {
    "use_vllm": True,
    "vllm_importance_sampling_mode": "token_mask",
    "importance_sampling_level": "sequence",
}


class Counting(Recording):
    """Counts forward passes over whole sequences, and of the first block's attention, while a batch is made."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.forwards = self.blocks = 0

    def _generate_and_score_completions(self, inputs):
        def count(module, args, kwargs):
            self.forwards += not kwargs.get("use_cache", False)

        def count_block(module, args, kwargs, output):
            # Generation alone has a cache.
            self.blocks += kwargs.get("past_key_values") is None

        decoder = self.model.get_decoder()
        handles = [
            decoder.register_forward_pre_hook(count, with_kwargs=True),
            decoder.layers[0].self_attn.register_forward_hook(count_block, with_kwargs=True),
        ]
        output = super()._generate_and_score_completions(inputs)
        for handle in handles:
            handle.remove()
        return output


def reused_and_apart(tmp_path, monkeypatch, **options):
    """Two runs, of which the second takes a forward pass of its own for the scores; their batches agree."""
    reused = train(Counting, OBLRPOConfig, tmp_path, **options)
    monkeypatch.setattr(OBLRPOConfig, "reuses_old_logps_forward", False)
    apart = train(Counting, OBLRPOConfig, tmp_path, **options)
    (ours,), (theirs,) = reused.batches, apart.batches
    mask = theirs["completion_mask"].bool()
    assert mask.any()
    for name in {"old_per_token_logps", "ref_per_token_logps"} & set(theirs):
        torch.testing.assert_close(ours[name][mask], theirs[name][mask])
    torch.testing.assert_close(ours["advantages"], theirs["advantages"])
    return reused, apart


@pytest.mark.parametrize("scope", [{}, {"score_scope": "lm_head"}, {"score_method": "exact"}])
def test_old_log_probabilities_and_scores_come_from_one_forward_pass(tmp_path, monkeypatch, scope):
    reused, apart = reused_and_apart(tmp_path, monkeypatch, **OFF_POLICY, **scope)
    chunks = OFF_POLICY["steps_per_generation"]
    assert (reused.forwards, apart.forwards) == (chunks, 2 * chunks)
    for name, value in apart.model.state_dict().items():
        torch.testing.assert_close(reused.model.state_dict()[name], value, rtol=1e-4, atol=1e-6)


def test_the_reference_model_of_an_adapter_is_not_scored(tmp_path, monkeypatch):
    """With `beta`, TRL asks the same model for log-probabilities again, its adapter switched off."""
    lora = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    reused, _ = reused_and_apart(tmp_path, monkeypatch, peft_config=lora, beta=0.1, **OFF_POLICY)
    (batch,) = reused.batches
    mask = batch["completion_mask"].bool()
    assert not torch.allclose(batch["old_per_token_logps"][mask], batch["ref_per_token_logps"][mask])


def test_the_reused_forward_checkpoints_as_training_does(tmp_path):
    """TRL switches checkpointing off for that forward pass, which has no backward pass of its own."""
    batches = []
    for checkpointing, calls in ((False, 1), (True, 2)):
        options = OFF_POLICY | {"max_steps": 1, "gradient_checkpointing": checkpointing}
        trainer = train(Counting, OBLRPOConfig, tmp_path, **options)
        assert trainer.blocks == calls * OFF_POLICY["steps_per_generation"]
        assert all(block.gradient_checkpointing == checkpointing for block in trainer.model.model.layers)
        batches.extend(trainer.batches)
    torch.testing.assert_close(batches[0]["advantages"], batches[1]["advantages"])


@pytest.mark.parametrize(
    ("options", "reuses"),
    [
        ({}, False),  # the parent has no old log-probabilities
        (OFF_POLICY, True),
        ({"num_iterations": 2}, True),
        ({"use_vllm": True}, True),  # sequence_mask, TRL's default
        ({"use_vllm": True, "vllm_importance_sampling_correction": False}, False),
        ({"use_vllm": True, "vllm_importance_sampling_mode": "token_truncate"}, False),
        ({"use_vllm": True, "vllm_importance_sampling_mode": "token_mask", "score_scope": "lm_head"}, False),
        # differentiates one ratio per sequence, which the ratios of its tokens scale by their mean; `cispo` does not
        (AVERAGED, True),
        (AVERAGED | {"loss_type": "cispo"}, False),
    ],
)
def test_the_configuration_knows_when_the_forward_is_reused(tmp_path, options, reuses):
    options = {"per_device_train_batch_size": 32, "bf16": False, "use_cpu": True, "lr_adaptation": "snr"} | options
    assert OBLRPOConfig(str(tmp_path), **options).reuses_old_logps_forward == reuses


@pytest.mark.parametrize("scope", ["all", "lm_head"])
def test_the_reused_forward_has_the_precision_of_trl(tmp_path, scope):
    """Old log-probabilities are those of TRL under bfloat16, so that the importance ratio starts at 1, not near it.

    The precisions differ by about 1e-3 in the log-probabilities of these tokens, far more than the order of float32 sums does.
    """
    logps = {}
    for name, options in {
        "bf16": {"bf16": True},
        "fp32 head": {"bf16": True, "cast_lm_head_to_fp32": True},
        "fp32": {"bf16": False},
    }.items():
        options = OFF_POLICY | options | {"max_steps": 1, "learning_rate": 0.0, "score_scope": scope}
        trainer = train(Recording, OBLRPOConfig, tmp_path, **options)
        (batch,) = trainer.batches
        with torch.no_grad():
            expected, _, _ = GRPOTrainer._get_per_token_logps_and_entropies(
                trainer,
                trainer.model,
                torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1),
                torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1),
                batch["completion_ids"].size(1),
            )
        mask = batch["completion_mask"].bool()
        logps[name] = batch["old_per_token_logps"][mask]
        torch.testing.assert_close(logps[name], expected[mask], rtol=0, atol=5e-6)
    # Random generation is seeded and in float32: the tokens are the same.
    for name in ("fp32 head", "fp32"):
        assert (logps[name] - logps["bf16"]).abs().max() > 1e-4


def test_only_the_first_forward_pass_of_the_policy_itself_is_replaced(tmp_path):
    """TRL asks a reference model by the same method, in whichever order."""
    trainer = construct(OBLRPOTrainer, OBLRPOConfig, tmp_path, **OFF_POLICY)
    scorer = CompletionScorer(trainer.model, trainer._score_pass, trainer.args, trainer.accelerator, masks_later=False)
    reference, loss_mask = tiny_model("qwen3"), torch.ones(2, 3)
    assert scorer.in_place_of(reference, loss_mask) is reference
    assert isinstance(scorer.in_place_of(trainer.model, loss_mask), ScoringModel)
    assert scorer.in_place_of(trainer.model, loss_mask) is trainer.model
    later = CompletionScorer(trainer.model, trainer._score_pass, trainer.args, trainer.accelerator, masks_later=True)
    assert later.in_place_of(trainer.model, loss_mask) is trainer.model
