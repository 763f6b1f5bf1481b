"""Evaluate a model on benchmarks with verifiable answers: avg@k and pass@k with intervals, in Markdown and JSON.

    python -m oblr_trl.scripts.evaluate --config recipes/evaluation/math.yaml --model_name_or_path Qwen/Qwen3-4B-Base

A trained model is asked as its recipe asked it, with the same prompts, stop tokens and length, by `--like RECIPE`.
A killed evaluation continues where it was when the same command is given again. Any key of the recipe can be given on the
command line too, a misspelt one fails and names the nearest. All data are read and checked before the model is loaded. Several
evaluated models are compared by `python -m oblr_trl.scripts.compare LABEL=DIR LABEL=DIR`.
"""

import hashlib
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from oblr_trl.data.recipe_files import (
    RecipeParser,
    check_keys,
    command_line,
    given_keys,
    known_keys,
    parse_or_exit,
    read_recipe,
)
from oblr_trl.data.sources import check_model
from oblr_trl.evaluation.arguments import EvaluationArguments
from oblr_trl.evaluation.benchmarks import ProblemSet, load_problems, parse_benchmarks
from oblr_trl.evaluation.generation import check_adapter, choose_backend
from oblr_trl.evaluation.records import (
    RESULTS_JSON,
    RESULTS_MARKDOWN,
    Records,
    settle,
    weights_fingerprint,
    write_atomically,
)
from oblr_trl.evaluation.results import format_results, summarize_all
from oblr_trl.evaluation.run import Answers, ModelAnswers, RecordedAnswers, evaluate_benchmark
from oblr_trl.evaluation.training import training_prompt_settings

# What decides over completions and grades, beside model and problems; a resumed evaluation may change the other keys.
MODEL_SETTINGS = (
    "model_name_or_path",
    "model_revision",
    "dtype",
    "attn_implementation",
    "temperature",
    "top_p",
    "top_k",
    "max_new_tokens",
    "stop_token_ids",
    "batch_size",
    "seed",
    "vllm_tensor_parallel_size",
)
PROMPT_SETTINGS = (
    "prompt_template",
    "conversational",
    "system_prompt",
    "chat_template_kwargs",
    "unparsable_answers",
    "answer_format",
)


def main(args: EvaluationArguments) -> dict[str, Any]:
    """Evaluate as the arguments say, write records and tables into `output_dir`, and return what `results.json` holds."""
    problem_sets = _load_problem_sets(args)
    name = _check_source(args)
    output_dir = Path(args.output_dir or Path("runs/evaluation") / Path(name).name)
    if args.completions_file is not None:
        answers: Answers = RecordedAnswers(Path(args.completions_file), problem_sets)
        settings = _settings(args, PROMPT_SETTINGS) | {"completions": _file_fingerprint(Path(args.completions_file))}
    else:
        backend = choose_backend(args.backend)
        check_adapter(args, backend)
        answers = ModelAnswers(args, backend, problem_sets)
        settings = _settings(args, (*MODEL_SETTINGS, *PROMPT_SETTINGS))
        settings |= {"backend": backend, "weights": weights_fingerprint(name)}
    settle(output_dir, settings, {s.benchmark.name: _benchmark_settings(s) for s in problem_sets})

    records = {}
    for problem_set in problem_sets:
        path = output_dir / f"{problem_set.benchmark.name}.jsonl"
        records[problem_set.benchmark.name] = evaluate_benchmark(problem_set, answers, Records(path), args)
    results = summarize_all(
        records,
        pass_at={s.benchmark.name: s.benchmark.pass_at for s in problem_sets},
        excluded={s.benchmark.name: s.excluded for s in problem_sets},
        seed=args.seed,
    )
    results = {"model": name, **results}
    table = format_results(results, title=name)
    write_atomically(output_dir / RESULTS_JSON, json.dumps(results, indent=2, allow_nan=False) + "\n")
    write_atomically(output_dir / RESULTS_MARKDOWN, table)
    sys.stdout.write(f"{table}\nrecords and tables: {output_dir}\n")
    return results


def _load_problem_sets(args: EvaluationArguments) -> list[ProblemSet]:
    assert not isinstance(args.files, str)  # parsed by EvaluationArguments
    benchmarks = parse_benchmarks(
        args.benchmarks,
        files=args.files,
        only=args.only,
        num_completions=args.num_completions,
        pass_at=args.pass_at or (),
    )
    for benchmark in benchmarks:
        if args.temperature == 0 and benchmark.num_completions > 1 and args.completions_file is None:
            raise ValueError(
                f"`temperature` is 0, which makes the {benchmark.num_completions} completions of each problem of "
                f"{benchmark.name!r} equal: set `num_completions: 1`, or a temperature above 0."
            )
    return [
        load_problems(
            benchmark,
            unparsable_answers=args.unparsable_answers,
            prompt_template=args.prompt_template,
            conversational=args.conversational,
            system_prompt=args.system_prompt,
        )
        for benchmark in benchmarks
    ]


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
    name = args.model_name_or_path = os.path.expanduser(args.model_name_or_path)
    check_model(name, revision=args.model_revision)
    return name


def _settings(args: EvaluationArguments, names: Sequence[str]) -> dict[str, Any]:
    return {name: getattr(args, name) for name in names}


def _benchmark_settings(problem_set: ProblemSet) -> dict[str, Any]:
    """What decides over the records of a benchmark: which files the problems come from does not, if they are the same."""
    return {"num_completions": problem_set.benchmark.num_completions, "problems": problem_set.fingerprint}


def _file_fingerprint(path: Path) -> str:
    files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]


def make_parser() -> RecipeParser:
    """Parser of the evaluation script."""
    return RecipeParser(
        [EvaluationArguments],
        module="oblr_trl.scripts.evaluate",
        description="Evaluate a model on benchmarks with verifiable answers: avg@k and pass@k with intervals.",
        example="--config recipes/evaluation/gsm8k.yaml --model_name_or_path Qwen/Qwen3-0.6B-Base",
    )


def parse(argv: Sequence[str] | None = None) -> EvaluationArguments:
    """
    Parse a recipe and the command line, strictly.

    Raises:
        `ValueError`: For a recipe that cannot be read, an unknown key, or a value out of range.
    """
    tokens = command_line(argv)
    parser = make_parser()
    check_keys(given_keys(tokens, read_recipe(tokens)), known_keys(parser))
    (args,) = parser.parse_args_and_config(tokens)
    if args.like is None:
        return args
    given = [key.replace("-", "_") for key in given_keys(tokens, {})]
    settings = training_prompt_settings(args.like)
    return replace(args, **{name: value for name, value in settings.items() if name not in given})


if __name__ == "__main__":
    main(parse_or_exit(parse, "evaluate"))
