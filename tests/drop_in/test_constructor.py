"""No argument differs: every one of GRPO's constructor is in a script here, and those with defaults may be left out."""

import inspect

from trl import GRPOTrainer

from tests.drop_in.scripts import CONFIGS, both_trainers
from tests.tiny_models import digit_reward, prompts, tiny_model, tiny_tokenizer

# Each is passed in a script of this folder; the exception is explained.
COVERED_ARGUMENTS = {
    "model",
    "reward_funcs",
    "args",
    "train_dataset",
    "eval_dataset",
    "processing_class",
    "reward_processing_classes",
    "callbacks",
    "optimizers",
    "quantization_config",  # needs bitsandbytes and a GPU; the layers it leaves trainable are those of `peft_config`
    "peft_config",
    "tools",
    "rollout_func",
    "environment_factory",
}


def test_every_argument_of_the_constructor_is_in_a_script():
    arguments = set(inspect.signature(GRPOTrainer.__init__).parameters) - {"self"}
    assert arguments == COVERED_ARGUMENTS


@both_trainers
def test_the_shortest_script_needs_neither_a_configuration_nor_more_than_two_names(
    tmp_path, monkeypatch, trainer_class
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: True)  # TRL's default
    model = tiny_model(num_layers=2)
    model.config._name_or_path = "someone/tiny-model"
    trainer = trainer_class(
        model=model, reward_funcs=digit_reward, train_dataset=prompts(), processing_class=tiny_tokenizer()
    )
    assert type(trainer.args) is CONFIGS[trainer_class]
    assert trainer.args.output_dir == f"tiny-model-{'GRPO' if trainer_class is GRPOTrainer else 'OBLRPO'}"
    if trainer_class is not GRPOTrainer:  # TRL's default batch would be one prompt, of which there is no SNR
        assert trainer.args.prompts_per_step == 16
