"""SmolLM2: rewards and prompts of its tasks, the making of its folder, and the study on it, with one small run where the folder is."""

import json
import math
import re
from dataclasses import asdict, replace
from importlib.metadata import version
from itertools import product
from operator import add, mul, sub

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import pretrained, pretrained_runs
from benchmarks.pretrained_runs import PretrainedSpec
from benchmarks.sections import pretrained as section
from examples.smollm2 import __main__ as smollm2
from examples.smollm2.lists import write_arithmetic, write_prompts
from examples.smollm2.rewards import answer_reward, list_reward


def message(text):
    return [{"role": "assistant", "content": text}]


@pytest.mark.parametrize(
    ("text", "solution", "expected"),
    [
        ("", "7", 0.0),
        ("seven", "7", 0.0),
        ("7", "7", 1.0),
        ("3 + 4 = 7.", "7", 1.0),
        ("7, which is 3 + 4", "7", 0.0),  # the last number counts
        ("17", "7", 0.0),
        ("-7", "7", 0.0),
        ("-7", "-7", 1.0),
        ("7", "-7", 0.0),
    ],
)
def test_the_last_number_is_the_answer(text, solution, expected):
    assert answer_reward([text, message(text)], solution=[solution] * 2, prompts=None) == [expected] * 2


@pytest.mark.parametrize(
    ("text", "num_items", "expected"),
    [
        ("", 3, 0.0),
        ("red, green, blue", 3, 1.0),
        (" Red, light green, blue.\n", 3, 1.0),
        ("red", 1, 1.0),
        ("red", 3, 1 / 3),
        ("red, green", 1, 0.0),  # one too many is as many as there should be
        ("red, Red, blue", 3, 2 / 3),
        ("red, green, the colour of the sky", 3, 2 / 3),
        ("red, 2, blue", 3, 2 / 3),
        ("red, green,", 2, 1 / 2 * 2 / 3),  # the third item is empty
        ("red\ngreen\nblue", 3, 0.0),
    ],
)
def test_a_list_is_graded_by_its_number_and_its_items(text, num_items, expected):
    assert list_reward([text, message(text)], num_items=[num_items] * 2, prompts=None) == pytest.approx([expected] * 2)


@settings(deadline=None)
@given(st.text() | st.text(alphabet="ab ,.\n"), st.integers(1, 20))
def test_a_list_has_a_reward_from_0_to_1(text, num_items):
    (reward,) = list_reward([text], num_items=[num_items])

    assert 0 <= reward <= 1


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


# 40 things x 10 numbers; 12 x 12 sums and as many products, and 1 + 2 + ... + 18 differences.
@pytest.mark.parametrize(
    ("write", "num_rows", "column"),
    [(write_prompts, 40 * 10, "num_items"), (write_arithmetic, 2 * 144 + 171, "solution")],
)
def test_prompts_are_distinct_and_the_same_each_time(write, num_rows, column, tmp_path):
    for name in ("first", "second"):
        write(tmp_path / name)

    rows = read(tmp_path / "first")
    assert (tmp_path / "first").read_bytes() == (tmp_path / "second").read_bytes()
    assert len({row["prompt"] for row in rows}) == len(rows) == num_rows
    assert all(set(row) == {"prompt", column} for row in rows)


def test_the_solutions_are_right_and_the_numbers_those_of_the_prompts(tmp_path):
    write_arithmetic(tmp_path / "arithmetic")
    write_prompts(tmp_path / "lists")

    for row in read(tmp_path / "arithmetic"):
        a, sign, b = re.fullmatch(r"What is (\d+) ([-+x]) (\d+)\? .*", row["prompt"]).groups()
        assert row["solution"] == str({"+": add, "-": sub, "x": mul}[sign](int(a), int(b)))
    assert all(row["prompt"].startswith(f"Name {row['num_items']} ") for row in read(tmp_path / "lists"))


