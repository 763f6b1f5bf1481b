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


def command_line(argv: Sequence[str] | None) -> list[str]:
    """The tokens, by default those of the process; TrlParser reads `--config x`, but not `--config=x`."""
    tokens = sys.argv[1:] if argv is None else argv
    tokens = [part for token in tokens for part in (token.split("=", 1) if token.startswith("--config=") else [token])]
    for token, following in pairwise([*(tokens or ["--config"]), ""]):
        if token == "--config" and (not following or following.startswith("--")):
            raise ValueError("No recipe is given: write `--config FILE.yaml`. `--help` shows an example.")
    return tokens


def parse_or_exit(parse: Callable[[], Any], name: str) -> Any:
    """Call `parse`; its complaint becomes one line on stderr, without a traceback."""
    try:
        return parse()
    except ValueError as error:
        raise SystemExit(f"{name}: {error}") from error


def read_recipe(argv: list[str]) -> dict[str, Any]:
    """The recipe that `--config` names, empty without one."""
    path = flag_value(argv, "config")
    return {} if path is None else read_recipe_file(path, flag="--config")


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


def flag_value(argv: list[str], name: str) -> str | None:
    """The value of `--name value` or `--name=value`."""
    for token, following in pairwise([*argv, None]):
        assert token is not None
        if token == f"--{name}" and following is not None:
            return following
        if token.startswith(f"--{name}="):
            return token.split("=", 1)[1]
    return None


def given_keys(argv: list[str], recipe: dict[str, Any]) -> list[str]:
    """The keys of the recipe and those of the command line."""
    return list(dict.fromkeys([*recipe, *(token[2:].split("=")[0] for token in argv if token.startswith("--"))]))


def known_keys(parser: TrlParser) -> set[str]:
    """The keys that a recipe or command line of this parser may set."""
    options = {option[2:] for action in parser._actions for option in action.option_strings if option[:2] == "--"}
    return {action.dest for action in parser._actions} | options | set(PARSER_KEYS)


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
