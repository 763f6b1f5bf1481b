"""Evaluate a model on benchmarks with verifiable answers: avg@k and pass@k with intervals, in Markdown and JSON.

    python -m oblr_trl.scripts.evaluate --config recipes/evaluation/math.yaml --model_name_or_path Qwen/Qwen3-4B-Base

A killed evaluation resumes when the same command is given again. Any key of the recipe can be given on the command
line too. All data are read and checked before the model is loaded. `oblr_trl.scripts.compare` compares models.
"""

import json
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

RESULTS_MARKDOWN = "results.md"
# What a continued evaluation may change: keys that are recorded by their effect, and keys without effect on a record.
FREE = {"benchmarks", "only", "files", "num_completions", "pass_at", "backend", "output_dir"}
FREE |= {"vllm_gpu_memory_utilization", "disable_tqdm"}


def main(args: EvaluationArguments) -> dict[str, Any]:
    """Evaluate, write records and tables into `output_dir`, and return what `results.json` holds."""
    problem_sets = load_benchmarks(args)
    name = args.model_name_or_path = check_model(args.model_name_or_path, revision=args.model_revision)
    output_dir = Path(args.output_dir or Path("runs/evaluation") / Path(name).name)
    settings = {key: value for key, value in vars(args).items() if key not in FREE}
    for problem_set in problem_sets:
        settings[f"benchmarks.{problem_set.name}.num_completions"] = problem_set.num_completions
        settings[f"benchmarks.{problem_set.name}.problems"] = problem_set.fingerprint
    settings["backend"] = choose_backend(args.backend)
    # Tells a model trained further from the one before; `None` for a hub id.
    settings["weights_changed_at"] = max((p.stat().st_mtime for p in Path(name).glob("*.safetensors")), default=None)
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


def parse(argv: Sequence[str] | None = None) -> EvaluationArguments:
    """Parse recipe and command line; `ValueError` for a file that cannot be read, an unknown key or a value out of range."""
    parser = recipe_files.RecipeParser(
        [EvaluationArguments],
        module="oblr_trl.scripts.evaluate",
        description="Evaluate a model on benchmarks with verifiable answers: avg@k and pass@k with intervals.",
        example="--config recipes/evaluation/gsm8k.yaml --model_name_or_path Qwen/Qwen3-0.6B-Base",
    )
    (args,) = parser.parse_strictly(*recipe_files.command_line(argv))
    return args


if __name__ == "__main__":
    main(recipe_files.parse_or_exit(parse, "evaluate"))
