"""A language model that sees images is scored with them; a trainable vision tower is trained and left out of the scores."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from PIL import Image
from transformers import LlavaForConditionalGeneration

from oblr_trl import OBLRPOTrainer
from tests.drop_in.expected_advantages import assert_advantages, squared_norms
from tests.drop_in.scripts import G, both_trainers, build, moved, run
from tests.drop_in.vision_models import LLAVA_VISION, freeze, llava, llava_processor, qwen, qwen_processor
from tests.tiny_models import digit_reward


def pictures():
    rng = torch.Generator().manual_seed(0)
    images = [Image.fromarray(torch.randint(256, (20, 20, 3), generator=rng).byte().numpy()) for _ in range(8)]
    question = [{"role": "user", "content": "how many"}]
    return Dataset.from_dict({"prompt": [question] * 8, "image": images})


def image_script(model, **arguments):
    def reward(completions, **kwargs):
        return digit_reward([completion[0]["content"] for completion in completions])

    processor = llava_processor() if isinstance(model, LlavaForConditionalGeneration) else qwen_processor()
    return {
        "model": model,
        "processing_class": processor,
        "train_dataset": pictures(),
        "reward_funcs": reward,
    } | arguments


@both_trainers
@pytest.mark.parametrize(
    "build_model", [lambda: llava(*LLAVA_VISION), lambda: qwen("model.visual")], ids=["LLaVA", "Qwen2.5-VL"]
)
def test_a_language_model_that_sees_images_is_scored_with_them(tmp_path, trainer_class, build_model):
    script = image_script(build_model())
    trainer = run(trainer_class, tmp_path, trainer=script, per_device_train_batch_size=2 * G)
    assert moved(trainer) == {name for name in trainer.start if "language_model" in name or "lm_head" in name}
    assert_advantages(trainer)
    batch = trainer.batches[0]
    swapped = batch | {"pixel_values": batch["pixel_values"].flip(0)}
    ratio = squared_norms(trainer, batch) / squared_norms(trainer, swapped)
    assert (ratio - 1).abs().max() > 1e-3  # else the images had no effect to test


@both_trainers
def test_adapters_in_the_language_model_leave_the_vision_tower_alone(tmp_path, trainer_class):
    lora = LoraConfig(r=4, target_modules=r".*language_model.*(q_proj|down_proj)", init_lora_weights=False)
    trainer = run(trainer_class, tmp_path, trainer=image_script(llava(), peft_config=lora), max_steps=1)
    assert moved(trainer) == {name for name in trainer.start if "lora_" in name}
    assert_advantages(trainer)


@pytest.mark.parametrize(
    ("build_model", "name"),
    [
        (llava, "model.vision_tower"),
        (lambda: llava("model.vision_tower"), "model.multi_modal_projector"),
        (qwen, "model.visual"),
        (lambda: qwen("model.visual.patch_embed", "model.visual.blocks"), "model.visual.merger"),
    ],
    ids=["LLaVA", "LLaVA's projector", "Qwen2.5-VL", "Qwen2.5-VL's merger"],
)
def test_trainable_parameters_that_see_images_are_refused_when_the_trainer_is_built(tmp_path, build_model, name):
    """Their first axis counts images or patches; that it may equal the number of sequences is no proof that it is."""
    with pytest.raises(ValueError, match=rf"`{name}\..*outside the language model.*(?i:freeze).*score_scope"):
        build(OBLRPOTrainer, tmp_path, trainer=image_script(build_model()), score_scope="all")


@pytest.mark.parametrize("build_model", [llava, qwen], ids=["LLaVA", "Qwen2.5-VL"])
def test_what_sees_images_is_trained_and_left_out_of_the_scores(tmp_path, build_model, caplog):
    trainer = run(OBLRPOTrainer, tmp_path, trainer=image_script(build_model()), max_steps=1)
    assert "Left out of the baseline's weights and of the SNR" in caplog.text
    assert any("visual" in name or "vision_tower" in name for name in moved(trainer))
    towers = ("model.visual",) if hasattr(trainer.model.model, "visual") else LLAVA_VISION
    freeze(trainer.model, towers)  # for the oracle
    assert_advantages(trainer)


@pytest.mark.parametrize("build_model", [llava, qwen], ids=["LLaVA", "Qwen2.5-VL"])
def test_the_head_scope_trains_everything_that_sees_images(tmp_path, build_model):
    script = image_script(build_model())
    trainer = run(OBLRPOTrainer, tmp_path, trainer=script, score_scope="lm_head", max_steps=1)
    assert any("visual" in name or "vision_tower" in name for name in moved(trainer))
    assert_advantages(trainer, scope="lm_head")


def test_the_last_blocks_are_those_of_the_language_model(tmp_path):
    """Both towers have two blocks, as InternVL3-1B's have 24 each; the scope is the language model's second one."""
    script = image_script(llava(*LLAVA_VISION))
    options = {"score_scope": "last_k", "score_last_k": 1, "max_steps": 1}
    trainer = run(OBLRPOTrainer, tmp_path, trainer=script, **options)
    freeze(trainer.model, ("model.language_model.embed_tokens", "model.language_model.layers.0"))  # for the oracle
    assert_advantages(trainer)
