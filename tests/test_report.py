"""Tables, figures and sentences about the results belong to the records, and a stale one is found."""

import json
import shutil
from statistics import mean, median

import pytest

from benchmarks import report


@pytest.fixture
def copy(tmp_path):
    """README, docs and records alone, where they can be changed."""
    shutil.copy(report.ROOT / "README.md", tmp_path / "README.md")
    for folder in ("benchmarks/results", "docs/figures"):
        shutil.copytree(report.ROOT / folder, tmp_path / folder)
    shutil.copy(report.ROOT / "docs" / "results.md", tmp_path / "docs" / "results.md")
    return tmp_path


def change(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def test_tables_figures_and_sentences_belong_to_the_records():
    assert report.stale() == [], "run `make report`, correct the sentences, and commit both"


def test_the_results_section_of_the_readme_is_short():
    section = report.hand_written()["README.md"]
    assert len(section.splitlines()) <= 20
    assert "docs/figures/trust_region.png" in section


def test_what_the_page_says_of_effective_rates_and_collapse_is_so():
    record = report.load_sections()["learning"].record
    runs = [dict(zip(record["run_columns"], row, strict=True)) for row in record["runs"]]
    effective, collapsing = [], []
    for run in runs:
        if (run["stage"], run["optimizer"]) != ("tuning", "adamw"):
            continue
        accuracies = [float(number) for number in run["accuracies"].split()]
        if run["method"] == "oblrpo":
            effective.append(run["learning_rate"] * run["mean_multiplier"])
        # The multiplier of a method at a constant rate is 1. Collapse: below half of the accuracy at the start.
        elif run["method"] != "snr_only" and accuracies[-1] < 0.5 * accuracies[0]:
            collapsing.append(run["learning_rate"])

    written = " ".join(report.hand_written()["docs/results.md"].split())
    assert "the methods with a constant rate collapsed at higher effective rates than any of its runs had" in written
    assert max(effective) < min(collapsing)


def test_the_claims_of_the_readme_are_those_of_the_records():
    records = {name: section.record for name, section in report.load_sections().items()}
    readme = " ".join(report.hand_written()["README.md"].split())

    variance = records["variance"]
    ratios = [policy["methods"][variance["default"]]["4"]["mean"] for policy in variance["policies"].values()]
    assert (
        f"has {median(ratios):.2f} of the variance that it has under RLOO's (median of {len(ratios)} policies)"
        in readme
    )

    groups = records["small_groups"]["summary"] | records["small_groups_graded"]["summary"]
    rows = {task: {(row["method"], row["group_size"]): row for row in part["rows"]} for task, part in groups.items()}
    parts = {task: row["ours", 1]["part_of_rollouts"] for task, row in rows.items()}
    graded = "spell_backward, graded"
    order = ("chain_sum", "decimal_chain_sum", "products, easy to hard", graded)
    assert set(order) == set(parts)
    intervals = ["{mean:.2f} [{low:.2f}, {high:.2f}]".format(**parts[task]) for task in order]
    assert (
        f"after {intervals[0]} of their rollouts on chain_sum, {intervals[1]} on decimal_chain_sum and {intervals[2]} where prompts"
        in readme
    )
    strongest = groups[graded]["strongest"]
    assert strongest[0] == "grpo_kl"
    fastest = min(
        row["cpu_seconds"]["mean"] for key, row in rows[graded].items() if "grpo" in key[0] or "rloo" in key[0]
    )
    time = parts[graded]["mean"] * rows[graded]["ours", 1]["cpu_seconds"]["mean"] / fastest
    assert f"it needs {intervals[3]} of the rollouts to GRPO's mean reward, but {time:.2f} of the time" in readme
    right = {key: row["accuracy"]["mean"] for key, row in rows[graded].items()}
    best = max(value for key, value in right.items() if key[0] in ("grpo", "grpo_kl"))
    ours, scaled = right["ours", 1], right["ours_scaled", 2]
    assert f"({ours:.3f} against {best:.3f}; {scaled:.3f} in groups of two" in readme

    trust_region = records["trust_region"]
    settings = trust_region["summary"].values()
    shares = [part["methods"]["trust_region"]["share"]["mean"] for part in settings]
    decays = [part["methods"]["linear"]["share"]["mean"] for part in settings]
    assert (
        f"one default gains {mean(shares):.2f} of what the best constant rate gains (mean; {min(shares):.2f} to "
        f"{max(shares):.2f}; {trust_region['settings']['evaluation_seeds']} seeds)"
    ) in readme
    assert f"linear decay that is tuned in each setting, {mean(decays):.2f}." in readme

    def costs(method):
        measured = [records["cost"]["comparisons"]["transformers"], records["cost"]["comparisons"]["demo"]]
        measured += [records["cost_pretrained"]["comparisons"]["transformers"]]
        return [f"{comparison['ratios'][method]['median']:.2f}" for comparison in measured]

    random, demo, pretrained = costs("trust_region")  # the default
    vllm = records["cost_vllm"]["comparisons"]["vllm"]["ratios"]["trust_region"]["median"]
    by_transformers = f"{random} to {demo} times GRPO's with generation by transformers on a CPU"
    assert f"{by_transformers}, {pretrained} times on SmolLM2, {vllm:.2f} with vLLM" in readme
    random, demo, pretrained = costs("sample")
    assert f"a step takes {random} to {demo} times, {pretrained} on SmolLM2" in readme


def test_the_command_says_which_sentence_is_stale_and_fails(monkeypatch, capsys):
    monkeypatch.setattr(report, "write", lambda: None)
    monkeypatch.setattr(report, "stale", lambda: ["0.1 in README.md (in no table)"])

    assert report.main() == 1
    assert "Stale: 0.1 in README.md (in no table). Correct the sentences." in capsys.readouterr().out


def test_a_changed_number_in_a_table_is_found_and_written_again(copy):
    change(copy / "docs" / "results.md", "| OBLR-PO | 0.001 | 0.15 |", "| OBLR-PO | 0.001 | 0.16 |")

    assert report.stale(copy) == ["docs/results.md"]
    report.write(copy)
    assert report.stale(copy) == []
    assert (copy / "docs" / "results.md").read_text() == (report.ROOT / "docs" / "results.md").read_text()


@pytest.mark.parametrize(
    ("file", "sentence", "number"),
    [("docs/results.md", "(area {} against", "0.480"), ("README.md", "baseline has {} of", "0.27")],
)
def test_a_number_in_a_sentence_that_stands_in_no_table_is_found_and_kept(copy, file, sentence, number):
    change(copy / file, sentence.format(number), sentence.format(f"{number}7"))

    assert report.stale(copy) == [f"{number}7 in {file} (in no table)"]
    report.write(copy)  # sentences are not written by the command
    assert report.stale(copy) == [f"{number}7 in {file} (in no table)"]


def test_a_number_must_stand_in_a_table_as_a_whole():
    assert report.unsupported_numbers("0.12, 3.45 and 0.12; https://x.org/1.23", "| 10.12 | 0.123 | 3.45% |") == [
        "0.12"
    ]


def test_a_changed_record_makes_its_table_and_its_figure_stale(copy):
    path = copy / "benchmarks" / "results" / "variance.json"
    record = json.loads(path.read_text())
    record["settings"]["num_seeds"] += 1
    path.write_text(json.dumps(record))

    assert report.stale(copy) == ["docs/results.md", "docs/figures/variance.png"]


def test_a_missing_figure_is_found(copy):
    (copy / "docs" / "figures" / "variance.png").unlink()

    assert report.stale(copy) == ["docs/figures/variance.png"]


def test_missing_markers_are_named(copy):
    change(copy / "docs" / "results.md", "<!-- snr: end -->", "")
    with pytest.raises(ValueError, match="`<!-- snr: begin -->` and `<!-- snr: end -->` once"):
        report.write(copy)
    change(copy / "README.md", "<!-- results: end -->", "")
    with pytest.raises(ValueError, match=r"README\.md has lost its markers"):
        report.hand_written(copy)


def test_every_record_has_machine_versions_and_revision_is_small_and_is_shown():
    results = report.ROOT / "benchmarks" / "results"
    shown = {f"{name}.json": section.record for name, section in report.load_sections().items()}

    assert set(shown) == {path.name for path in results.glob("*.json")}
    for name, record in shown.items():
        assert {"cpu", "versions", "git_revision"} <= set(record["machine"]), name
        assert (results / name).stat().st_size < 100 * 1024, name