def test_a_file_with_another_hash_is_refused_by_name(tmp_path):
    (tmp_path / smollm2.FILE).write_text("another model")

    with pytest.raises(ValueError, match=rf"`{smollm2.FILE}` has the SHA-256 [0-9a-f]{{64}}, not {smollm2.SHA256}"):
        smollm2.convert(tmp_path / smollm2.FILE, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_the_folder_is_made_once_and_again_if_its_weights_are_missing(tmp_path, monkeypatch):
    made = []

    def convert(file, directory):
        made.append(file)
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "model.safetensors").touch()

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(smollm2, "convert", convert)
    smollm2.main(tmp_path / "file")
    smollm2.main(tmp_path / "file")
    assert made == [tmp_path / "file"]
    assert smollm2.LISTS.is_file()
    assert smollm2.ARITHMETIC.is_file()

    (smollm2.DIRECTORY / "model.safetensors").unlink()
    smollm2.main(tmp_path / "file")
    assert len(made) == 2


def made_run(method, size, rate, held_out, *, failure=None, kl=None):
    spec = PretrainedSpec("lists", method, 64 // size, size, seed=0, learning_rate=rate, trust_region_kl=kl)
    return {
        "spec": asdict(spec),
        "rewards": held_out,
        "seconds": [2.0, 1.0, 3.0],
        "failure": failure,
        "logged": {
            "reward": [0.1, 0.3],
            "learning_rate": [rate, 2 * rate],
            "entropy": [2.0, None if failure else 1.0],
        },
    }


def summary_of(*runs):
    return pretrained.summarise(runs)["lists"]


def test_a_control_counts_at_the_rate_of_the_largest_mean_area():
    arm = summary_of(
        made_run("grpo", 8, 1e-6, [0.2, 0.4, 0.4]),
        made_run("grpo", 8, 8e-6, [0.2, 0.6, 0.4]),  # the larger area, although the same end
        made_run("grpo", 8, 8e-6, [0.2, 0.8, 0.8]),
        made_run("grpo", 8, 2e-5, [0.2, 0.9, 0.0], failure="not finite"),
        made_run("grpo", 8, 2e-5, [0.2, 0.0, 0.0], failure="not finite"),
    )["arms"]["grpo, G = 8"]

    assert (arm["learning_rate"], arm["num_seeds"], arm["failures"]) == (8e-6, 2, 0)
    assert arm["curve"] == [0.2, 0.7, 0.6]
    assert arm["final"]["mean"] == pytest.approx(0.6)
    # (0.2 / 2 + 0.6 + 0.4 / 2) / 2 and (0.2 / 2 + 0.8 + 0.8 / 2) / 2
    assert arm["area"]["mean"] == pytest.approx((0.45 + 0.65) / 2)
    assert (arm["seconds_per_step"], arm["last_rates"]) == (2.0, [1.6e-5] * 2)
    assert set(arm["by_rate"]) == {"1e-06", "8e-06", "2e-05"}
    assert arm["entropy_by_rate"] == {"1e-06": 1.5, "8e-06": 1.5, "2e-05": None}


def test_the_table_compares_gains_with_the_best_control_and_marks_what_was_lost():
    runs = [
        made_run("ours", 1, 1e-6, [0.2, 0.5, 0.8]),
        made_run("ours", 1, 1e-6, [0.2, 0.7, 0.8], kl=0.1),
        made_run("grpo", 8, 1e-6, [0.2, 0.6, 1.0]),
        made_run("grpo", 8, 8e-6, [0.2, 0.9, 0.0], failure="not finite"),
    ]
    asked = {"num_steps": 10, "eval_steps": 5, "rollouts": 64, "test_size": 128, "seeds": 1}
    text = section.markdown({"settings": asked, "summary": pretrained.summarise(runs)})

    assert "bfloat16 autocast, AdamW, 64 rollouts a step; mean reward of 128 held-out prompts" in text
    header, _, *rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()[-6:]]
    ours, larger, slow, lost = (dict(zip(header, row, strict=True)) for row in rows)
    gains = ("gain: mean over the run less the start", "of the best control's")
    assert [[row[name] for name in gains] for row in (ours, larger, slow, lost)] == [
        ["0.300", "0.75"],
        ["0.400", "1.00"],
        ["0.400", "1.00"],
        ["", ""],
    ]
    assert (ours["method"], larger["method"]) == ("OBLR-PO", "OBLR-PO, delta = 0.1")
    assert ours["learning rate"] == "found: at most 2e-06, at last 2e-06"
    assert ours["reward of the run's own rollouts"] == "0.200"
    assert [(row["after 5 steps"], row["after 10 steps"]) for row in (lost, ours)] == [
        ("0.900", "lost"),
        ("0.500", "0.800"),
    ]
    assert "less the best control's" not in header  # which takes more than one seed


