"""Policies over training for `benchmarks.snr`: snapshots of one real run of a recipe, and the gradients that its steps saw.

The run is the training script's own, with a trainer that keeps what it hands to the signal and the noise.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from oblr_trl import OBLRPOTrainer
from oblr_trl.data.prompt_sets import load_prompts
from oblr_trl.data.rewards import load_rewards
from oblr_trl.gradient_snr import per_prompt_gradients
from oblr_trl.scripts.train import parse

Policy = tuple[PreTrainedModel, PreTrainedTokenizerBase]

_RECORD = "snapshots.json"
_GRADIENTS = "step_gradients.pt"


@dataclass(frozen=True)
class RunSettings:
    """
    What determines a run.

    Args:
        recipe (`str`): Path of the recipe, whose settings are kept but for evaluation and reports.
        model (`str`): Directory of the start model.
        steps (`tuple[int, ...]`): Optimizer steps after which a snapshot is taken, ascending; the run ends with the last.
        seed (`int`): Seed of the run.
    """

    recipe: str
    model: str
    steps: tuple[int, ...]
    seed: int = 0


@dataclass
class TrainingRun:
    """
    A finished run.

    Args:
        policies (`dict[int, str]`): Directory of the policy by optimizer step; 0 is the start model.
        gradients (`torch.Tensor` of shape `(num_steps, num_prompts, sketch_dim)`): Sketches of the per-prompt gradients of
            every step, as the trainer computed them.
    """

    policies: dict[int, str]
    gradients: Tensor


def load_policy(path: str) -> Policy:
    """Model and tokenizer of a local directory, in float32."""
    if not (Path(path) / "config.json").is_file():
        raise ValueError(
            f"`model` is {path!r}, where there is no model. Make the start model with `python -m examples.tiny_qwen3`."
        )
    tokenizer = AutoTokenizer.from_pretrained(path)
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval(), tokenizer


class _RecordingTrainer(OBLRPOTrainer):
    """[`OBLRPOTrainer`] that also keeps the per-prompt gradients of every step."""

    def __init__(self, *args, **kwargs):
        self.step_gradients: list[Tensor] = []
        super().__init__(*args, **kwargs)

    def _adapt_learning_rate(self, sketches, advantages):
        self.step_gradients.append(per_prompt_gradients(sketches, advantages))
        super()._adapt_learning_rate(sketches, advantages)


class _Snapshots(TrainerCallback):
    """Saves the weights after the wanted steps."""

    def __init__(self, directories: dict[int, str]) -> None:
        self.directories = directories

    def on_step_end(self, args, state, control, **kwargs):
        directory = self.directories.get(state.global_step)
        if directory is not None:
            kwargs["model"].save_pretrained(directory)
            kwargs["processing_class"].save_pretrained(directory)


def training_run(settings: RunSettings, directory: str) -> TrainingRun:
    """
    Train and take snapshots, unless `directory` holds a run of the same settings already.

    Args:
        settings ([`RunSettings`]): What to run.
        directory (`str`): Where snapshots and gradients go.
    """
    steps = {step: str(Path(directory) / f"step-{step}") for step in settings.steps if step > 0}
    record = Path(directory) / _RECORD
    # The start model's own record tells one start model from another at the same place.
    start = Path(settings.model) / "start_model.json"
    wanted = asdict(settings) | {"steps": list(settings.steps)}
    wanted["start_model"] = json.loads(start.read_text())["settings"] if start.is_file() else None
    if not record.is_file() or json.loads(record.read_text()) != wanted:
        record.unlink(missing_ok=True)
        gradients = _train(settings, directory, steps)
        torch.save(gradients, Path(directory) / _GRADIENTS)
        record.write_text(json.dumps(wanted))  # last: an interrupted run leaves nothing that looks complete
    gradients = torch.load(Path(directory) / _GRADIENTS, weights_only=True)
    return TrainingRun({0: settings.model} | steps, gradients)


def _train(settings: RunSettings, directory: str, snapshots: dict[int, str]) -> Tensor:
    tokens = ["--config", settings.recipe, "--model_name_or_path", settings.model, "--output_dir", directory]
    tokens += ["--max_steps", str(max(settings.steps)), "--seed", str(settings.seed), "--eval_strategy", "no"]
    tokens += ["--eval_on_start", "false", "--report_to", "none", "--save_strategy", "no", "--disable_tqdm", "true"]
    _, training_args, model_args, data_args, reward_args = parse(tokens)
    prompts = load_prompts(data_args, with_test=False)
    rewards = load_rewards(
        reward_args,
        data_args,
        columns=prompts["train"].column_names,
        max_completion_length=training_args.max_completion_length,
    )
    training_args.model_init_kwargs = {
        "dtype": model_args.dtype,
        **cast(dict[str, Any], training_args.model_init_kwargs or {}),
    }
    trainer = _RecordingTrainer(
        model=model_args.model_name_or_path,
        reward_funcs=list(rewards),
        args=training_args,
        train_dataset=prompts["train"],
        callbacks=[_Snapshots(snapshots)],
    )
    trainer.train()
    return torch.stack(trainer.step_gradients)
