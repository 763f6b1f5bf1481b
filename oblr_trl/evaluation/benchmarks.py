"""Benchmarks as a recipe declares them: dataset, columns of prompts and answers, and number of completions."""

import dataclasses
import hashlib
import json
import logging
from dataclasses import dataclass
from typing import Any

from oblr_trl.data.answers import check_answer_pattern, extract_answer
from oblr_trl.data.prompts import format_prompts
from oblr_trl.data.recipe_files import check_keys
from oblr_trl.data.sources import check_column, load_rows
from oblr_trl.data.tasks import nearest
from oblr_trl.evaluation.arguments import EvaluationArguments, is_count
from oblr_trl.evaluation.rewards import parse_reference

logger = logging.getLogger(__name__)

# Problems of an error message that are named one by one.
MAX_NAMED = 5

# `benchmark`, `index` (the row in the dataset), `prompt` (text or messages) and `answer`: the beginning of a record.
Problem = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """One entry of `benchmarks` in an evaluation recipe."""

    name: str  # in tables, and of its file of records
    dataset_name: str  # hub id, local directory laid out like a hub dataset, or .json, .jsonl or .parquet file
    answer_column: str  # holds the reference answer: text, a number, or a list of the parts of one answer
    prompt_column: str = "prompt"
    dataset_config: str | None = None  # of a hub dataset
    split: str = "test"  # of a hub dataset or directory
    answer_pattern: str | None = None  # regular expression whose one group is the answer, e.g. "#### (.+)" for GSM8K
    num_completions: int = 1  # per problem: the k of avg@k, the n of pass@k
    pass_at: tuple[int, ...] = ()  # the k of pass@k, each at most `num_completions`


@dataclass(frozen=True, kw_only=True)
class ProblemSet(Benchmark):
    """A benchmark with its problems, and the rows that are left out because their answer cannot be parsed."""

    problems: list[Problem]
    excluded: list[int]

    @property
    def fingerprint(self) -> str:
        """Hash of prompts and answers, by which a continued evaluation tells that its problems are still the same."""
        return hashlib.sha256(json.dumps(self.problems).encode()).hexdigest()[:16]


def load_benchmarks(args: EvaluationArguments) -> list[ProblemSet]:
    """
    Load the problems of a recipe's benchmarks and parse their answers; needs no model.

    Raises:
        `ValueError`: an unknown name, key or value, named with the nearest that is known; a source, split or column
        that does not exist; or no row with an answer that can be parsed.
    """
    entries = args.benchmarks
    if not isinstance(entries, dict) or not entries:
        raise ValueError(
            f"`benchmarks` is {entries!r}, which is not a mapping of names to datasets: write it like "
            "`gsm8k: {dataset_name: openai/gsm8k, prompt_column: question, answer_column: answer}`."
        )
    for field_name, names in (("files", args.files or ()), ("only", args.only or ())):
        for name in names:
            if name not in entries:
                raise ValueError(
                    f"`{field_name}` names {name!r}, which is not one of the `benchmarks`{nearest(name, entries)}. "
                    f"They are: {', '.join(entries)}."
                )
    benchmarks = [_parse_entry(name, entries[name], args) for name in entries if not args.only or name in args.only]
    return [_load_problems(benchmark, args) for benchmark in benchmarks]


def _parse_entry(name: str, entry: Any, args: EvaluationArguments) -> Benchmark:
    known = [field.name for field in dataclasses.fields(Benchmark) if field.name != "name"]
    if not isinstance(entry, dict):
        raise ValueError(f"`benchmarks.{name}` is {entry!r}: give it keys, of which it knows {', '.join(known)}.")
    if not name.replace("-", "").replace("_", "").isalnum():
        raise ValueError(f"`benchmarks` has the name {name!r}, which names a file too: use letters, digits, - and _.")
    check_keys([f"benchmarks.{name}.{key}" for key in entry], [f"benchmarks.{name}.{key}" for key in known])
    for key in ("dataset_name", "answer_column"):
        if not entry.get(key):
            raise ValueError(f"`benchmarks.{name}.{key}` is not set, and has no default: set it.")
    fields = {"num_completions": args.num_completions, "pass_at": args.pass_at or (), **entry}
    n, pass_at = fields["num_completions"], fields["pass_at"]
    fields["pass_at"] = tuple(pass_at) if isinstance(pass_at, (list, tuple)) else (pass_at,)
    if not is_count(n):
        raise ValueError(f"`benchmarks.{name}.num_completions` is {n!r}: give a whole number, at least 1.")
    for k in fields["pass_at"]:
        if not is_count(k) or k > n:
            raise ValueError(
                f"`pass_at` of benchmark {name!r} has k = {k!r}, but of its {n} completions per problem only a k from "
                f"1 to {n} can be drawn: lower it, or raise `num_completions`."
            )
    if args.temperature == 0 and n > 1:
        raise ValueError(
            f"`temperature` is 0, which makes the {n} completions of each problem of {name!r} equal: set "
            "`num_completions: 1`, or a temperature above 0."
        )
    check_answer_pattern(fields.get("answer_pattern"), field_name=f"benchmarks.{name}.answer_pattern")
    files: Any = args.files or {}
    if name in files:
        fields |= {"dataset_name": files[name], "dataset_config": None}
    return Benchmark(name=name, **fields)


def _load_problems(benchmark: Benchmark, args: EvaluationArguments) -> ProblemSet:
    prefix, source = f"benchmarks.{benchmark.name}.", repr(benchmark.dataset_name)
    config, split = benchmark.dataset_config, benchmark.split
    rows = load_rows(benchmark.dataset_name, field_name=f"{prefix}dataset_name", config=config, split=split)
    for name, column in (("prompt_column", benchmark.prompt_column), ("answer_column", benchmark.answer_column)):
        check_column(column, rows.column_names, field_name=prefix + name, source=source)
    prompts = format_prompts(list(rows[benchmark.prompt_column]), args, source=source)
    problems, unparsable = [], {}
    for index, (prompt, cell) in enumerate(zip(prompts, rows[benchmark.answer_column], strict=True)):
        answer = extract_answer(cell, benchmark.answer_pattern)
        if answer is not None and parse_reference(answer):
            problems.append({"benchmark": benchmark.name, "index": index, "prompt": prompt, "answer": answer})
        else:
            unparsable[index] = cell
    if unparsable:
        named = "; ".join([f"row {index}: {cell!r}"[:200] for index, cell in unparsable.items()][:MAX_NAMED])
        message = (
            f"`{prefix}answer_column` {benchmark.answer_column!r} of {source} (with `answer_pattern` "
            f"{benchmark.answer_pattern!r}) holds {len(unparsable)} answers of {len(rows)} that are missing or that "
            f"math-verify cannot parse, such as {named}."
        )
        if not problems:
            raise ValueError(f"{message} No problem is left: set another `answer_column` or `answer_pattern`.")
        logger.warning("%s These problems are left out and counted in the results.", message)
    return ProblemSet(**vars(benchmark), problems=problems, excluded=list(unparsable))
