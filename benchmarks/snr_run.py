"""Policies over training for `benchmarks.snr`: snapshots of one run of a recipe, and its gradients."""

import json
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.completion_pool import kept
from oblr_trl import OBLRPOConfig, OBLRPOTrainer
from oblr_trl.gradient_snr import per_prompt_gradients
from oblr_trl.scripts import train


def load_policy(path: str) -> tuple[Any, Any]:
    """Model and tokenizer of a local directory, in float32."""
    if not (Path(path) / "config.json").is_file():
        raise ValueError(
            f"`model` is {path!r}, where there is no model. Make the start model with `python -m examples.tiny_qwen3`."
        )
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval(), AutoTokenizer.from_pretrained(path)


class _RecordingTrainer(OBLRPOTrainer):
    """[`OBLRPOTrainer`] that also keeps the per-prompt gradients of every step."""

    def __init__(self, *args, **kwargs):
        self.step_gradients: list[Tensor] = []
        super().__init__(*args, **kwargs)

    def _adapt_learning_rate(self, sketches, advantages, *args):
        self.step_gradients.append(per_prompt_gradients(sketches, advantages))
        super()._adapt_learning_rate(sketches, advantages, *args)


def training_run(recipe: str, model: str, steps: list[int], directory: str) -> tuple[dict[int, str], Tensor]:
    """
    Train until the last of `steps`, unless `directory` holds a run of the same settings already.

    Returns:
        The directory of the policy by optimizer step, 0 being the start model, and sketches of the per-prompt
        gradients of every step as the trainer computed them, `torch.Tensor` of shape `(num_steps, num_prompts,
        sketch_dim)`.
    """
    # The start model's own record tells one start model from another at the same place.
    start = Path(model) / "start_model.json"
    settings: dict[str, Any] = {"recipe": recipe, "model": model, "last_step": max(steps)}
    settings["start_model"] = json.loads(start.read_text())["settings"] if start.is_file() else None
    path = Path(directory) / "step_gradients.pt"
    gradients = kept(path, settings, lambda: _train(recipe, model, max(steps), directory))
    return {0: model} | {step: f"{directory}/checkpoint-{step}" for step in steps if step > 0}, gradients


def _train(recipe: str, model: str, num_steps: int, directory: str) -> Tensor:
    options = {"config": recipe, "model_name_or_path": model, "output_dir": directory, "max_steps": num_steps}
    options |= {"save_strategy": "steps", "save_steps": 1, "save_only_model": "true", "disable_tqdm": "true"}
    options |= {"eval_strategy": "no", "eval_on_start": "false", "report_to": "none"}
    arguments = train.parse([token for name, value in options.items() for token in (f"--{name}", str(value))])
    with mock.patch.dict(train.TRAINERS, oblrpo=(OBLRPOConfig, _RecordingTrainer)):
        trainer: Any = train.main(*arguments)
    return torch.stack(trainer.step_gradients)
