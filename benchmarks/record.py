"""The JSON record of a benchmark: settings, machine and results, without a host name or a path."""

import json
import os
import platform
import subprocess
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch

_PACKAGES = ("oblr_trl", "torch", "transformers", "trl")
# Only the last part of a path is recorded: the rest describes this machine.
_PATH_SETTINGS = ("model", "output", "run_dir", "kept", "runs", "tuned_by")
_REPOSITORY = Path(__file__).resolve().parent.parent


def machine() -> dict[str, Any]:
    """Processor, cores, load and versions; `load_average` above 1 before the start tells a busy machine."""
    return {
        "cpu": _cpu_model(),
        "num_cores": os.cpu_count(),
        "num_threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 2),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "versions": {package: version(package) for package in _PACKAGES},
        "git_revision": _git_revision(),
    }


def write_record(path: str, arguments: Any, machine_at_start: dict[str, Any], results: dict[str, Any]) -> None:
    """Write settings (a dataclass), machine and results; the folder is made if it is missing."""
    settings = asdict(arguments)
    settings |= {name: Path(settings[name]).name for name in _PATH_SETTINGS if settings.get(name)}
    record = {"settings": settings, "machine": machine_at_start, **results}
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(to_json(record) + "\n")


def spread(values: Sequence[float]) -> dict[str, float | None]:
    """Mean and standard deviation, `None` for one value."""
    return {"mean": mean(values), "std": stdev(values) if len(values) > 1 else None}


def to_json(value: Any, indent: str = "") -> str:
    """JSON with every innermost list or object on a line of its own."""
    children = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    if not any(isinstance(child, dict | list | tuple) for child in children):
        return json.dumps(value)
    inner = indent + "  "
    if isinstance(value, dict):
        items = [f"{json.dumps(str(name))}: {to_json(child, inner)}" for name, child in value.items()]
    else:
        items = [to_json(child, inner) for child in value]
    brackets = "{}" if isinstance(value, dict) else "[]"
    return f"{brackets[0]}\n{inner}" + f",\n{inner}".join(items) + f"\n{indent}{brackets[1]}"


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _git_revision() -> str | None:
    """Revision of the sources, with `-dirty` where they were changed since; `None` outside a repository."""
    described = _git("rev-parse", "HEAD")
    if described is None:
        return None
    return described + ("-dirty" if _git("status", "--porcelain", "--untracked-files=no") else "")


def _git(*arguments: str) -> str | None:
    try:
        result = subprocess.run(["git", *arguments], cwd=_REPOSITORY, capture_output=True, text=True, check=True)
    except (FileNotFoundError, subprocess.CalledProcessError):
        return None
    return result.stdout.strip()
