"""Files from which a killed evaluation is continued: its settings, and a JSON line per graded problem."""

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from oblr_trl.evaluation.arguments import EvaluationArguments
from oblr_trl.evaluation.benchmarks import Problem, ProblemSet
from oblr_trl.evaluation.rewards import grade

SETTINGS_FILE = "settings.json"
# With which every record begins, so that a cut one is told from a file of something else.
_BEGINNING = b'{"benchmark": '

# The `completions` of a problem, the `num_tokens` of each and whether it was `truncated`.
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
                    correct = grade(problem["answer"], answer["completions"])
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
    records = {}
    for number, line in enumerate(content[:end].splitlines(), start=1):
        try:
            record = json.loads(line)
            index, _ = record["index"], record["correct"]
            records[index] = record
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path}, line {number}: not a graded problem, but {line[:80]!r}. Remove that line, or set another "
                "`output_dir`."
            ) from error
    if not content[end:].startswith(_BEGINNING[: len(content) - end]):
        raise ValueError(f"{path}: not a file of graded problems. Set another `output_dir`.")
    if end < len(content):
        os.truncate(path, end)
    return records


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
