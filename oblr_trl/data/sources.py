"""What `datasets` and `transformers` do not do: errors that name the field, for files, directories and hub ids alike."""

from collections.abc import Collection
from pathlib import Path

from datasets import Dataset, load_dataset
from datasets.exceptions import DatasetGenerationError
from transformers import PreTrainedConfig

from oblr_trl.data.tasks import nearest

FILE_BUILDERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet"}


def is_file(name: str) -> bool:
    """Whether `name` means a single file, which has no splits, rather than a hub id or a directory."""
    return Path(name).suffix in FILE_BUILDERS or Path(name).is_file()


def load_rows(name: str, *, field_name: str, config: str | None, split: str) -> Dataset:
    """
    Load one split of a data set.

    Args:
        name (`str`):
            Hub id, local directory laid out like a hub data set, or `.json`, `.jsonl` or `.parquet` file.
        field_name (`str`):
            The field that gave the name, for errors.
        config (`str` or `None`):
            Configuration of a hub data set; a file has none.
        split (`str`):
            Split of a hub data set or directory; a file has none.

    Raises:
        `ValueError`: a source, configuration or split that does not exist, or a file without rows.
    """
    path = Path(name)
    try:
        if not is_file(name):
            return load_dataset(name, config, split=split)
        if path.suffix not in FILE_BUILDERS:
            raise ValueError(f"files with the suffix {path.suffix!r} cannot be read, only {', '.join(FILE_BUILDERS)}")
        if not path.is_file():
            raise FileNotFoundError(f"there is no file {path} (looked for from {Path.cwd()})")
        return load_dataset(FILE_BUILDERS[path.suffix], data_files=str(path), split="train")
    except (DatasetGenerationError, OSError, StopIteration, ValueError) as error:  # StopIteration: a file without rows
        raise ValueError(
            f"`{field_name}` is {name!r}, which could not be loaded (configuration {config!r}, split {split!r}): "
            f"{str(error) or 'it has no rows'}. Give a hub id, a local directory laid out like a hub data set, or a "
            ".json, .jsonl or .parquet file."
        ) from error


def check_model(name: str, *, revision: str | None = None) -> None:
    """Refuse a model that is no local directory and that the hub, or offline its cache, does not give; reads no weights."""
    if Path(name).is_dir():
        return
    hub = ""
    if not name.startswith((".", "/")):
        try:
            PreTrainedConfig.get_config_dict(name, revision=revision)
        except OSError as error:
            hub = f", and the hub gives none of that name ({str(error).splitlines()[0].rstrip('.')})"
        else:
            return
    raise ValueError(
        f"`model_name_or_path` is {name!r}, but there is no such directory (looked for from the working directory){hub}: "
        "correct the path or the hub id."
    )


def check_column(column: str, columns: Collection[str], *, field_name: str, source: str) -> None:
    """Refuse a column that `source` does not have, naming the nearest one that it has."""
    if column not in columns:
        raise ValueError(
            f"`{field_name}` is {column!r}, which {source} does not have{nearest(column, columns)}. Its columns: "
            f"{', '.join(columns)}."
        )
