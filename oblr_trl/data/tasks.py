"""reasoning-gym tasks, with errors that name the field at fault; the only module that imports `reasoning_gym`."""

import ast
import difflib
from collections.abc import Collection
from typing import Any

# Tasks generate lazily, so candidates beyond the wanted prompts cost nothing unless prompts repeat.
CANDIDATES_PER_PROMPT = 20


def make_task(name: str, params: dict[str, Any] | None = None, *, size: int, seed: int) -> Any:
    """
    Build a reasoning-gym task: a sequence of entries (`question`, `answer`, `metadata`) with a method
    `score_answer(answer, entry)`. Entry i is seeded with `seed + i`; `params` are the other fields of the task's configuration.
    """
    try:
        from reasoning_gym.factory import DATASETS, create_dataset
    except ImportError as error:
        raise ValueError(
            f"`task` is {name!r}, which needs the package reasoning-gym, and that is not installed: run "
            "`pip install 'oblr_trl[demo]'`."
        ) from error
    if name not in DATASETS:
        raise ValueError(f"`task` is {name!r}, which reasoning-gym does not have{nearest(name, DATASETS)}.")
    try:
        return create_dataset(name, size=size, seed=seed, **(params or {}))
    except (AssertionError, TypeError, ValueError) as error:
        raise ValueError(f"`task_params` {params} do not suit task {name!r}: {error}.") from error


def task_entries(
    name: str,
    params: dict[str, Any] | None = None,
    *,
    size: int,
    seed: int,
    distinct: bool = False,
    excluded_questions: Collection[str] = frozenset(),
) -> list[dict[str, Any]]:
    """
    Generate exactly `size` entries of a task without the excluded questions, and, if `distinct`, each question once. They use
    seeds in `[seed, seed + 20 * size)`; a task with too few such questions is refused.
    """
    task = make_task(name, params, size=CANDIDATES_PER_PROMPT * size, seed=seed)
    seen = set(excluded_questions)
    entries: list[dict[str, Any]] = []
    for index in range(len(task)):
        entry = task[index]
        if entry["question"] in seen:
            continue
        if distinct:
            seen.add(entry["question"])
        entries.append(entry)
        if len(entries) == size:
            return entries
    raise ValueError(
        f"Task {name!r} with `task_params` {params or {}} gave only {len(entries)} of the {size} prompts wanted"
        f"{' (all distinct)' if distinct else ''}, not counting {len(excluded_questions)} test prompts, in {len(task)} "
        "attempts: lower `train_size` or `test_size`, or widen `task_params`."
    )


def encode_entry(entry: dict[str, Any]) -> str:
    """
    Write an entry as a Python literal, which, unlike JSON, keeps the tuples and number keys that some scorers look for. What is no
    literal, for example a fraction, becomes text.
    """
    return repr(_as_literal(entry))


def _as_literal(value: Any) -> Any:
    if isinstance(value, dict):
        return {_as_literal(key): _as_literal(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        items = map(_as_literal, value)
        return tuple(items) if isinstance(value, tuple) else list(items)
    return value if type(value) in (int, float, bool, type(None)) else str(value)


def decode_entry(encoded: str) -> dict[str, Any]:
    """Read an entry that [`encode_entry`] wrote."""
    return ast.literal_eval(encoded)


def nearest(word: str, candidates: Collection[str]) -> str:
    """The clause `"; the nearest name is 'x'"`, or nothing where no candidate resembles `word`."""
    matches = difflib.get_close_matches(word, sorted(candidates), n=1, cutoff=0.5)
    return f"; the nearest name is {matches[0]!r}" if matches else ""
