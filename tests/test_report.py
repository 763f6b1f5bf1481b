"""The README's results belong to the records, and a stale README or figure is found."""

import json
import re
import shutil
from pathlib import Path

import pytest

from benchmarks import report

README = report.ROOT / "README.md"


@pytest.fixture
def copy(tmp_path):
    """README, records and figures alone, where they can be changed."""
    shutil.copy(README, tmp_path / "README.md")
    shutil.copytree(report.ROOT / "benchmarks" / "results", tmp_path / "benchmarks" / "results")
    shutil.copytree(report.ROOT / "docs" / "figures", tmp_path / "docs" / "figures")
    shutil.copy(report.ROOT / "docs" / "results.md", tmp_path / "docs" / "results.md")
    return tmp_path


def change(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def test_readme_and_figures_belong_to_the_records():
    assert report.stale() == [], "run `make report` and commit what it writes"


def short_version() -> str:
    return README.read_text().split("In short, and said plainly:")[1].split(report.BEGIN)[0]


def test_every_number_of_the_short_version_stands_in_the_results():
    results = (report.ROOT / "docs" / "results.md").read_text()
    numbers = re.findall(r"\d+\.\d+", short_version())

    assert len(numbers) >= 12
    for number in numbers:
        assert re.search(rf"(?<![\d.]){re.escape(number)}(?!\d)", results), number


def test_what_the_short_version_says_of_effective_rates_and_collapse_is_so():
    record = json.loads((report.ROOT / "benchmarks" / "results" / "learning.json").read_text())
    effective, collapsing = [], []
    for run in record["runs"]:
        if (run["stage"], run["optimizer"]) != ("tuning", "adamw"):
            continue
        accuracies = [float(number) for number in run["accuracies"].split()]
        if run["method"] == "oblrpo":
            effective.append(run["learning_rate"] * run["mean_multiplier"])
        # The multiplier of a method at a constant rate is 1. Collapse: below half of the accuracy at the start.
        elif run["method"] != "snr_only" and accuracies[-1] < 0.5 * accuracies[0]:
            collapsing.append(run["learning_rate"])

    assert "every other method collapsed at higher effective rates than any of its runs had" in " ".join(
        short_version().split()
    )
    assert max(effective) < min(collapsing)


def test_the_command_says_what_is_stale_and_fails(monkeypatch, copy, capsys):
    monkeypatch.setattr(report, "stale", lambda: ["README.md"])

    assert report.main(["--check"]) == 1
    assert "Stale: README.md. Run `make report`" in capsys.readouterr().out


def test_a_changed_number_in_the_readme_is_found_and_written_again(copy):
    change(copy / "README.md", "policies, 3 seeds each", "policies, 4 seeds each")

    assert report.stale(copy) == ["README.md"]
    report.write(copy)
    assert report.stale(copy) == []
    assert (copy / "README.md").read_text() == README.read_text()


def test_a_changed_record_makes_the_readme_and_its_figure_stale(copy):
    path = copy / "benchmarks" / "results" / "snr.json"
    record = json.loads(path.read_text())
    record["settings"]["num_seeds"] += 1
    path.write_text(json.dumps(record))

    assert report.stale(copy) == ["README.md", "docs/results.md", "docs/figures/snr.png"]


def test_a_missing_page_of_results_is_found(copy):
    (copy / "docs" / "results.md").unlink()

    assert report.stale(copy) == ["docs/results.md"]


def test_a_missing_figure_is_found(copy):
    (copy / "docs" / "figures" / "variance.png").unlink()

    assert report.stale(copy) == ["docs/figures/variance.png"]


def test_a_missing_record_is_named(copy):
    (copy / "benchmarks" / "results" / "cost.json").unlink()

    with pytest.raises(ValueError, match=r"'cost' needs cost.json"):
        report.stale(copy)


def test_a_readme_without_markers_is_refused():
    with pytest.raises(ValueError, match="lost its markers"):
        report.replace_section("no markers here", "")


def test_nothing_outside_the_markers_is_touched():
    text = f"before\n{report.BEGIN}old\n{report.END}after\n"

    assert report.replace_section(text, "NEW\n") == "before\nNEW\nafter\n"


def test_every_record_has_machine_versions_and_revision_and_is_shown():
    shown = {module.RESULT for module, _ in report.load_sections().values()}

    assert shown == {path.name for path in (report.ROOT / "benchmarks" / "results").glob("*.json")} - {"gpu.json"}
    for module, record in report.load_sections().values():
        assert {"cpu", "versions", "git_revision"} <= set(record["machine"]), module.RESULT
