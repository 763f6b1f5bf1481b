"""Evaluate a model on benchmarks with verifiable answers: avg@k and pass@k with intervals, in Markdown and JSON.

    python -m oblr_trl.scripts.evaluate --config recipes/evaluation/math.yaml --model_name_or_path Qwen/Qwen3-4B-Base

A trained model is evaluated with the prompts, stop tokens and length of its recipe by `--like RECIPE`. A killed
evaluation resumes when the same command is given again. Any key of the recipe can be given on the command line too, a
misspelt one fails and names the nearest. All data are read and checked before the model is loaded. `python -m
oblr_trl.scripts.compare LABEL=DIR LABEL=DIR` compares evaluated models.
"""

import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from oblr_trl.data import recipe_files
from oblr_trl.data.sources import check_model
from oblr_trl.evaluation import records
from oblr_trl.evaluation.arguments import EvaluationArguments
from oblr_trl.evaluation.benchmarks import load_benchmarks
from oblr_trl.evaluation.generation import choose_backend, model_answers
from oblr_trl.evaluation.results import RESULTS_JSON, format_results, summarize
from oblr_trl.evaluation.training import training_prompt_settings

RESULTS_MARKDOWN = "results.md"
# What a continued evaluation may change: keys that are recorded by their effect, and keys without effect on a record.
FREE = {"benchmarks", "only", "files", "num_completions", "pass_at", "like", "backend", "completions_file"}
FREE |= {"output_dir", "vllm_gpu_memory_utilization", "disable_tqdm"}
# All that counts where completions are read from a file.
GRADING = {
    "prompt_template",
    "conversational",
    "system_prompt",
    "chat_template_kwargs",
    "unparsable_answers",
    "answer_format",
}


def main(args: EvaluationArguments) -> dict[str, Any]:
    """Evaluate, write records and tables into `output_dir`, and return what `results.json` holds."""
    problem_sets = load_benchmarks(args)
    name = _check_source(args)
    output_dir = Path(args.output_dir or Path("runs/evaluation") / Path(name).name)
    recorded = GRADING if args.completions_file is not None else set(vars(args)) - FREE
    settings = {key: value for key, value in vars(args).items() if key in recorded}
    for problem_set in problem_sets:
        settings[f"benchmarks.{problem_set.name}.num_completions"] = problem_set.num_completions
        settings[f"benchmarks.{problem_set.name}.problems"] = problem_set.fingerprint
    if args.completions_file is not None:
        answers, settings["completions"] = records.recorded_answers(Path(name), problem_sets)
    else:
        settings |= {"backend": choose_backend(args.backend), "weights": records.weights_fingerprint(name)}
        answers = model_answers(args, settings["backend"], problem_sets)
    records.record_settings(output_dir, settings)
    graded = [
        records.evaluate_benchmark(problem_set, answers, output_dir / f"{problem_set.name}.jsonl", args)
        for problem_set in problem_sets
    ]
    results = {"model": name, **summarize(problem_sets, graded, seed=args.seed)}
    table = format_results(results)
    records.write_atomically(output_dir / RESULTS_JSON, json.dumps(results, indent=2, allow_nan=False) + "\n")
    records.write_atomically(output_dir / RESULTS_MARKDOWN, table)
    sys.stdout.write(f"{table}\nrecords and tables: {output_dir}\n")
    return results


def _check_source(args: EvaluationArguments) -> str:
    """The model, or the file of completions; exactly one of them is given."""
    if (args.model_name_or_path is None) == (args.completions_file is None):
        raise ValueError(
            f"Exactly one source of completions is needed, got model_name_or_path={args.model_name_or_path!r} and "
            f"completions_file={args.completions_file!r}: set one of them and leave the other out."
        )
    if args.completions_file is not None:
        return args.completions_file
    assert args.model_name_or_path is not None
    args.model_name_or_path = os.path.expanduser(args.model_name_or_path)
    check_model(args.model_name_or_path, revision=args.model_revision)
    return args.model_name_or_path


def make_parser() -> recipe_files.RecipeParser:
    """Parser of the evaluation script."""
    return recipe_files.RecipeParser(
        [EvaluationArguments],
        module="oblr_trl.scripts.evaluate",
        description="Evaluate a model on benchmarks with verifiable answers: avg@k and pass@k with intervals.",
        example="--config recipes/evaluation/gsm8k.yaml --model_name_or_path Qwen/Qwen3-0.6B-Base",
    )


def parse(argv: Sequence[str] | None = None) -> EvaluationArguments:
    """
    Parse a recipe and the command line, strictly.

    Raises:
        `ValueError`: a recipe that cannot be read, an unknown key, or a value out of range.
    """
    tokens = recipe_files.command_line(argv)
    parser = make_parser()
    recipe_files.check_keys(
        recipe_files.given_keys(tokens, recipe_files.read_recipe(tokens)), recipe_files.known_keys(parser)
    )
    (args,) = parser.parse_args_and_config(tokens)
    if args.like is None:
        return args
    given = [key.replace("-", "_") for key in recipe_files.given_keys(tokens, {})]
    settings = training_prompt_settings(args.like)
    return dataclasses.replace(args, **{name: value for name, value in settings.items() if name not in given})


if __name__ == "__main__":
    main(recipe_files.parse_or_exit(parse, "evaluate"))
