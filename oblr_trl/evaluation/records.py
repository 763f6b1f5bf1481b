"""Files of an evaluation, such that one killed at any moment is continued: settings, and a JSON line per graded problem."""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

SETTINGS_FILE = "settings.json"
RESULTS_JSON = "results.json"
RESULTS_MARKDOWN = "results.md"
# Bytes of each file of weights that enter its fingerprint, at its start, middle and end.
_SAMPLE = 1 << 20
# With which every record begins, so that a cut one is told from a file of something else.
_BEGINNING = b'{"benchmark": '


class Records:
    """
    The graded problems of one benchmark, `<output_dir>/<benchmark>.jsonl`.

    A last line that was cut off by a kill is removed when the file is opened; its problem counts as not done.

    Args:
        path (`Path`):
            The file; it need not exist.

    Raises:
        `ValueError`: a line that is not a record, or a problem recorded twice.
    """

    def __init__(self, path: Path):
        self.path = path
        self.by_index: dict[int, dict[str, Any]] = {}
        if path.is_file():
            content = path.read_bytes()
            whole = content.rfind(b"\n") + 1  # every record ends with a line break
            if not content[whole:].startswith(_BEGINNING[: len(content) - whole]):
                raise ValueError(f"{path}: not a file of graded problems. Set another `output_dir`.")
            for number, record in enumerate(parse_json_lines(content[:whole], path), start=1):
                if not isinstance(record.get("index"), int) or not isinstance(record.get("correct"), list):
                    raise ValueError(
                        f"{path}, line {number}: not a graded problem. Remove that line, or set another `output_dir`."
                    )
                if record["index"] in self.by_index:
                    raise ValueError(
                        f"{path}, line {number}: problem {record['index']} is there twice. Remove one line."
                    )
                self.by_index[record["index"]] = record
            os.truncate(path, whole)

    def append(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Write records and wait until they are on the disk; those that the file holds already are left out."""
        missing = [dict(record) for record in records if record["index"] not in self.by_index]
        with self.path.open("ab") as file:
            file.write("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in missing).encode())
            file.flush()
            os.fsync(file.fileno())
        self.by_index.update({record["index"]: record for record in missing})


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The objects in a JSONL file, with errors that name the line."""
    return parse_json_lines(path.read_bytes(), path)


def parse_json_lines(content: bytes, path: Path) -> list[dict[str, Any]]:
    """The objects in the content of the JSONL file `path`."""
    rows = []
    for number, line in enumerate(content.splitlines(), start=1):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number}: not a JSON object, {line[:80]!r}. Correct or remove that line.")
        rows.append(row)
    return rows


def settle(output_dir: Path, settings: Mapping[str, Any], benchmarks: Mapping[str, Mapping[str, Any]]) -> None:
    """
    Record the settings of an evaluation, or refuse to continue one of other settings.

    Args:
        output_dir (`Path`):
            Where the evaluation is.
        settings (`dict`):
            What decides over completions and grades.
        benchmarks (`dict[str, dict]`):
            The same of each benchmark; benchmarks may be added to an evaluation.

    Raises:
        `ValueError`: a setting differs from the recorded one, named with both values.
    """
    path = output_dir / SETTINGS_FILE
    recorded: dict[str, Any] = {"settings": dict(settings), "benchmarks": {}}
    if path.is_file():
        recorded = json.loads(path.read_text())
        pairs = [("", recorded["settings"], dict(settings))]
        pairs += [
            (f"benchmarks.{name}.", recorded["benchmarks"][name], dict(wanted))
            for name, wanted in benchmarks.items()
            if name in recorded["benchmarks"]
        ]
        for prefix, old, new in pairs:
            for key in dict.fromkeys([*old, *new]):
                if old.get(key) != json.loads(json.dumps(new.get(key))):
                    raise ValueError(
                        f"`{prefix}{key}` was {old.get(key)!r} when the evaluation in {str(output_dir)!r} began, and is "
                        f"{new.get(key)!r} now, so that it cannot be continued: set it back, or set another `output_dir`."
                    )
    recorded["benchmarks"] |= {name: dict(wanted) for name, wanted in benchmarks.items()}
    output_dir.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(recorded, indent=2) + "\n")


def write_atomically(path: Path, text: str) -> None:
    """Write a file that is either whole or as it was."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def weights_fingerprint(name: str) -> str | None:
    """
    Hash that tells the weights in a local directory from others of the same name, such as those of a longer training;
    `None` for a hub id. Of each file it reads the size and three samples of 1 MiB, which differ after any training step.
    """
    directory = Path(name)
    if not directory.is_dir():
        return None
    digest = hashlib.sha256()
    for path in sorted([*directory.glob("*.safetensors"), *directory.glob("*.bin"), *directory.glob("*config.json")]):
        size = path.stat().st_size
        digest.update(f"{path.name}/{size}/".encode())
        with path.open("rb") as file:
            for start in (0, max(0, size // 2), max(0, size - _SAMPLE)):
                file.seek(start)
                digest.update(file.read(_SAMPLE))
    return digest.hexdigest()[:16]
