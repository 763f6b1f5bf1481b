"""Train from a YAML recipe, by OBLR-PO or by its control, TRL's own GRPO.

    accelerate launch -m oblr_trl.scripts.train --config recipes/tiny-Qwen3/oblrpo/config_chain_sum.yaml

Differs from `trl grpo` in that parsing is strict (a misspelt key fails and names the nearest one), and that data and
rewards are checked before the model is loaded. Any key of the recipe can be given on the command line too.
"""

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from trl import GRPOConfig, GRPOTrainer, ModelConfig, get_peft_config, get_quantization_config

from oblr_trl.checkpoints import last_complete_checkpoint, refuse_for_grpo
from oblr_trl.data.prompt_sets import DataArguments, load_prompts
from oblr_trl.data.recipe_files import RecipeParser, command_line, parse_or_exit
from oblr_trl.data.rewards import RewardArguments, load_rewards
from oblr_trl.data.sources import check_model
from oblr_trl.oblrpo_config import OBLRPOConfig
from oblr_trl.oblrpo_trainer import OBLRPOTrainer
from oblr_trl.runs.diagnosis import DiagnosisCallback

TRAINERS: dict[str, tuple[type[GRPOConfig], type[GRPOTrainer]]] = {
    "oblrpo": (OBLRPOConfig, OBLRPOTrainer),
    "grpo": (GRPOConfig, GRPOTrainer),
}


@dataclass
class TrainScriptArguments:
    """Arguments of the training script itself. Fields are documented by their `help`."""

    trainer: str = field(
        default="oblrpo", metadata={"help": "`oblrpo`, or `grpo` for TRL's own trainer.", "choices": list(TRAINERS)}
    )


def main(
    script_args: TrainScriptArguments,
    training_args: GRPOConfig,
    model_args: ModelConfig,
    data_args: DataArguments,
    reward_args: RewardArguments,
) -> GRPOTrainer:
    """Train as the arguments say, save the model and the trainer's state in `output_dir`, and return the trainer."""
    evaluates = training_args.eval_strategy != "no"
    assert training_args.max_completion_length is not None
    prompts = load_prompts(data_args, with_test=evaluates)
    reward_funcs = load_rewards(
        reward_args,
        data_args,
        columns=prompts["train"].column_names,
        max_completion_length=training_args.max_completion_length,
    )
    model = check_model(model_args.model_name_or_path, revision=model_args.model_revision)
    checkpoint = _checkpoint_to_resume(training_args)
    if checkpoint is not None and script_args.trainer == "grpo":
        refuse_for_grpo(checkpoint)

    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **cast(dict[str, Any], training_args.model_init_kwargs or {}),
    }
    trainer = TRAINERS[script_args.trainer][1](
        model=model,
        reward_funcs=list(reward_funcs),
        args=training_args,
        train_dataset=prompts["train"],
        eval_dataset=prompts["test"] if evaluates else None,
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
        callbacks=[DiagnosisCallback()],
    )
    trainer.train(resume_from_checkpoint=checkpoint)  # evaluates after the last step too, whatever `eval_steps` is
    trainer.save_model(training_args.output_dir)
    trainer.save_state()
    if training_args.push_to_hub:
        trainer.push_to_hub(dataset_name=data_args.dataset_name)
    trainer.accelerator.end_training()  # what `Trainer.end` of newer transformers does
    return trainer


def _checkpoint_to_resume(training_args: GRPOConfig) -> str | None:
    """The checkpoint directory; `true` means the last complete one in `output_dir`."""
    wanted = str(training_args.resume_from_checkpoint).lower()
    if wanted in ("none", "false"):
        return None
    last = last_complete_checkpoint(str(training_args.output_dir))
    checkpoint = last if wanted == "true" else training_args.resume_from_checkpoint
    if checkpoint is None or not os.path.isdir(checkpoint):
        where = f"{training_args.output_dir!r} holds no complete checkpoint" if wanted == "true" else "there is none"
        raise ValueError(
            f"`resume_from_checkpoint` is {training_args.resume_from_checkpoint}, but {where}: leave it out."
        )
    return checkpoint


def make_parser(trainer: str = "oblrpo") -> RecipeParser:
    """Parser of the training script; its keys depend on the trainer, `"oblrpo"` or `"grpo"`."""
    return RecipeParser(
        (TrainScriptArguments, TRAINERS[trainer][0], ModelConfig, DataArguments, RewardArguments),
        module="oblr_trl.scripts.train",
        description="Train from a YAML recipe, by OBLR-PO or by its control, TRL's own GRPO.",
        example="--config recipes/tiny-Qwen3/oblrpo/config_chain_sum.yaml --max_steps 10",
    )


def parse(argv: Sequence[str] | None = None) -> tuple:
    """
    Parse a recipe and the command line, strictly, into the arguments of [`main`].

    Raises:
        `ValueError`: For a recipe that cannot be read, an unknown key, or a key that the trainer does not have.
    """
    tokens, settings = command_line(argv)
    trainer = settings.get("trainer", "oblrpo")
    if trainer not in TRAINERS:
        raise ValueError(f"`trainer` is {trainer!r}; use one of {', '.join(TRAINERS)}.")
    own = {f.name for f in dataclasses.fields(OBLRPOConfig)} - {f.name for f in dataclasses.fields(GRPOConfig)}
    for key in settings:
        if trainer == "grpo" and key in own:
            raise ValueError(
                f"`{key}` belongs to OBLR-PO, but `trainer` is {trainer!r}: remove it, or set trainer: oblrpo."
            )
    return make_parser(trainer).parse_strictly(tokens, settings)


if __name__ == "__main__":
    main(*parse_or_exit(parse, "train"))
