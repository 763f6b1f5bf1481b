"""Checkpoints: complete or skipped, resumed to the bit, refused with the remedy; and faults that must not reach them."""

import json
import math
import shutil

import pytest
import torch
from trl import GRPOConfig, GRPOTrainer

from oblr_trl import OBLRPOConfig, OBLRPOTrainer
from oblr_trl.checkpoints import last_complete_checkpoint
from oblr_trl.checks.backends import check_backend
from tests.tiny_models import construct, tiny_tokenizer, train


def test_a_tokenizer_beyond_the_models_vocabulary_is_refused(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([f"<extra {i}>" for i in range(20)])
    highest = len(tokenizer) - 1
    with pytest.raises(
        ValueError, match=rf"token id {highest}, but the model's vocabulary has 40 .*resize_token_embeddings"
    ):
        construct(OBLRPOTrainer, OBLRPOConfig, tmp_path, trainer={"processing_class": tokenizer})


def test_special_tokens_beyond_the_models_vocabulary_are_accepted(tmp_path):
    """As the image token of a text model whose tokenizer serves multimodal ones too."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([f"<image {i}>" for i in range(20)], special_tokens=True)
    construct(OBLRPOTrainer, OBLRPOConfig, tmp_path, trainer={"processing_class": tokenizer})


class NotFiniteAtStepThree(OBLRPOTrainer):
    def _generate(self, prompts):
        output = super()._generate(prompts)
        if self.state.global_step == 2:
            self.model.model.norm.register_forward_hook(
                lambda module, inputs, output: output.index_fill(0, torch.tensor([1], device=output.device), math.nan)
            )
        return output


# Weights from the scores themselves, and equal ones beside a sample's scores.
@pytest.mark.parametrize("own", [{}, {"baseline": "leave_one_out", "score_min_prompts": 2}], ids=["weights", "sample"])
def test_a_score_that_is_not_finite_reaches_no_weight_and_no_moving_average(tmp_path, own):
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2} | own
    trainer = construct(NotFiniteAtStepThree, OBLRPOConfig, tmp_path, **options)
    with pytest.raises(ValueError, match=r"The score of step 2 is not finite on process 0.*No weight was changed"):
        trainer.train()

    assert trainer.state.global_step == 2
    saved = json.loads((tmp_path / "checkpoint-2" / "oblrpo_state.json").read_text())
    assert trainer._gradient_snr.averages.state_dict() == saved["gradient_snr"]
    assert trainer._baseline_estimator.state_dict() == saved["prior_strength"]
    assert all(math.isfinite(value) for value in saved["gradient_snr"].values())
    assert all(parameter.isfinite().all() for parameter in trainer.model.parameters())
    assert last_complete_checkpoint(str(tmp_path)) == str(tmp_path / "checkpoint-2")


def test_a_checkpoint_that_was_cut_off_is_skipped(tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 1}
    train(OBLRPOTrainer, OBLRPOConfig, tmp_path, max_steps=2, **saving)
    state = tmp_path / "checkpoint-2" / "trainer_state.json"
    state.write_text(state.read_text()[:100])
    assert last_complete_checkpoint(str(tmp_path)) == str(tmp_path / "checkpoint-1")
    trainer = train(OBLRPOTrainer, OBLRPOConfig, tmp_path, resume_from_checkpoint=True, **saving)
    assert trainer.state.global_step == 3


def test_resuming_without_a_whole_checkpoint_is_refused(tmp_path):
    (tmp_path / "checkpoint-5").mkdir()
    with pytest.raises(ValueError, match="There is no complete checkpoint in `output_dir`"):
        train(OBLRPOTrainer, OBLRPOConfig, tmp_path, resume_from_checkpoint=True)


def test_checkpoints_of_weights_only_are_skipped_and_refused_with_the_remedy(tmp_path, caplog):
    saving = {"save_strategy": "steps", "save_steps": 1}
    train(OBLRPOTrainer, OBLRPOConfig, tmp_path, max_steps=1, **saving)
    train(OBLRPOTrainer, OBLRPOConfig, tmp_path / "weights", max_steps=2, save_only_model=True, **saving)
    newest = (tmp_path / "weights" / "checkpoint-2").rename(tmp_path / "checkpoint-2")

    assert last_complete_checkpoint(str(tmp_path)) == str(tmp_path / "checkpoint-1")
    assert f"Skipping {newest}: it holds weights only, as save_only_model=True writes it." in caplog.messages
    with pytest.raises(ValueError, match=r"weights only, as save_only_model=True .*pass it as the model.*=False"):
        train(OBLRPOTrainer, OBLRPOConfig, tmp_path, resume_from_checkpoint=str(newest), **saving)
    with pytest.raises(ValueError, match="There is no complete checkpoint in `output_dir`"):
        train(OBLRPOTrainer, OBLRPOConfig, tmp_path / "weights", resume_from_checkpoint=True, **saving)


def test_a_checkpoint_of_grpo_is_refused_with_the_remedy(tmp_path):
    train(GRPOTrainer, GRPOConfig, tmp_path, max_steps=1, save_strategy="steps", save_steps=1)
    with pytest.raises(ValueError, match=r"not written by `OBLRPOTrainer`.*resume it with the trainer that wrote it"):
        train(OBLRPOTrainer, OBLRPOConfig, tmp_path, resume_from_checkpoint=True)


def test_the_last_checkpoint_is_that_of_the_highest_step(tmp_path):
    """As text, checkpoint-9 comes after checkpoint-10."""
    train(OBLRPOTrainer, OBLRPOConfig, tmp_path, max_steps=1, save_strategy="steps", save_steps=1)
    for step in (9, 10):
        shutil.copytree(tmp_path / "checkpoint-1", tmp_path / f"checkpoint-{step}")
    assert last_complete_checkpoint(str(tmp_path)) == str(tmp_path / "checkpoint-10")


@pytest.mark.parametrize(("steps_per_generation", "num_iterations"), [(3, 1), (1, 2), (2, 2)])
def test_a_run_resumed_between_two_steps_on_the_same_rollouts_equals_an_uninterrupted_one(
    tmp_path, steps_per_generation, num_iterations
):
    window = {"steps_per_generation": steps_per_generation, "num_iterations": num_iterations, "max_steps": 6}
    window |= {"save_strategy": "steps", "save_steps": 1}
    whole = train(OBLRPOTrainer, OBLRPOConfig, tmp_path, **window)
    for step in (1, 2, 3):
        resumed = train(
            OBLRPOTrainer,
            OBLRPOConfig,
            tmp_path / "resumed",
            resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"),
            **window,
        )
        for name, value in whole.model.state_dict().items():
            assert torch.equal(resumed.model.state_dict()[name], value), f"{name}, resumed at {step}"


def test_rollouts_of_another_number_of_processes_are_refused(tmp_path):
    window = {"steps_per_generation": 3, "save_strategy": "steps", "save_steps": 1}
    train(OBLRPOTrainer, OBLRPOConfig, tmp_path, **window)
    (tmp_path / "checkpoint-2" / "oblrpo_rollouts_0.pt").unlink()
    with pytest.raises(ValueError, match=r"no `oblrpo_rollouts_0.pt`. Resume with as many processes"):
        train(OBLRPOTrainer, OBLRPOConfig, tmp_path, resume_from_checkpoint=str(tmp_path / "checkpoint-2"), **window)


@pytest.mark.parametrize("content", ["", "[]", '{"baseline": ', "\x00\x01"])
def test_an_unreadable_state_is_refused(tmp_path, content):
    train(OBLRPOTrainer, OBLRPOConfig, tmp_path, max_steps=1, save_strategy="steps", save_steps=1)
    (tmp_path / "checkpoint-1" / "oblrpo_state.json").write_text(content)
    with pytest.raises(ValueError, match=r"`oblrpo_state.json` of the checkpoint cannot be read \(.+\)"):
        train(OBLRPOTrainer, OBLRPOConfig, tmp_path, resume_from_checkpoint=True)


def test_the_window_of_rollouts_may_change_where_a_batch_is_used_up_and_is_refused_by_name_elsewhere(tmp_path):
    """As fewer GPUs with more accumulation, which keep the batch."""
    saving = {"save_strategy": "steps", "save_steps": 1}
    train(OBLRPOTrainer, OBLRPOConfig, tmp_path, max_steps=3, steps_per_generation=2, **saving)
    at_the_end, between = (str(tmp_path / f"checkpoint-{step}") for step in (2, 3))
    options = {"steps_per_generation": 4, "num_iterations": 1, "max_steps": 6}

    resumed = train(OBLRPOTrainer, OBLRPOConfig, tmp_path / "new", resume_from_checkpoint=at_the_end, **options)
    assert resumed.state.global_step == 6
    with pytest.raises(ValueError, match=r"after 1 of the 2 training steps on a generation batch .*this run has 4"):
        train(OBLRPOTrainer, OBLRPOConfig, tmp_path / "new", resume_from_checkpoint=between, **options)


@pytest.mark.parametrize("adaptation", ["trust_region", "snr"])
def test_another_way_to_adapt_the_rate_is_refused_by_name(tmp_path, adaptation):
    """The schedule of a checkpoint has another kind, which torch reads with a bare KeyError."""
    train(
        OBLRPOTrainer,
        OBLRPOConfig,
        tmp_path,
        max_steps=1,
        lr_adaptation=adaptation,
        save_strategy="steps",
        save_steps=1,
    )
    with pytest.raises(ValueError, match=rf"written with lr_adaptation='{adaptation}' but this run has 'none'"):
        train(OBLRPOTrainer, OBLRPOConfig, tmp_path, resume_from_checkpoint=True, max_steps=2, lr_adaptation="none")


def test_models_that_are_split_over_gpus_and_apples_gpus_are_refused_with_the_remedy(tmp_path):
    trainer = construct(OBLRPOTrainer, OBLRPOConfig, tmp_path)
    trainer.model.hf_device_map = {"model.embed_tokens": 0, "model.layers": 0}
    check_backend(trainer)
    trainer.model.hf_device_map["lm_head"] = 1
    with pytest.raises(ValueError, match=r"split over \['0', '1'\] .*`accelerate launch`"):
        check_backend(trainer)
    del trainer.model.hf_device_map
    trainer.accelerator.state.device = torch.device("mps")
    try:
        with pytest.raises(ValueError, match=r"Apple's GPUs lack. Remedy: set use_cpu=True"):
            check_backend(trainer)
    finally:
        trainer.accelerator.state.device = torch.device("cpu")
