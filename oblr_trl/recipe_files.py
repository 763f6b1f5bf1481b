"""What `TrlParser` does not do: recipes and command lines whose unknown keys are refused with the nearest known name."""

import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import yaml
from trl import TrlParser

from oblr_trl.tasks import nearest

# Read by the parser itself rather than by one of the dataclasses.
PARSER_KEYS = ("config", "env")


def command_line(argv: Sequence[str] | None) -> list[str]:
    """The tokens, by default those of the process; TrlParser reads `--config x`, but not `--config=x`."""
    tokens = sys.argv[1:] if argv is None else argv
    return [part for token in tokens for part in (token.split("=", 1) if token.startswith("--config=") else [token])]


def read_recipe(argv: list[str]) -> dict[str, Any]:
    """
    The recipe that `--config` names, empty without one.

    Raises:
        `ValueError`: a file that does not exist or holds no `key: value` lines.
    """
    path = flag_value(argv, "config")
    return {} if path is None else read_recipe_file(path, flag="--config")


def read_recipe_file(path: str | Path, *, flag: str) -> dict[str, Any]:
    """
    The keys of a recipe.

    Args:
        path (`str` or `Path`):
            The file.
        flag (`str`):
            What named it, for errors.

    Raises:
        `ValueError`: a file that does not exist or holds no `key: value` lines.
    """
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
    for position, token in enumerate(argv):
        if token == f"--{name}" and position + 1 < len(argv):
            return argv[position + 1]
        if token.startswith(f"--{name}="):
            return token.split("=", 1)[1]
    return None


def given_keys(argv: list[str], recipe: dict[str, Any]) -> list[str]:
    """The keys of the recipe and those of the command line."""
    return list(dict.fromkeys([*recipe, *(token[2:].split("=")[0] for token in argv if token.startswith("--"))]))


def known_keys(parser: TrlParser) -> set[str]:
    """What a recipe or command line of this parser may set."""
    options = {option[2:] for action in parser._actions for option in action.option_strings if option[:2] == "--"}
    return {action.dest for action in parser._actions} | options | set(PARSER_KEYS)


def check_keys(keys: Collection[str], known: Collection[str]) -> None:
    """Refuse the first unknown key by name."""
    for key in keys:
        if key not in known:
            raise ValueError(f"Unknown key `{key}`{nearest(key, known)}.")
