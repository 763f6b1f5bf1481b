"""The results in README.md and docs/results.md, written from `benchmarks/results/` and never by hand.

    python -m benchmarks.report            # rewrites both and the figures in docs/figures
    python -m benchmarks.report --check    # fails where one of them does not belong to the results

Every module of `benchmarks.sections` that `SECTIONS` names turns one record into Markdown and, if it has a `figure`, into a
picture. docs/results.md holds all of `markdown`; the README holds `summary` where a module has one. A picture carries the digest
of the record and of the code that it was drawn from, so that a stale one is found without comparing pixels.
"""

import argparse
import hashlib
import importlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from PIL import Image

ROOT = Path(__file__).parent.parent
SECTIONS = ("learning", "variance", "fidelity", "snr", "cost", "cost_vllm", "score_pass", "score_memory", "precision")
BEGIN = "<!-- results: begin; written by `make report`, do not edit -->\n"
END = "<!-- results: end -->\n"
PREFACE = "# Results\n\nWritten from `benchmarks/results/` by `make report`; do not edit. `make results` measures everything again.\n"
_DIGEST = "Record"
_DOTS_PER_INCH = 120


def load_sections(root: Path = ROOT) -> dict[str, tuple[ModuleType, dict[str, Any]]]:
    """
    The sections in order, each with its record.

    Raises:
        `ValueError`: If a record is missing or is no JSON.
    """
    sections = {}
    for name in SECTIONS:
        module = importlib.import_module(f"benchmarks.sections.{name}")
        path = root / "benchmarks" / "results" / module.RESULT
        try:
            sections[name] = (module, json.loads(path.read_text()))
        except (FileNotFoundError, json.JSONDecodeError) as error:
            raise ValueError(
                f"The section {name!r} needs {module.RESULT} ({error}). Run the command that its module names."
            ) from error
    return sections


def render_readme(root: Path = ROOT) -> str:
    """The README's section, from its begin to its end marker."""
    parts = [BEGIN]
    for name, (module, record) in load_sections(root).items():
        parts.append(f"### {module.TITLE}\n")
        if hasattr(module, "figure"):
            parts.append(f"![{module.TITLE}](docs/figures/{name}.png)\n")
        text = module.summary(record) if hasattr(module, "summary") else module.markdown(record)
        parts.append(text.strip() + "\n")
    return "\n".join(parts) + END


def render_results(root: Path = ROOT) -> str:
    """The text of docs/results.md."""
    parts = [PREFACE]
    for name, (module, record) in load_sections(root).items():
        parts.append(f"## {module.TITLE}\n")
        if hasattr(module, "figure"):
            parts.append(f"![{module.TITLE}](figures/{name}.png)\n")
        parts.append(module.markdown(record).strip() + "\n")
        parts.append(_origin(module, record) + "\n")
    return "\n".join(parts)


def _origin(module: ModuleType, record: dict[str, Any]) -> str:
    """One line that says where the numbers come from."""
    machine = record["machine"]
    versions = machine["versions"]
    packages = ", ".join(f"{package} {versions[package]}" for package in ("torch", "transformers", "trl"))
    return (
        f"<sub>`benchmarks/results/{module.RESULT}`, revision {_revision(machine['git_revision'])}, {machine['cpu']}, "
        f"{machine['num_cores']} cores, {packages}.</sub>"
    )


def _revision(revision: str | None) -> str:
    """The first digits of a revision, and whether the sources had been changed since."""
    if revision is None:
        return "unknown"
    return revision[:7] + ("-dirty" if revision.endswith("-dirty") else "")


def replace_section(text: str, section: str) -> str:
    """
    `text` with everything between the markers replaced.

    Raises:
        `ValueError`: If the markers are missing.
    """
    if BEGIN not in text or END not in text:
        raise ValueError(f"README.md has lost its markers {BEGIN.strip()!r} and {END.strip()!r}: put them back.")
    return text[: text.index(BEGIN)] + section + text[text.index(END) + len(END) :]


def digest(module: ModuleType, record: dict[str, Any]) -> str:
    """What a figure was drawn from: its record and the text of its module."""
    assert module.__file__ is not None
    content = json.dumps(record, sort_keys=True) + Path(module.__file__).read_text()
    return hashlib.sha256(content.encode()).hexdigest()


def write(root: Path = ROOT) -> None:
    """Rewrite the README's section and draw the figures whose record or code has changed."""
    readme = root / "README.md"
    text = replace_section(readme.read_text(), render_readme(root))
    results = render_results(root)
    for name, (module, record) in load_sections(root).items():
        if hasattr(module, "figure") and _figure_digest(root, name) != digest(module, record):
            _figure_path(root, name).parent.mkdir(parents=True, exist_ok=True)
            module.figure(record).savefig(
                _figure_path(root, name),
                dpi=_DOTS_PER_INCH,
                bbox_inches="tight",
                metadata={_DIGEST: digest(module, record)},
            )
    readme.write_text(text)
    _results_path(root).write_text(results)


def stale(root: Path = ROOT) -> list[str]:
    """What does not belong to the results, in words; empty if everything does."""
    text = (root / "README.md").read_text()
    found = [] if replace_section(text, render_readme(root)) == text else ["README.md"]
    if not _results_path(root).is_file() or _results_path(root).read_text() != render_results(root):
        found.append("docs/results.md")
    for name, (module, record) in load_sections(root).items():
        if hasattr(module, "figure") and _figure_digest(root, name) != digest(module, record):
            found.append(f"docs/figures/{name}.png")
    return found


def _results_path(root: Path) -> Path:
    return root / "docs" / "results.md"


def _figure_path(root: Path, name: str) -> Path:
    return root / "docs" / "figures" / f"{name}.png"


def _figure_digest(root: Path, name: str) -> str | None:
    path = _figure_path(root, name)
    if not path.is_file():
        return None
    with Image.open(path) as image:
        return image.info.get(_DIGEST)


def main(argv: Sequence[str] | None = None) -> int:
    """Write, or with `--check` compare; the exit status is 1 where something is stale."""
    parser = argparse.ArgumentParser(
        description="Write the results of README and docs from benchmarks/results.", allow_abbrev=False
    )
    parser.add_argument("--check", action="store_true", help="fail where README or figures are stale")
    if not parser.parse_args(argv).check:
        write()
        return 0
    found = stale()
    if found:
        sys.stdout.write(f"Stale: {', '.join(found)}. Run `make report` and commit what it writes.\n")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
