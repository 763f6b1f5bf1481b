"""Ask, grade, record: batch by batch, leaving out what is recorded already."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from oblr_trl.evaluation.arguments import EvaluationArguments
from oblr_trl.evaluation.benchmarks import Problem, ProblemSet
from oblr_trl.evaluation.generation import (
    Completion,
    Generator,
    batch_seed,
    check_lengths,
    encode_prompts,
    load_generator,
    load_tokenizer,
)
from oblr_trl.evaluation.grading import grade
from oblr_trl.evaluation.records import Records, read_json_lines

Answers = Callable[[ProblemSet, Sequence[Problem]], list[list[Completion]]]


def evaluate_benchmark(
    problem_set: ProblemSet, answers: Answers, records: Records, args: EvaluationArguments
) -> list[dict[str, Any]]:
    """
    Answer and grade the problems that `records` lacks, and return the records of all, in the order of the problems.

    Batches are cut from all problems, whatever is recorded, and a batch of which anything is missing is generated whole: so the
    seeds and the padding are those of an uninterrupted evaluation.
    """
    benchmark = problem_set.benchmark
    size = max(1, args.batch_size // benchmark.num_completions)
    problems = problem_set.problems
    done = sum(problem.index in records.by_index for problem in problems)
    with tqdm(
        total=len(problems), initial=done, desc=benchmark.name, unit="problem", disable=args.disable_tqdm
    ) as progress:
        for start in range(0, len(problems), size):
            batch = problems[start : start + size]
            missing = [problem for problem in batch if problem.index not in records.by_index]
            if not missing:
                continue
            pairs = zip(batch, answers(problem_set, batch), strict=True)
            records.append([_record(problem_set, *pair, args) for pair in pairs if pair[0] in missing])
            graded = [flag for record in records.by_index.values() for flag in record["correct"]]
            progress.set_postfix({"average": f"{sum(graded) / len(graded):.3f}"}, refresh=False)
            progress.update(len(missing))
    return [records.by_index[problem.index] for problem in problems]


def _record(
    problem_set: ProblemSet, problem: Problem, completions: Sequence[Completion], args: EvaluationArguments
) -> dict[str, Any]:
    texts = [completion.text for completion in completions]
    return {
        "benchmark": problem_set.benchmark.name,
        "index": problem.index,
        "prompt": problem.prompt,
        "answer": problem.answer,
        "completions": texts,
        "correct": grade(problem.reference, texts, answer_format=args.answer_format),
        "num_tokens": [completion.num_tokens for completion in completions],
        "truncated": [completion.truncated for completion in completions],
    }


class ModelAnswers:
    """
    The answers of a model. The tokenizer is loaded and all prompts are encoded and measured at once; the weights when the
    first answer is asked for, which a finished evaluation never does.
    """

    def __init__(self, args: EvaluationArguments, backend: str, problem_sets: Sequence[ProblemSet]):
        self.args, self.backend = args, backend
        self.tokenizer = load_tokenizer(args)
        assert not isinstance(args.chat_template_kwargs, str)  # parsed by EvaluationArguments
        self.prompt_ids = {
            (problem_set.benchmark.name, problem.index): ids
            for problem_set in problem_sets
            for problem, ids in zip(
                problem_set.problems,
                encode_prompts(
                    self.tokenizer, [problem.prompt for problem in problem_set.problems], args.chat_template_kwargs
                ),
                strict=True,
            )
        }
        self.longest_prompt = max(len(ids) for ids in self.prompt_ids.values())
        check_lengths(args, self.longest_prompt)
        self.generator: Generator | None = None

    def __call__(self, problem_set: ProblemSet, problems: Sequence[Problem]) -> list[list[Completion]]:
        if self.generator is None:
            self.generator = load_generator(
                self.args, self.tokenizer, self.backend, longest_prompt=self.longest_prompt
            )
        name = problem_set.benchmark.name
        return self.generator.generate(
            [self.prompt_ids[name, problem.index] for problem in problems],
            num_completions=problem_set.benchmark.num_completions,
            seed=batch_seed(self.args.seed, name, problems[0].index),
        )


class RecordedAnswers:
    """
    Answers from a JSONL file, or a directory of such, with rows `{"benchmark", "index", "completions"}`; those of a finished
    evaluation are such rows.

    Raises:
        `ValueError`: a problem that the file lacks, has twice, or has with another number of completions.
    """

    def __init__(self, path: Path, problem_sets: Sequence[ProblemSet]):
        files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
        if not files or not files[0].is_file():
            raise ValueError(f"`completions_file` is {str(path)!r}, but there is no such file.")
        self.completions: dict[tuple[Any, Any], list[str]] = {}
        for row in (row for file in files for row in read_json_lines(file)):
            key = (row.get("benchmark"), row.get("index"))
            if key in self.completions:
                raise ValueError(f"`completions_file` {str(path)!r} has row {key[1]} of {key[0]!r} twice: remove one.")
            self.completions[key] = row.get("completions") or []
        for problem_set in problem_sets:
            name, wanted = problem_set.benchmark.name, problem_set.benchmark.num_completions
            for problem in problem_set.problems:
                found = len(self.completions.get((name, problem.index), []))
                if found != wanted:
                    raise ValueError(
                        f"`completions_file` {str(path)!r} has {found} completions for row {problem.index} of {name!r}, but "
                        f"`num_completions` is {wanted}: add or remove some, or set `num_completions`."
                    )

    def __call__(self, problem_set: ProblemSet, problems: Sequence[Problem]) -> list[list[Completion]]:
        name = problem_set.benchmark.name
        return [[Completion(text) for text in self.completions[name, problem.index]] for problem in problems]
