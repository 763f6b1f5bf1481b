"""Errors that name the field for what `datasets` and `transformers` load: files, directories and hub ids alike."""

import os
from collections.abc import Collection
from pathlib import Path

from datasets import Dataset, load_dataset
from datasets.exceptions import DatasetGenerationError
from transformers import PreTrainedConfig

from oblr_trl.data.tasks import nearest

FILE_BUILDERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet"}


def is_file(name: str) -> bool:
    """Whether `name` means a single file, which has no splits, rather than a hub id or a directory."""
    return Path(name).suffix in FILE_BUILDERS


def load_rows(name: str, *, field_name: str, config: str | None, split: str) -> Dataset:
    """
    Load one split of a hub dataset or of a local directory laid out like one, or a `.json`, `.jsonl` or `.parquet` file, which
    has neither configuration nor split; a slice as in `test[:100]` is taken of its rows. `field_name` is the field that gave the name, for errors.
    """
    try:
        if is_file(name):
            _, bracket, part = split.partition("[")
            return load_dataset(FILE_BUILDERS[Path(name).suffix], data_files=name, split=f"train{bracket}{part}")
        return load_dataset(name, config, split=split)
    except (DatasetGenerationError, OSError, StopIteration, ValueError) as error:  # StopIteration: a file without rows
        raise ValueError(
            f"`{field_name}` is {name!r}, which could not be loaded (configuration {config!r}, split {split!r}): "
            f"{str(error) or 'it has no rows'}. Give a hub id, a local directory laid out like a hub dataset, or a "
            ".json, .jsonl or .parquet file."
        ) from error


def check_model(name: str | None, *, revision: str | None = None) -> str:
    """
    Refuse a model that is no local directory and that the hub, or offline its cache, does not have; reads no weights. Returns the
    name, with `~` expanded.
    """
    if name is None:
        raise ValueError("`model_name_or_path` is not set: give a hub id or a local directory.")
    name = os.path.expanduser(name)
    if not Path(name).is_dir():
        try:
            PreTrainedConfig.get_config_dict(name, revision=revision)
        except OSError as error:
            raise ValueError(
                f"`model_name_or_path` is {name!r}, but there is no such directory (looked for from the working directory), and "
                f"the hub gives no such model ({str(error).splitlines()[0]}). In a clone of the repository `python -m "
                "examples.tiny_qwen3` makes the model of the tiny recipes."
            ) from None  # the hub's traceback says no more
    return name


def check_column(column: str, columns: Collection[str], *, field_name: str, source: str) -> None:
    """Refuse a column that `source` does not have, naming the nearest one that it has."""
    if column not in columns:
        raise ValueError(
            f"`{field_name}` is {column!r}, which {source} does not have{nearest(column, columns)}. Its columns: "
            f"{', '.join(columns)}."
        )
