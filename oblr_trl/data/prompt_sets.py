"""Prompt sets for verifiable rewards: the `prompt` column TRL's trainers read, plus the columns that rewards need.

Three sources, one interface: a reasoning-gym task, a local JSON, JSONL or Parquet file, a hub dataset (or a local
directory laid out like one). Every complaint comes before a model is loaded.
"""

import json
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from datasets import Dataset, DatasetDict

from oblr_trl.data.answers import check_answer_pattern, extract_answer
from oblr_trl.data.prompts import PromptArguments, check_template, format_prompts
from oblr_trl.data.recipe_files import option, parse_json_object
from oblr_trl.data.sources import check_column, is_file, load_rows
from oblr_trl.data.tasks import encode_entry, task_entries

logger = logging.getLogger(__name__)

DEFAULT_TASK_SIZES = {"train": 4096, "test": 512}
# Without the second the first would be without effect.
OWNERS = {
    "task_params": "task",
    "dataset_config": "dataset_name",
    "dataset_test_name": "dataset_name",
    "answer_pattern": "answer_column",
    "answer_template": "answer_column",
}


@dataclass
class DataArguments(PromptArguments):
    """Where the prompts come from: exactly one of `task` and `dataset_name`. Fields are documented by their `help`."""

    task: str | None = option(
        None,
        "Name of a reasoning-gym task, e.g. `chain_sum`: it makes the prompts, and its own scorer is the reward `task`.",
    )
    task_params: dict | str | None = option(  # noqa: RUF009
        None, 'Parameters of the task, a JSON object, e.g. `{"max_terms": 3}`.'
    )
    dataset_name: str | None = option(
        None, "Hub id of a dataset, local directory laid out like one, or `.json`, `.jsonl` or `.parquet` file."
    )
    dataset_config: str | None = option(None, "Configuration of a hub dataset, the `name` of `load_dataset`.")
    dataset_train_split: str = option("train", "Split to train on.")
    dataset_test_split: str = option(
        "test", "Split to evaluate on. A single file has no splits: `test_size` of its rows are held out instead."
    )
    dataset_test_name: str | None = option(
        None, "Dataset or file that holds the test prompts, where it is not `dataset_name`."
    )
    train_size: int | None = option(
        None, "Number of training prompts. Defaults to 4096 for a task, to all rows for a dataset."
    )
    test_size: int | None = option(
        None, "Number of test prompts. Defaults to 512 for a task, to all rows of the test split for a dataset."
    )
    train_seed: int = option(
        0, "Seed of the training prompts of a task, and of the choice of `train_size` rows of a dataset."
    )
    test_seed: int = option(
        1_000_000_000,
        "Seed of the test prompts. Tasks seed prompt i with `seed` + i, hence the distance from `train_seed`.",
    )
    prompt_column: str = option("prompt", "Column of a dataset that holds the prompt: a string or a list of messages.")
    answer_column: str | None = option(
        None, "Column with the reference answer; it is renamed to `solution`, the name that `accuracy_reward` reads."
    )
    answer_pattern: str | None = option(
        None, "Regular expression whose one group is the answer in `answer_column`, e.g. `#### (.+)` for GSM8K."
    )
    answer_template: str | None = option(
        None,
        "Text around every answer, which replaces `{answer}` in it. `${answer}$` is for LaTeX without dollar signs, as in "
        r"MATH: `accuracy_reward` would read `2\sqrt{3}` as 2.",
    )

    def __post_init__(self):
        if (self.task is None) == (self.dataset_name is None):
            raise ValueError(
                f"Exactly one source of prompts is needed, got task={self.task!r} and "
                f"dataset_name={self.dataset_name!r}: set one of them and leave the other out."
            )
        for name, owner in OWNERS.items():
            if getattr(self, name) not in (None, {}) and getattr(self, owner) is None:
                raise ValueError(f"`{name}` is for `{owner}`, which is not set: remove it or set `{owner}`.")
        if isinstance(self.task_params, str):
            self.task_params = parse_json_object("task_params", self.task_params)
        for name in ("train_size", "test_size"):
            size = getattr(self, name)
            if size is not None and size < 1:
                raise ValueError(f"`{name}` is {size}, but a prompt set needs at least one prompt: set {name} >= 1.")
        super().__post_init__()
        check_template(self.answer_template, field_name="answer_template")
        check_answer_pattern(self.answer_pattern, field_name="answer_pattern")


def load_prompts(args: DataArguments, *, with_test: bool = True) -> DatasetDict:
    """
    Load training prompts and, on request, held-out test prompts; no test prompt is left in the training set.

    Returns the splits `train` and, with `with_test`, `test`. Rows of a task have the columns `prompt`, `solution` and `entry`
    (see [`decode_entry`]); rows of a dataset keep their columns in addition to `prompt` and `solution`.
    """
    splits = _load_dataset(args, with_test) if args.task is None else _load_task(args)
    splits = {name: _format(rows, args, name) for name, rows in splits.items()}
    if "test" in splits:
        splits["train"] = _without_test_prompts(splits["train"], splits["test"])
    return DatasetDict({name: rows for name, rows in splits.items() if name == "train" or with_test})


