"""What training and evaluation share: a training recipe's prompts and endings, benchmarks as `eval_dataset`."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from trl import GRPOConfig

from oblr_trl.data.answers import as_latex
from oblr_trl.data.prompt_sets import DataArguments, load_prompts
from oblr_trl.data.recipe_files import check_keys, read_recipe_file
from oblr_trl.evaluation.arguments import EvaluationArguments
from oblr_trl.evaluation.benchmarks import load_benchmarks


def training_prompt_settings(recipe: str | Path) -> dict[str, Any]:
    """
    The settings of a recipe of `oblr_trl.scripts.train` that shape a prompt or end a completion, as keys of an
    evaluation recipe: `prompt_template`, `conversational`, `system_prompt`, `chat_template_kwargs`, `stop_token_ids`
    and `max_new_tokens`.

    Raises:
        `ValueError`: a file that is no training recipe, or a setting that shapes completions as no evaluation can.
    """
    settings = read_recipe_file(recipe, flag="like")
    if "benchmarks" in settings:
        raise ValueError(f"`like` is {str(recipe)!r}, which is a recipe of an evaluation: name one of a training.")
    names = {field.name for field in dataclasses.fields(DataArguments)}
    data_args = DataArguments(**{name: value for name, value in settings.items() if name in names})
    generation = _as_dict(settings.get("generation_kwargs"))
    ends = [generation.pop(name, None) or [] for name in ("stop_token_ids", "eos_token_id")]
    stop_token_ids = [token for end in ends for token in ([end] if isinstance(end, int) else end)]
    unknown = [f"generation_kwargs.{name}" for name in generation]
    unknown += ["vllm_structured_outputs_regex"] if settings.get("vllm_structured_outputs_regex") else []
    if unknown:
        raise ValueError(
            f"`like` is {str(recipe)!r}, whose `{unknown[0]}` shapes completions as the evaluation cannot: leave "
            "`like` out, and set `prompt_template`, `conversational`, `system_prompt`, `chat_template_kwargs` and "
            "`stop_token_ids` instead."
        )
    return {
        "prompt_template": data_args.prompt_template,
        "conversational": _is_conversational(data_args),
        "system_prompt": data_args.system_prompt,
        "chat_template_kwargs": _as_dict(settings.get("chat_template_kwargs")) or None,
        "stop_token_ids": stop_token_ids or None,
        "max_new_tokens": settings.get("max_completion_length", GRPOConfig.max_completion_length),
    }


def benchmark_datasets(
    recipe: str | Path,
    *,
    only: Sequence[str] | None = None,
    files: Mapping[str, str] | None = None,
    like: str | Path | None = None,
) -> dict[str, Dataset]:
    """
    The benchmarks of an evaluation recipe as `eval_dataset` of a trainer: columns `prompt`, `solution`, `benchmark`.

    The prompts are the evaluation's; the answers are between dollar signs, as `accuracy_reward` needs them. TRL logs a
    row for each, all with the key `eval_reward`; [`~evaluation.rewards.math_accuracy`] adds a key by benchmark, e.g.
    `eval_accuracy/gsm8k`.

    Args:
        recipe (`str` or `Path`):
            For example `"recipes/evaluation/math.yaml"`.
        only (`Sequence[str]`, *optional*):
            Names of the benchmarks wanted. Defaults to all.
        files (`dict[str, str]`, *optional*):
            Local files with the same columns in place of datasets, by the benchmark's name.
        like (`str` or `Path`, *optional*):
            Training recipe whose prompts are used instead of the evaluation's.
    """
    settings = read_recipe_file(recipe, flag="recipe")
    check_keys(settings, {field.name for field in dataclasses.fields(EvaluationArguments)})
    settings |= {"only": only, "files": files}
    for generation in (
        "temperature",
        "num_completions",
        "pass_at",
    ):  # of evaluations, whose completions are the trainer's here
        settings.pop(generation, None)
    if like is not None:
        settings |= training_prompt_settings(like)
    datasets = {}
    for problem_set in load_benchmarks(EvaluationArguments(**settings)):
        rows = [
            {"prompt": problem["prompt"], "solution": as_latex(problem["answer"]), "benchmark": problem_set.name}
            for problem in problem_set.problems
        ]
        datasets[problem_set.name] = Dataset.from_list(rows)
    return datasets


def _is_conversational(data_args: DataArguments) -> bool:
    if data_args.conversational or data_args.system_prompt is not None:  # which is refused for text
        return True
    if data_args.task is not None or data_args.prompt_template is not None:  # which is refused for conversations
        return False
    return isinstance(load_prompts(data_args, with_test=False)["train"][0]["prompt"], list)


def _as_dict(value: Any) -> dict[str, Any]:
    """A copy; TRL takes JSON too."""
    return dict(json.loads(value) if isinstance(value, str) else value or {})
