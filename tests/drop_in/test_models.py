"""A path, a reference model or an adapter: what trains is what the script asked for, and it is what is scored."""

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, TaskType
from transformers import TrainerCallback

from oblr_trl import OBLRPOTrainer
from tests.drop_in.expected_advantages import assert_advantages
from tests.drop_in.scripts import both_trainers, build, moved, run
from tests.tiny_models import logged, tiny_model, tiny_tokenizer


@pytest.fixture
def saved_model(tmp_path):
    folder = tmp_path / "tiny-model"
    tiny_model(num_layers=2).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


@both_trainers
def test_a_model_may_be_a_path_with_its_loading_options(tmp_path, saved_model, trainer_class):
    trainer = run(
        trainer_class,
        tmp_path,
        trainer={"model": saved_model, "processing_class": None},
        model_init_kwargs={"attn_implementation": "eager", "dtype": "float32"},
        max_steps=1,
    )
    assert trainer.model.config._attn_implementation == "eager"
    loaded, saved = trainer.start["model.embed_tokens.weight"], tiny_model(num_layers=2).model.embed_tokens.weight
    assert torch.equal(loaded, saved)
    assert_advantages(trainer)


@both_trainers
def test_a_reference_model_is_kept_and_synchronised(tmp_path, saved_model, trainer_class):
    trainer = build(
        trainer_class,
        tmp_path,
        trainer={"model": saved_model},
        beta=0.1,
        sync_ref_model=True,
        ref_model_sync_steps=2,
        ref_model_mixup_alpha=0.25,
        max_steps=3,
    )
    policies, references = [], []

    class Snapshots(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            policies.append(model.model.norm.weight.detach().clone())

        def on_step_begin(self, *args, **kwargs):
            references.append(trainer.ref_model.model.norm.weight.detach().clone())

    trainer.add_callback(Snapshots())
    trainer.train()
    assert torch.equal(references[0], references[1])
    torch.testing.assert_close(references[2], 0.25 * policies[1] + 0.75 * references[0])
    assert logged(trainer, "kl")[0] == pytest.approx(0, abs=1e-6)
    assert logged(trainer, "kl")[1] > 1e-6
    assert_advantages(trainer)


@both_trainers
@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_a_peft_config_trains_and_scores_the_adapter_only(tmp_path, trainer_class, beta):
    trainer = run(
        trainer_class,
        tmp_path,
        trainer={"peft_config": LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)},
        beta=beta,
        max_steps=1,
    )
    assert moved(trainer) == {name for name in trainer.start if "lora_" in name}
    assert_advantages(trainer)


@both_trainers
def test_an_adapted_model_keeps_a_frozen_copy_as_reference(tmp_path, trainer_class, recwarn):
    model = tiny_model("qwen3_lora", num_layers=2)
    trainer = run(trainer_class, tmp_path, trainer={"model": model}, beta=0.1, max_steps=3)
    assert moved(trainer) == {name for name in trainer.start if "lora_" in name and ".default." in name}
    assert logged(trainer, "kl")[2] > 1e-6
    assert_advantages(trainer)
    assert not [warning for warning in recwarn if "not called in the scoring pass" in str(warning.message)]


def test_an_adapter_that_cannot_be_scored_is_refused_by_name_with_the_remedy(tmp_path):
    peft_config = PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=3)
    with pytest.raises(ValueError, match=r"PromptEmbedding.*`score_scope`"):
        build(OBLRPOTrainer, tmp_path, trainer={"peft_config": peft_config}, score_scope="all")