def test_differences_are_paired_over_seeds_and_values_are_means():
    runs = [
        *(made_run("ours", 1, 1e-6, curve) for curve in ([0.2, 0.4, 0.8], [0.2, 0.6, 1.0])),
        *(made_run("grpo", 8, 1e-6, curve) for curve in ([0.2, 0.4, 0.6], [0.2, 0.4, 1.0])),
    ]
    asked = {"num_steps": 10, "eval_steps": 5, "rollouts": 32, "test_size": 64, "seeds": 2, "bf16": False}
    text = section.markdown({"settings": asked, "summary": pretrained.summarise(runs)})

    assert "float32, AdamW, 32 rollouts" in text
    assert "2 seeds" in text
    header, _, ours, _ = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()[-4:]]
    row = dict(zip(header, ours, strict=True))
    assert (row["after 5 steps"], row["after 10 steps"]) == ("0.500", "0.900")
    # Gains of 0.25 and 0.4; those of GRPO are 0.2 and 0.3.
    assert row["gain: mean over the run less the start"] == "0.325 ± 0.106"
    assert row["of the best control's"] == "1.30"
    assert row["less the best control's"] == "+0.075 [+0.050, +0.100]"


def test_without_a_control_there_is_nothing_to_compare_with():
    asked = {"num_steps": 15, "eval_steps": 15, "rollouts": 64, "test_size": 64, "seeds": 2}
    runs = [made_run("ours", 1, 1e-6, curve, kl=kl) for kl in (0.01, 0.1) for curve in ([0.2, 0.4], [0.2, 0.6])]
    text = section.markdown({"settings": asked, "summary": pretrained.summarise(runs)})

    assert "best control" not in text
    assert (
        "| OBLR-PO, delta = 0.1 | 64 x 1 | found: at most 2e-06, at last 2e-06 | 0.200 | 0.500 | 0.150 ± 0.071 |"
        in text
    )


def test_lost_runs_are_counted():
    lost = made_run("grpo", 8, 1e-5, [0.2, 0.9, 0.0], failure="not finite")

    assert summary_of(lost, made_run("grpo", 8, 1e-5, [0.2, 0.5, 0.6]))["arms"]["grpo, G = 8"]["failures"] == 1


def test_ours_is_compared_with_the_strongest_control_seed_by_seed():
    summary = summary_of(
        made_run("ours", 1, 1e-6, [0.2, 0.6, 0.6]),  # a plateau at the goal, which it has after half of the run
        made_run("ours", 1, 1e-6, [0.2, 0.4, 0.8]),
        made_run("ours", 1, 1e-6, [0.2, 0.4, 0.5]),
        made_run("rloo", 4, 1e-6, [0.2, 0.2, 0.7]),
        *[made_run("grpo", 8, 1e-6, [0.2, 0.4, 0.6])] * 3,
    )

    ours = summary["arms"]["ours, G = 1"]
    assert summary["strongest"] == "grpo, G = 8"  # by area, 0.4 against 0.325
    assert ours["learning_rate"] is None
    assert ours["rollouts_to_strongest"] == [0.5, 0.75, None]
    # Areas of 0.5, 0.45 and 0.375 minus 0.4.
    assert ours["area_minus_strongest"]["mean"] == pytest.approx(0.125 / 3, abs=1e-4)
    assert "rollouts_to_strongest" not in summary["arms"]["rloo, G = 4"]


