"""Prompt sets for verifiable rewards: the `prompt` column TRL's trainers read, plus the columns that rewards need.

Three sources, one interface: a reasoning-gym task, a local JSON, JSONL or Parquet file, a hub data set (or a local
directory laid out like one). Every complaint is a `ValueError` raised before a model is loaded.
"""

import json
import logging
from dataclasses import dataclass, field
from typing import Any

from datasets import Dataset, DatasetDict

from oblr_trl.data.answers import compile_answer_pattern, extract_answer
from oblr_trl.data.prompts import check_template, format_prompts
from oblr_trl.data.recipe_files import parse_json_object
from oblr_trl.data.sources import check_column, is_file, load_rows
from oblr_trl.data.tasks import CANDIDATES_PER_PROMPT, encode_entry, task_entries

logger = logging.getLogger(__name__)

DEFAULT_TASK_TRAIN_SIZE = 4096
DEFAULT_TASK_TEST_SIZE = 512


@dataclass
class DataArguments:
    """
    Where the prompts come from. Exactly one of `task` and `dataset_name` is set.

    Args:
        task (`str`, *optional*):
            Name of a [reasoning-gym](https://github.com/open-thought/reasoning-gym) task, e.g. `"chain_sum"`. Its
            prompts are generated, and its own scorer is the reward `"task"`.
        task_params (`dict` or `str`, *optional*):
            Parameters of the task, e.g. `{"min_terms": 2, "max_terms": 3}`; on the command line a JSON object.
        dataset_name (`str`, *optional*):
            Hub id of a data set, a local directory laid out like one, or a `.json`, `.jsonl` or `.parquet` file.
        dataset_config (`str`, *optional*):
            Configuration of a hub data set, the `name` of [`~datasets.load_dataset`].
        dataset_train_split (`str`, *optional*, defaults to `"train"`):
            Split to train on.
        dataset_test_split (`str`, *optional*, defaults to `"test"`):
            Split to evaluate on. A single file has no splits: `test_size` of its rows are held out instead.
        dataset_test_name (`str`, *optional*):
            Data set or file that holds the test prompts, where it is not `dataset_name`.
        train_size (`int`, *optional*):
            Number of training prompts. Defaults to 4096 for a task, to all rows for a data set.
        test_size (`int`, *optional*):
            Number of test prompts. Defaults to 512 for a task, to all rows of the test split for a data set.
        train_seed (`int`, *optional*, defaults to `0`):
            Seed of the training prompts of a task, and of the choice of `train_size` rows of a data set.
        test_seed (`int`, *optional*, defaults to `1000000000`):
            Seed of the test prompts. Tasks seed prompt number i with `seed + i`, hence the distance from `train_seed`.
        prompt_column (`str`, *optional*, defaults to `"prompt"`):
            Column of a data set that holds the prompt: a string or a list of messages.
        answer_column (`str`, *optional*):
            Column of a data set that holds the reference answer; it is renamed to `solution`, the name that
            `accuracy_reward` reads.
        answer_pattern (`str`, *optional*):
            Regular expression whose one group is the answer in `answer_column`, e.g. `"#### (.+)"` for GSM8K.
        answer_template (`str`, *optional*):
            Text put around every answer; `{answer}` in it is replaced by the answer. `"${answer}$"` is for LaTeX
            without dollar signs, as in MATH: `accuracy_reward` would read `2\\sqrt{3}` as 2.
        prompt_template (`str`, *optional*):
            Text put around every string prompt; `{prompt}` in it is replaced by the prompt.
        conversational (`bool`, *optional*, defaults to `False`):
            Whether to turn every string prompt into a conversation of one user message, for models with a chat
            template.
        system_prompt (`str`, *optional*):
            System message put before every conversation.
    """

    task: str | None = field(default=None, metadata={"help": "Name of a reasoning-gym task."})
    task_params: dict | str | None = field(
        default=None, metadata={"help": 'Parameters of the task, a JSON object, e.g. `{"max_terms": 3}`.'}
    )
    dataset_name: str | None = field(
        default=None,
        metadata={"help": "Hub id of a data set, local directory laid out like one, or JSON, JSONL or Parquet file."},
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a hub data set."})
    dataset_train_split: str = field(default="train", metadata={"help": "Split to train on."})
    dataset_test_split: str = field(default="test", metadata={"help": "Split to evaluate on."})
    dataset_test_name: str | None = field(default=None, metadata={"help": "Data set or file with the test prompts."})
    train_size: int | None = field(default=None, metadata={"help": "Number of training prompts."})
    test_size: int | None = field(default=None, metadata={"help": "Number of test prompts."})
    train_seed: int = field(default=0, metadata={"help": "Seed of the training prompts."})
    test_seed: int = field(default=1_000_000_000, metadata={"help": "Seed of the test prompts."})
    prompt_column: str = field(default="prompt", metadata={"help": "Column of a data set that holds the prompt."})
    answer_column: str | None = field(default=None, metadata={"help": "Column with the reference answer."})
    answer_pattern: str | None = field(default=None, metadata={"help": "Regular expression; its group is the answer."})
    answer_template: str | None = field(default=None, metadata={"help": "Text around every `{answer}`."})
    prompt_template: str | None = field(default=None, metadata={"help": "Text around every `{prompt}`."})
    conversational: bool = field(default=False, metadata={"help": "Whether to make every prompt a conversation."})
    system_prompt: str | None = field(default=None, metadata={"help": "System message put before every conversation."})

    def __post_init__(self):
        if (self.task is None) == (self.dataset_name is None):
            raise ValueError(
                f"Exactly one source of prompts is needed, got task={self.task!r} and "
                f"dataset_name={self.dataset_name!r}: set one of them and leave the other out."
            )
        if isinstance(self.task_params, str):
            self.task_params = parse_json_object("task_params", self.task_params)
        if self.task is None and self.task_params:
            raise ValueError(
                "`task_params` belongs to a reasoning-gym `task`, but none is set: remove it or set `task`."
            )
        for name in ("dataset_config", "dataset_test_name"):
            if self.task is not None and getattr(self, name) is not None:
                raise ValueError(
                    f"`{name}` belongs to `dataset_name`, but the prompts of a `task` are made: remove it."
                )
        for name in ("train_size", "test_size"):
            size = getattr(self, name)
            if size is not None and size < 1:
                raise ValueError(f"`{name}` is {size}, but a prompt set needs at least one prompt: set {name} >= 1.")
        check_template(self.prompt_template)
        for name in ("answer_pattern", "answer_template"):
            if self.answer_column is None and getattr(self, name) is not None:
                raise ValueError(f"`{name}` is for the answers of `answer_column`, which is not set: set it.")
        if self.answer_template is not None and "{answer}" not in self.answer_template:
            raise ValueError(
                f"`answer_template` is {self.answer_template!r}, which would drop the answer: put `{{answer}}` in it."
            )
        compile_answer_pattern(self.answer_pattern, field_name="answer_pattern")


def load_prompts(args: DataArguments, *, with_test: bool = True) -> DatasetDict:
    """
    Load training prompts and, on request, held-out test prompts; no test prompt is left in the training set.

    Args:
        args ([`DataArguments`]):
            Where the prompts come from.
        with_test (`bool`, *optional*, defaults to `True`):
            Whether to load the test prompts too.

    Returns:
        [`~datasets.DatasetDict`]:
            Splits `train` and, with `with_test`, `test`. Rows of a task have the columns `prompt`, `solution` and
            `entry` (see [`decode_entry`]); rows of a data set keep their columns beside `prompt` and `solution`.

    Raises:
        `ValueError`: a source, split or column that does not exist, or an empty prompt set.
    """
    splits = _load_task(args, with_test) if args.task is not None else _load_dataset(args, with_test)
    splits = {name: _name_columns(split, args, name) for name, split in splits.items()}
    if "test" in splits:
        splits["train"] = _without_test_prompts(splits["train"], splits["test"])
    splits = {name: _format_answers(split, args, name) for name, split in splits.items()}
    return DatasetDict({name: _format_prompts(split, args) for name, split in splits.items()})


def _load_task(args: DataArguments, with_test: bool) -> dict[str, Dataset]:
    assert args.task is not None
    assert not isinstance(args.task_params, str)
    sizes = {"train": args.train_size or DEFAULT_TASK_TRAIN_SIZE, "test": args.test_size or DEFAULT_TASK_TEST_SIZE}
    seeds = {"train": args.train_seed, "test": args.test_seed}
    first, second = sorted(seeds, key=seeds.__getitem__)
    if seeds[first] + CANDIDATES_PER_PROMPT * sizes[first] > seeds[second]:
        raise ValueError(
            f"`train_seed` {args.train_seed} and `test_seed` {args.test_seed} are too close: prompt i uses seed + i, so "
            f"the two sets would share prompts. Set them at least {CANDIDATES_PER_PROMPT * sizes[first]} apart."
        )
    # The test set is made, and removed from the training set, also where nobody evaluates during training: whoever
    # evaluates the saved model later with the same arguments must find unseen prompts.
    test = task_entries(args.task, args.task_params, size=sizes["test"], seed=seeds["test"], distinct=True)
    train = task_entries(
        args.task,
        args.task_params,
        size=sizes["train"],
        seed=seeds["train"],
        excluded_questions={entry["question"] for entry in test},
    )
    splits = {"train": train, "test": test} if with_test else {"train": train}
    return {name: Dataset.from_list([_task_row(entry) for entry in rows]) for name, rows in splits.items()}


def _task_row(entry: dict[str, Any]) -> dict[str, str | None]:
    solution = (
        None if entry["answer"] is None else str(entry["answer"])
    )  # some tasks have many right answers and name none
    return {"prompt": entry["question"], "solution": solution, "entry": encode_entry(entry)}


def _load_dataset(args: DataArguments, with_test: bool) -> dict[str, Dataset]:
    assert args.dataset_name is not None
    train = _load_split(args, "dataset_name", args.dataset_train_split)
    if args.dataset_test_name is None and is_file(args.dataset_name):
        return _hold_out(train, args, with_test)
    splits = {"train": _subset(train, "train_size", args.train_size, args.train_seed)}
    if with_test:
        test_field = "dataset_name" if args.dataset_test_name is None else "dataset_test_name"
        test = _load_split(args, test_field, args.dataset_test_split)
        splits["test"] = _subset(test, "test_size", args.test_size, args.test_seed)
    return splits


def _load_split(args: DataArguments, field_name: str, split: str) -> Dataset:
    config = args.dataset_config if field_name == "dataset_name" else None
    return load_rows(getattr(args, field_name), field_name=field_name, config=config, split=split)


def _hold_out(rows: Dataset, args: DataArguments, with_test: bool) -> dict[str, Dataset]:
    if args.test_size is None:
        if with_test:
            raise ValueError(
                f"`dataset_name` is the single file {args.dataset_name!r}, so there is no test split to evaluate on: set "
                "`test_size` to hold out that many of its rows, set `dataset_test_name`, or set `eval_strategy: no`."
            )
        return {"train": _subset(rows, "train_size", args.train_size, args.train_seed)}
    if args.test_size >= len(rows):
        raise ValueError(f"`test_size` is {args.test_size}, but {args.dataset_name!r} has {len(rows)} rows: lower it.")
    splits = dict(rows.train_test_split(test_size=args.test_size, seed=args.test_seed))
    splits["train"] = _subset(splits["train"], "train_size", args.train_size, args.train_seed)
    return splits if with_test else {"train": splits["train"]}


def _subset(rows: Dataset, field_name: str, size: int | None, seed: int) -> Dataset:
    if size is None or size == len(rows):
        return rows
    if size > len(rows):
        raise ValueError(f"`{field_name}` is {size}, but the split has {len(rows)} rows: lower it or leave it out.")
    return rows.shuffle(seed=seed).select(range(size))


def _name_columns(rows: Dataset, args: DataArguments, split_name: str) -> Dataset:
    for field_name, column, new_name in (
        ("prompt_column", args.prompt_column, "prompt"),
        ("answer_column", args.answer_column, "solution"),
    ):
        if column is None or (column == new_name and column in rows.column_names):
            continue
        source = f"the {split_name} set of {args.task or args.dataset_name!r}"
        check_column(column, rows.column_names, field_name=field_name, source=source)
        if new_name in rows.column_names:
            rows = rows.remove_columns(new_name)
        rows = rows.rename_column(column, new_name)
    return rows


def _without_test_prompts(train: Dataset, test: Dataset) -> Dataset:
    held_out = {json.dumps(prompt) for prompt in test["prompt"]}
    kept = [i for i, prompt in enumerate(train["prompt"]) if json.dumps(prompt) not in held_out]
    if not kept:
        raise ValueError(
            "Every training prompt is also a test prompt, so nothing is left to train on: choose another "
            "`dataset_train_split`, or test on another `dataset_test_split` or `dataset_test_name`."
        )
    if len(kept) < len(train):
        logger.warning("Left %d training prompts out because they are test prompts too.", len(train) - len(kept))
    return train if len(kept) == len(train) else train.select(kept)


def _format_answers(rows: Dataset, args: DataArguments, split_name: str) -> Dataset:
    if args.answer_pattern is None and args.answer_template is None:
        return rows
    pattern = compile_answer_pattern(args.answer_pattern, field_name="answer_pattern")
    answers = [extract_answer(cell, pattern) for cell in rows["solution"]]
    if None in answers:
        index = answers.index(None)
        raise ValueError(
            f"Row {index} of the {split_name} set of {args.dataset_name!r} has no answer in `answer_column` "
            f"{args.answer_column!r}: {rows['solution'][index]!r} with `answer_pattern` {args.answer_pattern!r}. Correct "
            "the pattern, or correct or remove the row."
        )
    template = args.answer_template or "{answer}"
    written = [template.replace("{answer}", str(answer)) for answer in answers]
    return rows.remove_columns("solution").add_column("solution", written)


def _format_prompts(rows: Dataset, args: DataArguments) -> Dataset:
    prompts = format_prompts(
        list(rows["prompt"]),
        source=repr(args.task or args.dataset_name),
        template=args.prompt_template,
        conversational=args.conversational,
        system_prompt=args.system_prompt,
    )
    formatted = rows.add_column("formatted", prompts)
    return formatted.remove_columns("prompt").rename_column("formatted", "prompt")  # never without any column
