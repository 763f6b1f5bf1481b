"""Tables and figures of the docs from `benchmarks/results/`, and a check of the numbers in the sentences about them.

    python -m benchmarks.report

rewrites the tables in docs/results.md and the figures in docs/figures. A module of `benchmarks.sections` turns each record into Markdown, which stands in docs/results.md between two
comments; all other text there, and the results section of README.md, is written by hand, and each of its decimal
numbers must stand in one of the tables. A figure carries the digest of the record and of the code that it was drawn
from, so that a stale one is found without comparing pixels.
"""

import argparse
import hashlib
import json
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from PIL import Image

from benchmarks.sections import (
    cost,
    deltas,
    gpu,
    kl_measures,
    learning,
    pass_profile,
    pretrained,
    pretrained_variance,
    score_memory,
    small_groups,
    snr,
    trust_region,
    variance,
    weights_choice,
)

ROOT = Path(__file__).parent.parent
# By the name of the record, `benchmarks/results/NAME.json`.
SECTIONS = {
    "small_groups": small_groups,
    "small_groups_graded": small_groups,
    "trust_region": trust_region,
    "trust_region_fresh": trust_region,
    "trust_region_before": trust_region,
    "deltas": deltas,
    "kl_measures": kl_measures,
    "learning": learning,
    "variance": variance,
    "weights_choice": weights_choice,
    "snr": snr,
    "cost": cost,
    "cost_pretrained": cost,
    "cost_vllm": cost,
    "pass_profile": pass_profile,
    "pass_profile_before": pass_profile,
    "score_memory": score_memory,
    "gpu": gpu,
    "pretrained": pretrained,
    "pretrained_cpu": pretrained,
    "pretrained_variance": pretrained_variance,
}
FIGURES = {
    "small_groups": "Held-out accuracy against rollouts by group size",
    "trust_region": "One delta against rates tuned for each setting",
    "learning": "Learning speed and collapse",
    "variance": "Variance of the gradient",
}
_README_SECTION = re.compile(r"<!-- results: begin.*?-->\n(.*?)<!-- results: end -->", flags=re.DOTALL)
_DIGEST = "Record"
_DOTS_PER_INCH = 120


class Section(NamedTuple):
    """A module of `benchmarks.sections` and its record."""

    module: ModuleType
    record: dict[str, Any]


def load_sections(root: Path = ROOT) -> dict[str, Section]:
    """The sections in order, each with its record."""
    results = root / "benchmarks" / "results"
    return {
        name: Section(module, json.loads((results / f"{name}.json").read_text())) for name, module in SECTIONS.items()
    }


def render(name: str, section: Section) -> str:
    """A section's block in docs/results.md: figure, tables and origin, with the comments around them."""
    module, record = section
    parts = [f"![{FIGURES[name]}](figures/{name}.png)"] if name in FIGURES else []
    return "\n\n".join(
        [f"<!-- {name}: begin -->", *parts, module.markdown(record), _origin(name, record), f"<!-- {name}: end -->"]
    )


def _origin(name: str, record: dict[str, Any]) -> str:
    """One line on the source of the numbers."""
    machine = record["machine"]
    revision, versions = machine["git_revision"], machine["versions"]
    short = "unknown" if revision is None else revision[:7] + "-dirty" * revision.endswith("-dirty")
    packages = ", ".join(f"{package} {versions[package]}" for package in ("torch", "transformers", "trl"))
    return (
        f"<sub>`benchmarks/results/{name}.json`, measured at commit {short} on {machine['cpu']}, "
        f"{machine['num_cores']} cores, {packages}.</sub>"
    )


def _block(name: str) -> re.Pattern[str]:
    return re.compile(f"<!-- {name}: begin -->.*?<!-- {name}: end -->", flags=re.DOTALL)


def replace_blocks(text: str, sections: dict[str, Section]) -> str:
    """`text` with every block replaced by its section's; a `ValueError` names a block whose comments are missing."""
    for name, section in sections.items():
        blocks = _block(name).findall(text)
        if len(blocks) != 1:
            raise ValueError(
                f"docs/results.md must have `<!-- {name}: begin -->` and `<!-- {name}: end -->` once: put them back."
            )
        text = text.replace(blocks[0], render(name, section))
    return text


def unsupported_numbers(written: str, tables: str) -> list[str]:
    """Decimal numbers of hand-written text, links aside, that stand in no table."""
    numbers = dict.fromkeys(re.findall(r"\d+\.\d+", re.sub(r"https?://\S+", "", written)))
    return [number for number in numbers if not re.search(rf"(?<![\d.]){re.escape(number)}(?!\d)", tables)]


def hand_written(root: Path = ROOT) -> dict[str, str]:
    """The sentences about the results by file: docs/results.md without its blocks, the README's section."""
    text = (root / "docs" / "results.md").read_text()
    for name in SECTIONS:
        text = _block(name).sub("", text)
    found = _README_SECTION.search((root / "README.md").read_text())
    if found is None:
        raise ValueError(
            "README.md has lost its markers `<!-- results: begin ... -->` and `<!-- results: end -->`: put them back."
        )
    return {"docs/results.md": text, "README.md": found.group(1)}


def digest(section: Section) -> str:
    """Digest of the source of a figure: its record and the text of its module."""
    content = json.dumps(section.record, sort_keys=True) + Path(str(section.module.__file__)).read_text()
    return hashlib.sha256(content.encode()).hexdigest()


def write(root: Path = ROOT) -> None:
    """Rewrite the tables and draw the figures whose record or code has changed."""
    sections, results = load_sections(root), root / "docs" / "results.md"
    results.write_text(replace_blocks(results.read_text(), sections))
    for path, section in _stale_figures(root, sections).items():
        path.parent.mkdir(parents=True, exist_ok=True)
        metadata = {_DIGEST: digest(section)}
        section.module.figure(section.record).savefig(path, dpi=_DOTS_PER_INCH, bbox_inches="tight", metadata=metadata)


def stale(root: Path = ROOT) -> list[str]:
    """Everything that does not belong to the records, in words; empty if everything does."""
    sections = load_sections(root)
    text = (root / "docs" / "results.md").read_text()
    found = [] if replace_blocks(text, sections) == text else ["docs/results.md"]
    found += [str(path.relative_to(root)) for path in _stale_figures(root, sections)]
    tables = "\n".join(render(name, section) for name, section in sections.items())
    for name, written in hand_written(root).items():
        found += [f"{number} in {name} (in no table)" for number in unsupported_numbers(written, tables)]
    return found


def _stale_figures(root: Path, sections: dict[str, Section]) -> dict[Path, Section]:
    paths = {root / "docs" / "figures" / f"{name}.png": sections[name] for name in FIGURES}
    return {path: section for path, section in paths.items() if _figure_digest(path) != digest(section)}


def _figure_digest(path: Path) -> str | None:
    if not path.is_file():
        return None
    with Image.open(path) as image:
        return image.info.get(_DIGEST)


def main() -> int:
    """Write; the exit status is 1 where a sentence does not belong to the tables."""
    write()
    found = stale()
    if found:
        sys.stdout.write(f"Stale: {', '.join(found)}. Correct the sentences.\n")
    return 1 if found else 0


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()  # for `--help`
    sys.exit(main())
