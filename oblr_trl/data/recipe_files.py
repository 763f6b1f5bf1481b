"""Strict recipes: unknown keys are refused with the nearest name, an error takes one line."""

import dataclasses
import json
import sys
from collections.abc import Callable, Collection, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

import yaml
from trl import TrlParser

from oblr_trl.data.tasks import nearest

# Read by the parser itself rather than by one of the dataclasses.
PARSER_KEYS = ("config", "env")


def option(default: Any, text: str) -> Any:
    """A field of a dataclass of arguments, with its `help`."""
    return dataclasses.field(default=default, metadata={"help": text})


class RecipeParser(TrlParser):
    """
    Differs from `TrlParser` in that it raises its errors, without a usage of hundreds of lines, and in that its help begins with
    an `example`, the arguments of a command that works.
    """

    def __init__(self, dataclass_types: Sequence[Any], *, module: str, description: str, example: str):
        super().__init__(
            list(dataclass_types),
            prog=f"python -m {module}",
            usage=f"%(prog)s --config RECIPE [--KEY VALUE ...]\nexample: %(prog)s {example}",
            description=description,
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}. `--help` lists the keys.")

    def parse_strictly(self, tokens: Sequence[str], settings: Collection[str]) -> tuple:
        """Parse what [`command_line`] returned, after refusing the first unknown key of `settings` by name."""
        options = (option[2:] for option in self._option_string_actions if option.startswith("--"))
        check_keys(settings, {*options, *PARSER_KEYS})
        return self.parse_args_and_config(tokens)


def command_line(argv: Sequence[str] | None) -> tuple[list[str], dict[str, Any]]:
    """
    The tokens, by default those of the process, and what they and the recipe that they name set: values of tokens as text.

    TrlParser reads `--config x`, but not `--config=x`.
    """
    tokens = sys.argv[1:] if argv is None else argv
    tokens = [part for token in tokens for part in (token.split("=", 1) if token.startswith("--config=") else [token])]
    flags = {}
    for token, following in pairwise([*(tokens or ["--config"]), ""]):
        if token.startswith("--"):
            key, equals, value = token[2:].partition("=")
            flags[key] = value if equals else following
    path = flags.get("config")
    if path is None:
        return tokens, flags
    if not path or path.startswith("--"):
        raise ValueError("No recipe is given: write `--config FILE.yaml`. `--help` shows an example.")
    return tokens, read_recipe_file(path, flag="--config") | flags


def parse_or_exit(parse: Callable[[], Any], name: str) -> Any:
    """Call `parse`; its complaint becomes one line on stderr, without a traceback."""
    try:
        return parse()
    except ValueError as error:
        raise SystemExit(f"{name}: {error}") from error


def read_recipe_file(path: str | Path, *, flag: str) -> dict[str, Any]:
    """The keys of a recipe; `flag` is what named the file, for errors."""
    if not Path(path).is_file():
        raise ValueError(
            f"`{flag}` names {str(path)!r}, but there is no such file (looked for from the working directory)."
        )
    try:
        recipe = yaml.safe_load(Path(path).read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"The recipe {str(path)!r} is not YAML: {error}. Correct that line.") from error
    if not isinstance(recipe, dict):
        raise ValueError(f"The recipe {str(path)!r} must hold `key: value` lines, got {type(recipe).__name__}.")
    return recipe


def check_keys(keys: Collection[str], known: Collection[str]) -> None:
    """Refuse the first unknown key by name."""
    for key in keys:
        if key not in known:
            raise ValueError(f"Unknown key `{key}`{nearest(key, known)}.")


def parse_json_object(name: str, text: str) -> dict[str, Any]:
    """The JSON object that a command line gives for the key `name`."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        value = None
    if not isinstance(value, dict):
        raise ValueError(f'`{name}` is {text!r}, which is not a JSON object: write it like {{"name": "value"}}.')
    return value