def _load_task(args: DataArguments) -> dict[str, Dataset]:
    assert args.task is not None
    assert not isinstance(args.task_params, str)
    sizes = {name: getattr(args, f"{name}_size") or size for name, size in DEFAULT_TASK_SIZES.items()}
    # Also where nobody evaluates during training: whoever evaluates the saved model later with the same arguments must find
    # unseen prompts.
    test = task_entries(args.task, args.task_params, size=sizes["test"], seed=args.test_seed, distinct=True)
    held_out = {entry["question"] for entry in test}
    train = task_entries(
        args.task, args.task_params, size=sizes["train"], seed=args.train_seed, excluded_questions=held_out
    )
    return {
        name: Dataset.from_list([_task_row(e) for e in entries])
        for name, entries in (("train", train), ("test", test))
    }


def _task_row(entry: dict[str, Any]) -> dict[str, str | None]:
    answer = entry["answer"]  # some tasks have many right answers and name none
    solution = None if answer is None else str(answer)
    return {"prompt": entry["question"], "solution": solution, "entry": encode_entry(entry)}


def _load_dataset(args: DataArguments, with_test: bool) -> dict[str, Dataset]:
    assert args.dataset_name is not None
    splits = {"train": _load_split(args, "dataset_name", args.dataset_train_split)}
    if args.dataset_test_name is None and is_file(args.dataset_name):
        if args.test_size is not None:  # held out also where nobody evaluates, as for a task
            splits = dict(splits["train"].train_test_split(test_size=args.test_size, seed=args.test_seed))
        elif with_test:
            raise ValueError(
                f"`dataset_name` is the single file {args.dataset_name!r}, so there is no test split to evaluate on: set "
                "`test_size` to hold out that many of its rows, set `dataset_test_name`, or set `eval_strategy: no`."
            )
    elif with_test:
        test_field = "dataset_name" if args.dataset_test_name is None else "dataset_test_name"
        splits["test"] = _load_split(args, test_field, args.dataset_test_split)
    return {name: _subset(rows, args, name) for name, rows in splits.items()}


def _load_split(args: DataArguments, field_name: str, split: str) -> Dataset:
    config = args.dataset_config if field_name == "dataset_name" else None
    return load_rows(getattr(args, field_name), field_name=field_name, config=config, split=split)


def _subset(rows: Dataset, args: DataArguments, split: str) -> Dataset:
    size, seed = getattr(args, f"{split}_size"), getattr(args, f"{split}_seed")
    if size is None or size == len(rows):
        return rows
    if size > len(rows):
        raise ValueError(f"`{split}_size` is {size}, but the split has {len(rows)} rows: lower it or leave it out.")
    return rows.shuffle(seed=seed).select(range(size))


def _format(rows: Dataset, args: DataArguments, split: str) -> Dataset:
    """Name the columns `prompt` and `solution`, and put the contents into the form that model and rewards read."""
    source = f"the {split} set of {args.task or args.dataset_name!r}"
    for field_name, column, name in (
        ("prompt_column", args.prompt_column, "prompt"),
        ("answer_column", args.answer_column, "solution"),
    ):
        if column is not None:
            check_column(column, rows.column_names, field_name=field_name, source=source)
        if column not in (None, name):
            rows = rows.remove_columns(set(rows.column_names) & {name}).rename_column(column, name)
    if args.answer_pattern is not None or args.answer_template is not None:
        rows = _replace_column(rows, "solution", _format_answers(rows["solution"], args, source))
    return _replace_column(rows, "prompt", format_prompts(list(rows["prompt"]), args, source=source))


def _format_answers(cells: Iterable[Any], args: DataArguments, source: str) -> list[str]:
    written = []
    for index, cell in enumerate(cells):
        answer = extract_answer(cell, args.answer_pattern)
        if answer is None:
            raise ValueError(
                f"Row {index} of {source} has no answer in `answer_column` {args.answer_column!r}: {cell!r} with "
                f"`answer_pattern` {args.answer_pattern!r}. Correct the pattern, or correct or remove the row."
            )
        written.append((args.answer_template or "{answer}").replace("{answer}", answer))
    return written


def _replace_column(rows: Dataset, name: str, values: list[Any]) -> Dataset:
    """The new column comes before the old one goes: a dataset without any column has no rows."""
    return rows.add_column("__new", values).remove_columns(name).rename_column("__new", name)


def _without_test_prompts(train: Dataset, test: Dataset) -> Dataset:
    held_out = {json.dumps(prompt) for prompt in test["prompt"]}
    kept = [i for i, prompt in enumerate(train["prompt"]) if json.dumps(prompt) not in held_out]
    if len(kept) == len(train):
        return train
    logger.warning("Left %d training prompts out because they are test prompts too.", len(train) - len(kept))
    return train.select(kept)
