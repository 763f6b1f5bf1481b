"""`compare` on evaluations: paired differences, their table, and what cannot be compared."""

import json
import re

import pytest

from oblr_trl.scripts.compare import main
from tests.evaluation.files import MATH, benchmark_rows, evaluate_texts, local, write_jsonl


def score(directory, num_right, *tokens, num_problems=20, benchmarks=("amc23", "aime25")):
    """Evaluate: for the first half of the problems the first `num_right` of 32 are right."""
    directory.mkdir()
    amc = [{"question": f"Problem {i}", "answer": 10.0} for i in range(20)]
    rows = {name: (amc if name == "amc23" else benchmark_rows(name))[:num_problems] for name in benchmarks}
    texts = {}
    for name, problems in rows.items():
        counts = [num_right if 2 * i < len(problems) else 0 for i in range(len(problems))]
        texts[name] = [
            [f"\\boxed{{{row['answer']}}}"] * right + ["\\boxed{0}"] * (32 - right)
            for row, right in zip(problems, counts, strict=True)
        ]
    files = local(**{name: write_jsonl(directory / f"{name}_rows.jsonl", problems) for name, problems in rows.items()})
    evaluate_texts(texts, *files, "--only", *benchmarks, "--output_dir", directory / "out", *tokens, recipe=MATH)
    return str(directory / "out")


def test_models_are_compared_by_differences_paired_by_problem(tmp_path, capsys):
    low, high = score(tmp_path / "low", 8), score(tmp_path / "high", 16)
    output, json_file = tmp_path / "compare.md", tmp_path / "compare.json"

    comparison = main([f"GRPO={low}", f"OBLR-PO={high}", "--output", str(output), "--json", str(json_file)])

    amc = comparison["benchmarks"]["amc23"]["avg"]
    # 10 of 20 problems have 8/32 and 16/32 right, the others none: means 1/8 and 1/4, differences 1/4 or 0.
    assert (amc["GRPO"]["value"], amc["OBLR-PO"]["value"]) == (0.125, 0.25)
    difference = amc["OBLR-PO"]["difference"]
    assert difference["value"] == 0.125
    # Their standard error is (1/4) sqrt(1/4 / 20) = 0.028, a unit of the lattice of means is 1/80.
    assert (difference["low"], difference["high"]) == (pytest.approx(0.07, abs=0.013), pytest.approx(0.18, abs=0.013))
    assert "difference" not in amc["GRPO"]
    # aime25: 2 of 3 problems, so 1/6 and 1/3; the mean difference of the two benchmarks is (1/8 + 1/6) / 2.
    assert comparison["mean"]["OBLR-PO"]["difference"]["value"] == pytest.approx(7 / 48, abs=1e-15)
    assert list(comparison["benchmarks"]["aime25"]) == ["avg", "pass@8", "pass@32"]
    table = output.read_text()
    row = r"\| amc23 +\| +avg \| +12\.5 \[.*\] \| +25\.0 \[.*\] \| +\+12\.5 \[\+\d.*, \+1\d\.\d\]\* \|"
    assert re.search(row, table)
    assert re.search(r"pass@32 .* \+0\.0 \[\+0\.0, \+0\.0\] \|", table)  # of the same problems one completion is right
    assert capsys.readouterr().out.endswith(table)
    assert json.loads(json_file.read_text()) == comparison


def test_a_benchmark_of_one_model_alone_and_other_settings_are_noted(tmp_path):
    both = score(tmp_path / "both", 8)
    changed = ["--top_p", "0.9", "--chat_template_kwargs", '{"a": 1}', "--seed", "3"]
    one = score(tmp_path / "one", 8, *changed, benchmarks=("aime25",))

    comparison = main([both, f"one={one}"])

    assert list(comparison["benchmarks"]) == ["aime25"]
    assert comparison["notes"] == [
        "out: amc23 left out, since not every model was evaluated on it",
        "warning: chat_template_kwargs differs: out None, one {'a': 1}",
        "warning: top_p differs: out 1.0, one 0.9",
    ]


def test_evaluations_that_cannot_be_paired_are_refused(tmp_path):
    amc = score(tmp_path / "amc", 8, benchmarks=("amc23",))
    aime = score(tmp_path / "aime", 8, benchmarks=("aime25",))
    fewer = score(tmp_path / "fewer", 8, num_problems=10, benchmarks=("amc23",))
    (tmp_path / "run").mkdir()
    (tmp_path / "killed").mkdir()
    (tmp_path / "killed" / "settings.json").write_text("{}")

    for runs, message in (
        ([f"a={amc}", f"b={aime}"], r"no benchmark in common"),
        ([f"a={amc}", f"b={fewer}"], r"Benchmark 'amc23' has other prompts or answers in 'b' than in 'a'"),
        ([amc, aime], r"out, out: two evaluations of one name; name each by LABEL=DIR"),
        ([amc, str(tmp_path / "run")], r"out: holds neither trainer_state\.json"),
        ([amc, str(tmp_path / "killed")], r"killed: the evaluation is not finished.*run the same `evaluate` command"),
    ):
        with pytest.raises(SystemExit, match=message):
            main(runs)
