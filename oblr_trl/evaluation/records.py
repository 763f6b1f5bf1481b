"""Files from which a killed evaluation is continued: its settings, and a JSON line per graded problem."""

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from oblr_trl.evaluation.arguments import EvaluationArguments
from oblr_trl.evaluation.benchmarks import Problem, ProblemSet
from oblr_trl.evaluation.rewards import grade

SETTINGS_FILE = "settings.json"
# Bytes of each file of weights that enter its fingerprint, at its start, middle and end.
_SAMPLE = 1 << 20
# With which every record begins, so that a cut one is told from a file of something else.
_BEGINNING = b'{"benchmark": '

# The `completions` of a problem, the `num_tokens` of each and whether it was `truncated`, `None` where not known.
Answer = dict[str, list[Any]]
# (problems of one benchmark, completions of each) -> answers
Answers = Callable[[Sequence[Problem], int], list[Answer]]


def evaluate_benchmark(
    problem_set: ProblemSet, answers: Answers, path: Path, args: EvaluationArguments
) -> list[dict[str, Any]]:
    """
    Answer and grade the problems that the file `path` lacks, and return the records of all, in order.

    Batches are cut from all problems, whatever is recorded, and a batch of which anything is missing is generated
    whole: so the seeds and the padding are those of an uninterrupted evaluation.
    """
    records = read_records(path)
    problems, size = problem_set.problems, max(1, args.batch_size // problem_set.num_completions)
    for start in tqdm(range(0, len(problems), size), desc=problem_set.name, unit="batch", disable=args.disable_tqdm):
        batch = problems[start : start + size]
        if all(problem["index"] in records for problem in batch):
            continue
        with path.open("ab") as file:
            for problem, answer in zip(batch, answers(batch, problem_set.num_completions), strict=True):
                if problem["index"] not in records:
                    correct = grade(problem["answer"], answer["completions"], answer_format=args.answer_format)
                    record = records[problem["index"]] = {**problem, **answer, "correct": correct}
                    file.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
    return [records[problem["index"]] for problem in problems]


def read_records(path: Path) -> dict[int, dict[str, Any]]:
    """
    The graded problems of one benchmark by row, none if there is no file.

    A last line that was cut off by a kill is removed from the file; its problem counts as not done.
    """
    content = path.read_bytes() if path.is_file() else b""
    end = content.rfind(b"\n") + 1  # every record ends with a line break
    if not content[end:].startswith(_BEGINNING[: len(content) - end]):
        raise ValueError(f"{path}: not a file of graded problems. Set another `output_dir`.")
    rows = _parse_rows({path: content[:end]}, ("benchmark", "index", "completions", "correct"))
    if end < len(content):
        os.truncate(path, end)
    return {index: row for (_, index), row in rows.items()}


def recorded_answers(path: Path, problem_sets: Sequence[ProblemSet]) -> tuple[Answers, str]:
    """
    Answers from a JSONL file, or a directory of such, with rows `{"benchmark", "index", "completions"}`, and a hash
    of it; the records of a finished evaluation are such rows.

    Raises:
        `ValueError`: a problem that the file lacks, has twice, or has with another number of completions.
    """
    files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
    if not files or not files[0].is_file():
        raise ValueError(f"`completions_file` is {str(path)!r}, but there is no such file.")
    contents = {file: file.read_bytes() for file in files}
    rows = _parse_rows(contents, ("benchmark", "index", "completions"))
    for problem_set in problem_sets:
        for problem in problem_set.problems:
            name, index, wanted = problem_set.name, problem["index"], problem_set.num_completions
            found = len(rows[name, index]["completions"] or []) if (name, index) in rows else 0
            if found != wanted:
                raise ValueError(
                    f"`completions_file` {str(path)!r} has {found} completions for row {index} of {name!r}, but "
                    f"`num_completions` is {wanted}: add or remove some, or set `num_completions`."
                )

    def answers(problems: Sequence[Problem], num_completions: int) -> list[Answer]:
        unknown = {"num_tokens": [None] * num_completions, "truncated": [None] * num_completions}
        texts = [rows[problem["benchmark"], problem["index"]]["completions"] for problem in problems]
        return [{"completions": completions, **unknown} for completions in texts]

    return answers, hashlib.sha256(b"".join(contents.values())).hexdigest()[:16]


def _parse_rows(contents: Mapping[Path, bytes], keys: Sequence[str]) -> dict[tuple[Any, Any], dict[str, Any]]:
    """The JSON lines of files by benchmark and index, with errors that name the line."""
    rows: dict[tuple[Any, Any], dict[str, Any]] = {}
    for path, content in contents.items():
        for number, line in enumerate(content.splitlines(), start=1):
            try:
                row = json.loads(line)
                benchmark, index, *_ = (row[key] for key in keys)
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{path}, line {number}: not a JSON object with {', '.join(keys)}, but {line[:80]!r}. Correct or "
                    "remove that line, or name another file."
                ) from error
            if (benchmark, index) in rows:
                raise ValueError(
                    f"{path}, line {number}: row {index} of {benchmark!r} is there twice. Remove one line."
                )
            rows[benchmark, index] = row
    return rows


def record_settings(output_dir: Path, settings: dict[str, Any]) -> None:
    """
    Record what decides over completions and grades, or refuse to continue an evaluation of other settings, named with
    both values. Those of benchmarks, `benchmarks.<name>.<key>`, may be added to an evaluation.
    """
    path = output_dir / SETTINGS_FILE
    recorded = json.loads(path.read_text()) if path.is_file() else {}
    settings = json.loads(json.dumps(settings))
    for key, value in settings.items():
        is_added = key.startswith("benchmarks.") and key not in recorded
        if recorded and not is_added and recorded.get(key) != value:
            raise ValueError(
                f"`{key}` was {recorded.get(key)!r} when the evaluation in {str(output_dir)!r} began, and is "
                f"{value!r} now, so that it cannot be continued: set it back, or set another `output_dir`."
            )
    output_dir.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(recorded | settings, indent=2) + "\n")


def write_atomically(path: Path, text: str) -> None:
    """Write a file that is either complete or as it was."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def weights_fingerprint(name: str) -> str | None:
    """
    Hash that tells the weights in a local directory from others of the same name, such as those of a longer training;
    `None` for a hub id. Of each file it reads the size and three samples of 1 MiB, which any training step changes.
    """
    directory = Path(name)
    if not directory.is_dir():
        return None
    digest = hashlib.sha256()
    for path in sorted([*directory.glob("*.safetensors"), *directory.glob("*.bin"), *directory.glob("*config.json")]):
        size = path.stat().st_size
        digest.update(f"{path.name}/{size}/".encode())
        with path.open("rb") as file:
            for start in (0, size // 2, max(0, size - _SAMPLE)):
                file.seek(start)
                digest.update(file.read(_SAMPLE))
    return digest.hexdigest()[:16]
