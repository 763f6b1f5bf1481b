"""Benchmarks as a recipe declares them: where the problems are, which columns hold prompt and answer, how often each is asked."""

import dataclasses
import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from datasets import Dataset

from oblr_trl.data.answers import as_latex, compile_answer_pattern, extract_answer
from oblr_trl.data.prompts import format_prompts
from oblr_trl.data.sources import check_column, load_rows
from oblr_trl.data.tasks import nearest
from oblr_trl.evaluation.grading import parse_reference

logger = logging.getLogger(__name__)

UNPARSABLE_ANSWERS = ("error", "exclude")
# Problems of an error message that are named one by one.
MAX_NAMED = 10


@dataclass(frozen=True)
class Benchmark:
    """
    One entry of `benchmarks` in an evaluation recipe.

    Args:
        name (`str`):
            Name in tables and of the file of records.
        dataset_name (`str`):
            Hub id, local directory laid out like a hub data set, or `.json`, `.jsonl` or `.parquet` file.
        answer_column (`str`):
            Column with the reference answer: text, a number, or a list of the parts of one answer.
        prompt_column (`str`, *optional*, defaults to `"prompt"`):
            Column with the problem.
        dataset_config (`str`, *optional*):
            Configuration of a hub data set.
        split (`str`, *optional*, defaults to `"test"`):
            Split of a hub data set or directory.
        answer_pattern (`str`, *optional*):
            Regular expression whose one group is the answer, e.g. `"#### (.+)"` for GSM8K.
        num_completions (`int`, *optional*, defaults to `1`):
            Completions per problem: the k of avg@k, the n of pass@k.
        pass_at (`list[int]`, *optional*):
            The k of pass@k, each at most `num_completions`.
        size (`int`, *optional*):
            Number of problems, the first ones. Defaults to all.
    """

    name: str
    dataset_name: str
    answer_column: str
    prompt_column: str = "prompt"
    dataset_config: str | None = None
    split: str = "test"
    answer_pattern: str | None = None
    num_completions: int = 1
    pass_at: tuple[int, ...] = ()
    size: int | None = None


@dataclass(frozen=True)
class Problem:
    """
    A problem of a benchmark.

    Args:
        index (`int`):
            Its row in the data set.
        prompt (`str` or `list[dict]`):
            What the model is asked.
        answer (`str`):
            The reference answer, extracted.
        reference (`list`):
            The same, parsed by math-verify.
    """

    index: int
    prompt: Any
    answer: str
    reference: list[Any]


@dataclass(frozen=True)
class ProblemSet:
    """The problems of a benchmark that are asked, and the rows that are not because their answer cannot be parsed."""

    benchmark: Benchmark
    problems: list[Problem]
    excluded: list[int]

    @property
    def fingerprint(self) -> str:
        """Hash of prompts and answers, by which a resumed evaluation tells that its problems are still the same."""
        rows = [[problem.index, problem.prompt, problem.answer] for problem in self.problems]
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]

    def as_dataset(self) -> Dataset:
        """The problems in the columns that TRL's trainers and rewards read."""
        return Dataset.from_dict(
            {
                "prompt": [problem.prompt for problem in self.problems],
                "solution": [as_latex(problem.answer) for problem in self.problems],
                "benchmark": [self.benchmark.name] * len(self.problems),
            }
        )


def parse_benchmarks(
    entries: Any,
    *,
    files: Mapping[str, str] | None = None,
    only: Sequence[str] | None = None,
    num_completions: int = 1,
    pass_at: Sequence[int] = (),
) -> list[Benchmark]:
    """
    Check the `benchmarks` of a recipe.

    Args:
        entries (`dict[str, dict]`):
            The fields of [`Benchmark`] by the benchmark's name.
        files (`dict[str, str]`, *optional*):
            Local files of the same columns that take the place of data sets, by the benchmark's name.
        only (`list[str]`, *optional*):
            Names of the benchmarks wanted. Defaults to all.
        num_completions (`int`, *optional*, defaults to `1`):
            For benchmarks that do not set their own.
        pass_at (`list[int]`, *optional*):
            For benchmarks that do not set their own.

    Raises:
        `ValueError`: an unknown name, key or value, named with the nearest that is known.
    """
    if not isinstance(entries, dict) or not entries:
        raise ValueError(
            f"`benchmarks` is {entries!r}, which is not a mapping of names to data sets: write it like "
            "`gsm8k: {dataset_name: openai/gsm8k, prompt_column: question, answer_column: answer}`."
        )
    for field_name, names in (("files", files or {}), ("only", only or ())):
        for name in names:
            if name not in entries:
                raise ValueError(
                    f"`{field_name}` names {name!r}, which is not one of the `benchmarks`{nearest(name, entries)}. They "
                    f"are: {', '.join(entries)}."
                )
    benchmarks = []
    for name, entry in entries.items():
        if only and name not in only:
            continue
        defaults = {"num_completions": num_completions, "pass_at": tuple(pass_at)}
        benchmark = _parse_entry(name, entry, defaults)
        if files and name in files:
            benchmark = dataclasses.replace(benchmark, dataset_name=files[name], dataset_config=None)
        benchmarks.append(benchmark)
    return benchmarks