def test_its_two_halves_are_told_from_it_and_are_no_rivals():
    runs = [
        made_run("constant", 1, 1e-5, [0.2, 0.8]),
        made_run("grpo_kl", 8, 1e-6, [0.2, 0.6], kl=0.25),
        made_run("grpo", 8, 1e-5, [0.2, 0.4]),
    ]
    summary = pretrained.summarise(runs)
    assert summary["lists"]["strongest"] == "grpo, G = 8"
    asked = {"num_steps": 15, "eval_steps": 15, "rollouts": 64, "test_size": 64, "seeds": 1}
    text = section.markdown({"settings": asked, "summary": summary})
    # Gains of half of 0.6, 0.4 and 0.2.
    assert "| OBLR-PO's baseline alone | 64 x 1 | 1e-05 | 0.200 | 0.800 | 0.300 | 3.00 |" in text
    found = "found: at most 2e-06, at last 2e-06"
    assert (
        f"| GRPO's advantages, trust region, delta = 0.25 | 8 x 8 | {found} | 0.200 | 0.600 | 0.200 | 2.00 |" in text
    )

    specs = pretrained.PretrainedArguments(
        methods=["constant", "grpo_kl"], tasks=["lists"], seeds=1, kls=[0.25]
    ).specs()
    assert [(s.num_generations, s.learning_rate, s.trust_region_kl) for s in specs] == [
        (1, 1.6e-5, None),
        (1, 3.2e-5, None),
        (1, 6.4e-5, None),
        (8, 1e-6, 0.25),
    ]


def test_the_movement_is_that_of_the_second_halves_where_it_was_measured():
    runs = [made_run("ours", 1, 1e-6, [0.2, 0.4]) for _ in range(2)]
    assert summary_of(*runs)["arms"]["ours, G = 1"]["movement"] is None
    for run, kl in zip(runs, ([None, 9.0, 0.1, 0.3], [None]), strict=True):
        run["logged"] |= {"trust_region/kl": kl, "trust_region/kl_target": [value and 2 * value for value in kl]}
    assert summary_of(*runs)["arms"]["ours, G = 1"]["movement"] == pytest.approx({"kl": 0.2, "target": 0.4})
    assert summary_of(runs[1])["arms"]["ours, G = 1"]["movement"] is None


def test_every_run_has_as_many_rollouts_and_ours_no_grid_of_rates():
    options = {"group_sizes": [1, 2], "learning_rates": [1e-6, 1e-5], "kls": [0.01, 0.02], "bf16": False}
    specs = pretrained.PretrainedArguments(seeds=2, tasks=["lists"], **options).specs()

    assert not any(spec.bf16 for spec in specs)
    assert {spec.num_prompts * spec.num_generations for spec in specs} == {64}
    assert [spec.seed for spec in specs] == [0] * 8 + [1] * 8
    ours = [spec for spec in specs if spec.method == "ours"]
    assert {(spec.num_generations, spec.trust_region_kl) for spec in ours} == set(product((1, 2), (0.01, 0.02)))
    assert {(s.num_generations, s.learning_rate) for s in specs if s.method == "grpo"} == {(8, 1e-6), (8, 1e-5)}


def test_without_the_model_the_study_says_what_makes_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    with pytest.raises(SystemExit, match=r"no .cache/SmolLM2-135M-Instruct. Run `make pretrained` first"):
        pretrained.main(pretrained.PretrainedArguments())
    monkeypatch.setattr(pretrained, "DIRECTORY", tmp_path)
    with pytest.raises(SystemExit, match=r"no run of these settings is finished in runs/pretrained"):
        pretrained.main(pretrained.PretrainedArguments(only_finished=True))


def test_a_gradient_that_is_no_number_is_named_by_its_step():
    assert pretrained_runs.first_not_finite([0.0, None, math.nan, math.inf]) == 3
    assert pretrained_runs.first_not_finite([0.0, None, 1e30]) is None


@pytest.mark.slow
@pytest.mark.skipif(not (smollm2.DIRECTORY / "model.safetensors").is_file(), reason="run `make pretrained`")
def test_a_run_has_a_curve_and_the_logs_of_its_steps(tmp_path):
    spec = PretrainedSpec("lists", "ours", 2, 1, seed=0, num_steps=1, eval_steps=1, test_size=2)
    plain, _ = pretrained_runs.prepared_trainer(replace(spec, bf16=False), str(tmp_path))
    assert not plain.args.bf16
    run = pretrained_runs.run(spec)

    assert run["failure"] is None
    assert run["machine"]["versions"]["trl"] == version("trl")
    assert len(run["rewards"]) == 2
    assert all(0 <= reward <= 1 for reward in run["rewards"])
    assert [len(values) for values in (run["seconds"], *run["logged"].values())] == [1] * 9
    assert run["logged"]["learning_rate"][0] > 0  # that of the trust region
