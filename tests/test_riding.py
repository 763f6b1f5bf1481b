"""The scoring pass takes the place of the parent's forward pass for the old log-probabilities, where there is one.

With vLLM, which always needs one, the same is shown in tests/vllm.
"""

import pytest
import torch
from peft import LoraConfig

from oblr_trl import OBLRPOConfig, OBLRPOTrainer
from oblr_trl.scores.score_pass import ScorePass
from tests.tiny_models import random_batch, tiny_model, train

# Two optimizer steps on every generation batch: from the second on the policy is not the one that generated it.
OFF_POLICY = {
    "per_device_train_batch_size": 16,
    "gradient_accumulation_steps": 2,
    "steps_per_generation": 4,
    "max_steps": 2,
}


class _Counting(OBLRPOTrainer):
    """Counts forward passes over whole sequences while a batch is made, and keeps the batch."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.forwards = 0
        self.batches = []

    def _generate_and_score_completions(self, inputs):
        def count(module, args, kwargs):
            self.forwards += not kwargs.get("use_cache", False)

        handle = self.model.get_decoder().register_forward_pre_hook(count, with_kwargs=True)
        output = super()._generate_and_score_completions(inputs)
        handle.remove()
        self.batches.append(output)
        return output


@pytest.mark.parametrize("scope", [{}, {"score_scope": "lm_head"}, {"score_method": "exact"}])
def test_old_log_probabilities_and_scores_come_from_one_forward_pass(tmp_path, monkeypatch, scope):
    riding = train(_Counting, OBLRPOConfig, tmp_path, **OFF_POLICY, **scope)
    monkeypatch.setattr(OBLRPOConfig, "scores_ride", False)
    apart = train(_Counting, OBLRPOConfig, tmp_path, **OFF_POLICY, **scope)

    chunks = OFF_POLICY["steps_per_generation"]
    assert riding.forwards == chunks
    assert apart.forwards == 2 * chunks
    (ours,), (theirs,) = riding.batches, apart.batches
    mask = theirs["completion_mask"].bool()
    assert mask.any()
    torch.testing.assert_close(ours["old_per_token_logps"][mask], theirs["old_per_token_logps"][mask])
    torch.testing.assert_close(ours["advantages"], theirs["advantages"])
    for name, value in apart.model.state_dict().items():
        torch.testing.assert_close(riding.model.state_dict()[name], value, rtol=1e-4, atol=1e-6)


def test_riding_checkpoints_as_training_does(tmp_path):
    """TRL switches checkpointing off for that forward pass, which has no backward pass of its own."""

    class CountingBlocks(_Counting):
        blocks = 0

        def _get_per_token_logps_and_entropies(self, model, *args, **kwargs):
            def count(*_):
                type(self).blocks += 1

            handle = self.model.model.layers[0].self_attn.register_forward_hook(count)
            output = super()._get_per_token_logps_and_entropies(model, *args, **kwargs)
            handle.remove()
            return output

    batches = []
    for checkpointing, calls in ((False, 1), (True, 2)):
        CountingBlocks.blocks = 0
        one_step = OFF_POLICY | {"max_steps": 1, "gradient_checkpointing": checkpointing}
        trainer = train(CountingBlocks, OBLRPOConfig, tmp_path, **one_step)
        training = OFF_POLICY["gradient_accumulation_steps"]  # recomputed after the method has returned
        assert CountingBlocks.blocks == calls * OFF_POLICY["steps_per_generation"] + training
        assert all(block.gradient_checkpointing == checkpointing for block in trainer.model.model.layers)
        batches.append(trainer.batches[0])
    torch.testing.assert_close(batches[0]["advantages"], batches[1]["advantages"])


def test_the_reference_model_of_an_adapter_is_not_scored(tmp_path, monkeypatch):
    """With `beta`, TRL asks the same model for log-probabilities again, its adapter switched off."""
    options = OFF_POLICY | {"beta": 0.1}
    lora = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    riding = train(_Counting, OBLRPOConfig, tmp_path, peft_config=lora, **options)
    monkeypatch.setattr(OBLRPOConfig, "scores_ride", False)
    apart = train(_Counting, OBLRPOConfig, tmp_path, peft_config=lora, **options)

    (ours,), (theirs,) = riding.batches, apart.batches
    mask = theirs["completion_mask"].bool()
    for name in ("old_per_token_logps", "ref_per_token_logps"):
        torch.testing.assert_close(ours[name][mask], theirs[name][mask])
    assert not torch.allclose(ours["old_per_token_logps"][mask], ours["ref_per_token_logps"][mask])
    torch.testing.assert_close(ours["advantages"], theirs["advantages"])


def test_weights_that_come_after_the_pass_are_those_of_the_pass():
    """Sketches are linear in the token weights: factors with later weights equal a pass that knew them."""
    input_ids, attention_mask, completion_mask = random_batch()
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
    targets = input_ids[:, -completion_mask.size(1) :]
    weights = completion_mask * torch.rand(completion_mask.shape)
    for architecture in ("qwen3", "qwen3_untied"):
        model = tiny_model(architecture)
        settings = {"scope": "lm_head", "sketch_dim": 256}
        direct = ScorePass(model, **settings)(inputs, targets, weights)
        deferred = ScorePass(model, defers_token_weights=True, **settings)(inputs, targets, completion_mask.float())

        assert deferred.sketches is None
        later = torch.where(completion_mask.bool(), weights, 7.0)  # what stands at masked tokens must not matter
        torch.testing.assert_close(deferred.head_factors.sketch(later), direct.sketches)
        torch.testing.assert_close(
            deferred.log_probs[completion_mask.bool()], direct.log_probs[completion_mask.bool()]
        )


def test_only_the_output_projections_sketch_can_wait_for_token_weights():
    for settings in ({"scope": "all"}, {"scope": "lm_head", "methods": ("exact",)}):
        with pytest.raises(ValueError, match="`defers_token_weights` needs"):
            ScorePass(tiny_model(), defers_token_weights=True, **settings)


@pytest.mark.parametrize(
    ("options", "rides", "defers"),
    [
        ({}, False, False),  # the parent has no old log-probabilities
        (OFF_POLICY, True, False),
        ({"num_iterations": 2}, True, False),
        ({"use_vllm": True}, True, False),  # sequence_mask, TRL's default
        ({"use_vllm": True, "vllm_importance_sampling_correction": False}, False, False),
        ({"use_vllm": True, "vllm_importance_sampling_mode": "token_truncate"}, False, False),
        ({"use_vllm": True, "vllm_importance_sampling_mode": "token_mask", "score_scope": "lm_head"}, True, True),
    ],
)
def test_the_configuration_knows_when_the_pass_rides(tmp_path, options, rides, defers):
    config = OBLRPOConfig(str(tmp_path), bf16=False, use_cpu=True, **options)
    assert (config.scores_ride, config.defers_token_weights) == (rides, defers)