def load_problems(
    benchmark: Benchmark,
    *,
    unparsable_answers: str = "error",
    prompt_template: str | None = None,
    conversational: bool = False,
    system_prompt: str | None = None,
) -> ProblemSet:
    """
    Load the problems of a benchmark and parse their answers, before any model is loaded.

    Args:
        benchmark ([`Benchmark`]):
            What to load.
        unparsable_answers (`str`, *optional*, defaults to `"error"`):
            Of problems whose answer is missing or that math-verify cannot parse: `"error"` refuses them by row, `"exclude"`
            leaves them out with a warning, and the tables count them.
        prompt_template, conversational, system_prompt:
            As in [`~prompts.format_prompts`].

    Raises:
        `ValueError`: a source, split or column that does not exist, no rows, or an answer that cannot be parsed.
    """
    field_name = f"benchmarks.{benchmark.name}."
    rows = load_rows(
        benchmark.dataset_name,
        field_name=f"{field_name}dataset_name",
        config=benchmark.dataset_config,
        split=benchmark.split,
    )
    for name in ("prompt_column", "answer_column"):
        column = getattr(benchmark, name)
        check_column(column, rows.column_names, field_name=field_name + name, source=repr(benchmark.dataset_name))
    if benchmark.size is not None:
        if benchmark.size > len(rows):
            raise ValueError(f"`{field_name}size` is {benchmark.size}, but there are {len(rows)} rows: lower it.")
        rows = rows.select(range(benchmark.size))
    prompts = format_prompts(
        list(rows[benchmark.prompt_column]),
        source=repr(benchmark.dataset_name),
        template=prompt_template,
        conversational=conversational,
        system_prompt=system_prompt,
    )
    pattern = compile_answer_pattern(benchmark.answer_pattern, field_name=f"{field_name}answer_pattern")
    cells = list(rows[benchmark.answer_column])
    answers = [extract_answer(cell, pattern) for cell in cells]
    references = [parse_reference(answer) if answer is not None else [] for answer in answers]
    unparsable = [index for index, reference in enumerate(references) if not reference]
    if unparsable:
        _report_unparsable(benchmark, unparsable, cells, raise_error=unparsable_answers == "error")
    problems = [
        Problem(index=index, prompt=prompt, answer=answer, reference=reference)
        for index, (prompt, answer, reference) in enumerate(zip(prompts, answers, references, strict=True))
        if reference and answer is not None
    ]
    return ProblemSet(benchmark=benchmark, problems=problems, excluded=unparsable)


def _parse_entry(name: str, entry: Any, defaults: dict[str, Any]) -> Benchmark:
    known = {field.name: field for field in dataclasses.fields(Benchmark) if field.name != "name"}
    if not isinstance(entry, dict):
        raise ValueError(f"`benchmarks.{name}` is {entry!r}: give it keys, of which it knows {', '.join(known)}.")
    if not name.replace("-", "").replace("_", "").isalnum():
        raise ValueError(f"`benchmarks` has the name {name!r}, which names a file too: use letters, digits, - and _.")
    for key in entry:
        if key not in known:
            raise ValueError(
                f"Unknown key `benchmarks.{name}.{key}`{nearest(str(key), known)}. Known are {', '.join(known)}."
            )
    for key, field in known.items():
        if field.default is dataclasses.MISSING and not entry.get(key):
            raise ValueError(f"`benchmarks.{name}.{key}` is not set, and has no default: set it.")
    fields = {**defaults, **entry}
    num_completions, pass_at = fields["num_completions"], fields["pass_at"]
    pass_at = fields["pass_at"] = tuple(pass_at) if isinstance(pass_at, (list, tuple)) else (pass_at,)
    if not _is_count(num_completions):
        raise ValueError(
            f"`benchmarks.{name}.num_completions` is {num_completions!r}: give a whole number, at least 1."
        )
    for k in pass_at:
        if not _is_count(k) or k > num_completions:
            raise ValueError(
                f"`pass_at` of benchmark {name!r} has k = {k!r}, but of its {num_completions} completions per problem only a "
                f"k from 1 to {num_completions} can be drawn: lower it, or raise `num_completions`."
            )
    if fields.get("size") is not None and not _is_count(fields["size"]):
        raise ValueError(f"`benchmarks.{name}.size` is {fields['size']!r}: give a whole number, at least 1.")
    compile_answer_pattern(fields.get("answer_pattern"), field_name=f"benchmarks.{name}.answer_pattern")
    return Benchmark(name=name, **fields)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _report_unparsable(benchmark: Benchmark, indices: list[int], cells: list[Any], *, raise_error: bool) -> None:
    named = "; ".join(f"row {index}: {cells[index]!r}"[:200] for index in indices[:MAX_NAMED])
    more = f"; and {len(indices) - MAX_NAMED} more" if len(indices) > MAX_NAMED else ""
    message = (
        f"`benchmarks.{benchmark.name}.answer_column` {benchmark.answer_column!r} of {benchmark.dataset_name!r} (with "
        f"`answer_pattern` {benchmark.answer_pattern!r}) holds {len(indices)} answers that are missing or that math-verify "
        f"cannot parse: {named}{more}."
    )
    if raise_error:
        raise ValueError(
            f"{message} Correct the rows or the pattern, or set `unparsable_answers: exclude` to leave the problems out."
        )
    if len(indices) == len(cells):
        raise ValueError(f"{message} No problem is left: set another `answer_column` or `answer_pattern`.")
    logger.warning("%s These problems are left out and counted in the results.", message)
