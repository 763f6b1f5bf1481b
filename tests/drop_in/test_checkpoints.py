"""A run that stops and resumes equals one that does not, and a checkpoint's card cites the method that trained it."""

import pytest
import torch
from transformers import TrainerCallback
from trl import GRPOTrainer

from oblr_trl import OBLRPOTrainer
from oblr_trl.gradient_snr import gradient_moments, per_prompt_gradients, rho
from tests.drop_in.expected_advantages import full_scores
from tests.drop_in.scripts import G, both_trainers, build, run
from tests.tiny_models import logged


@both_trainers
def test_training_resumes_from_its_last_checkpoint(tmp_path, trainer_class):
    options = {"save_strategy": "steps", "save_steps": 2, "save_total_limit": 1}
    whole = run(trainer_class, tmp_path / "whole", max_steps=4, **options)
    first = build(trainer_class, tmp_path / "cut", max_steps=4, **options)

    class Interrupt(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            control.should_training_stop = True

    first.add_callback(Interrupt())
    first.train()
    assert first.state.global_step == 2
    second = build(trainer_class, tmp_path / "cut", max_steps=4, **options)
    second.train(resume_from_checkpoint=True)
    assert second.state.global_step == 4
    for a, b in zip(whole.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert logged(second, "learning_rate") == logged(whole, "learning_rate")


def test_a_trainer_resumes_itself_as_a_fresh_one_would(tmp_path):
    """A notebook's second `train`, at the very step the first one reached."""
    options = {
        "save_strategy": "steps",
        "save_steps": 1,
        "snr_ema_decay": 0.0,
        "snr_min_multiplier": 0.0,
        "max_steps": 2,
    }
    used = build(OBLRPOTrainer, tmp_path, **options)
    used.train()
    checkpoint = str(tmp_path / "checkpoint-1")
    fresh = build(OBLRPOTrainer, tmp_path, **options)
    fresh.train(resume_from_checkpoint=checkpoint)
    used.train(resume_from_checkpoint=checkpoint)
    for name in ("gradient_snr/rho", "gradient_snr/signal", "learning_rate", "loss"):
        assert logged(used, name) == logged(fresh, name), name


def test_a_second_training_run_has_steps_of_its_own(tmp_path):
    """rho of the second run is that of its own 4 prompts; the head's parameters fit a sketch without projection."""
    trainer = build(
        OBLRPOTrainer, tmp_path, score_scope="lm_head", snr_ema_decay=0.0, snr_min_multiplier=0.0, max_steps=1
    )
    for batch_index in range(2):
        trainer.train()
        batch = trainer.batches[batch_index]
        advantages = batch["advantages"].view(-1, G)
        scores = full_scores(trainer, batch, scope="lm_head").view(*advantages.shape, -1)
        moments = gradient_moments(per_prompt_gradients(scores, advantages))
        assert logged(trainer, "gradient_snr/rho") == pytest.approx([rho(*moments, 4)], rel=1e-3)


@both_trainers
def test_checkpoints_carry_a_card_that_cites_the_method(tmp_path, trainer_class):
    trainer = run(trainer_class, tmp_path, save_strategy="steps", save_steps=2, push_to_hub=False)
    paper, name = ("2402.03300", "GRPO") if trainer_class is GRPOTrainer else ("2511.23310", "OBLR-PO")
    card = tmp_path / "README.md"
    saved_with_the_checkpoint = card.read_text()
    card.unlink()
    trainer.create_model_card(model_name="tiny", dataset_name="sums")
    for text in (saved_with_the_checkpoint, card.read_text()):
        assert f"This model was trained with {name}" in text
        assert [number for number in ("2402.03300", "2511.23310") if number in text] == [paper]
