"""The sweep: which runs it plans, what it refuses before the first of them, and real runs: failed, repeated, tabulated."""

import json
import shutil
from pathlib import Path

import pytest
import yaml

from oblr_trl.scripts.sweep import main, plan, read_sweep
from tests import recipe_stand_ins

ROOT = Path(__file__).parent.parent
SWEEPS = sorted((ROOT / "recipes" / "ablation").glob("*.yaml"))
RECIPE = str(ROOT / "recipes" / "tiny-Qwen3" / "oblrpo" / "config_chain_sum.yaml")


def write_sweep(folder, **changes):
    content = {
        "recipe": RECIPE,
        "output_dir": str(folder / "runs"),
        "grid": {"baseline": ["gradient_weighted", "leave_one_out"], "baseline_prior_strength": [None, 4]},
        "seeds": [0, 1],
    }
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump(content | changes, sort_keys=False))
    return path


def test_a_combination_is_planned_once_and_without_the_axes_that_change_nothing(tmp_path):
    grid = {
        "baseline": ["gradient_weighted", "leave_one_out"],
        "lr_adaptation": ["snr", "none"],
        "score_scope": {"all": {}, "last_k": {"score_last_k": 2}},
        "baseline_prior_strength": [None, 4],
    }
    runs = plan(read_sweep(write_sweep(tmp_path, grid=grid, seeds=[7])))

    # gradient_weighted: 2 x 2 x 2; leave_one_out has no prior: 2 with snr, and without scores 1.
    assert [run.combination for run in runs if run.values["baseline"] == "leave_one_out"] == [
        "leave_one_out-snr-all",
        "leave_one_out-snr-last_k",
        "leave_one_out-none",
    ]
    assert len(runs) == 8 + 3
    assert all(run.recipe["seed"] == 7 for run in runs)
    last_k = [run for run in runs if run.values.get("score_scope") == "last_k"]
    assert all(run.recipe["score_last_k"] == 2 for run in last_k)
    assert not any("score_last_k" in run.recipe for run in runs if run not in last_k)
    assert not any("baseline_prior_strength" in run.recipe for run in runs if run.combination.endswith("auto"))


def test_an_option_that_belongs_to_a_value_is_set_with_it(tmp_path):
    grid = {"lr_adaptation": {"snr": {"learning_rate": 6e-4}, "none": {"learning_rate": 1e-4}}}

    runs = plan(read_sweep(write_sweep(tmp_path, grid=grid, overrides={"max_steps": 5})))

    assert [run.recipe["learning_rate"] for run in runs] == [6e-4, 6e-4, 1e-4, 1e-4]
    assert all(run.recipe["max_steps"] == 5 for run in runs)
    assert [run.directory.name for run in runs] == ["seed-0", "seed-1"] * 2


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_every_run_of_the_ablations_is_one_that_the_training_script_takes(path, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    content = yaml.safe_load(path.read_text()) | {"output_dir": str(tmp_path / "runs")}
    (tmp_path / path.name).write_text(yaml.safe_dump(content))

    assert main(["--config", str(tmp_path / path.name), "--list"]) is None

    lines = capsys.readouterr().out.splitlines()
    assert f"{len(lines) // 3} combinations x {len(content['seeds'])} seeds" in path.read_text()
    assert not (tmp_path / "runs").exists()  # nothing is written by listing


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": [0]}, r"unknown key `seed`; the nearest name is 'seeds'"),
        ({"seeds": []}, r"`seeds` is missing or empty; set it"),
        ({"seeds": [1, 1]}, r"`seeds` names a seed twice"),
        ({"recipe": "nowhere.yaml"}, r"`recipe` names 'nowhere.yaml', but there is no such file"),
        ({"grid": {"baseline": "leave_one_out"}}, r"the axis `baseline` is 'leave_one_out'; give a list of values"),
        ({"grid": {"basline": ["leave_one_out"]}}, r"seed-0: Unknown key `basline`; the nearest name is 'baseline'"),
        ({"grid": {"baseline_prior_strength": [-1]}}, r"-1/seed-0: OBLR-PO cannot honour baseline_prior_strength=-1"),
        ({"overrides": {"loss_type": "sapo"}}, r"cannot honour loss_type='sapo'"),
    ],
)
def test_a_wrong_sweep_is_refused_before_the_first_run(changes, message, tmp_path):
    with pytest.raises(SystemExit, match=message):
        main(["--config", str(write_sweep(tmp_path, **changes))])

    assert not (tmp_path / "runs").exists()


def test_a_sweep_file_that_does_not_exist_is_refused(tmp_path):
    with pytest.raises(SystemExit, match=r"there is no such file; name one"):
        main(["--config", str(tmp_path / "sweep.yaml")])


@pytest.mark.slow
def test_a_sweep_repeats_what_failed_resumes_what_was_killed_and_skips_what_is_finished(tmp_path, capsys):
    model = tmp_path / "model"
    model.mkdir()  # no model in it: the run fails
    overrides = {
        "model_name_or_path": str(model),
        "train_size": 32,
        "test_size": 8,
        "per_device_train_batch_size": 16,
        "per_device_eval_batch_size": 8,
        "max_steps": 2,
        "save_strategy": "steps",
        "save_steps": 1,
    }
    settings = {
        "grid": {"baseline": ["gradient_weighted"], "baseline_prior_strength": [float("inf")]},
        "seeds": [5],
        "launch": "--cpu --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no",
        "overrides": overrides,
    }
    path = write_sweep(tmp_path, **settings)
    run = tmp_path / "runs" / "gradient_weighted-inf" / "seed-5"

    with pytest.raises(SystemExit, match="1 of 1 runs failed; start it again to repeat only those"):
        main(["--config", str(path)])
    assert f"FAILED, see {run / 'launch.log'}" in capsys.readouterr().out

    recipe_stand_ins.write_model(model)
    (run / "launch.log").unlink()
    results = main(["--config", str(path)])
    entry = results["methods"]["gradient_weighted-inf"]
    assert entry["values"] == {"baseline": "gradient_weighted", "baseline_prior_strength": "inf"}
    assert entry["num_seeds"] == 1
    assert entry["steps"]["values"] == [2.0]
    assert json.loads((tmp_path / "runs" / "results.json").read_text()) == results
    header, _, row = (tmp_path / "runs" / "results.md").read_text().splitlines()
    assert header.startswith("| baseline | baseline_prior_strength | seeds | held-out accuracy, start | ")
    assert row.startswith("| gradient_weighted | inf | 1 | ")

    (run / "trainer_state.json").unlink()  # as if it had been killed in its second step
    shutil.rmtree(run / "checkpoint-2")
    resumed = main(["--config", str(path)])
    again = resumed["methods"]["gradient_weighted-inf"]
    assert again["train_runtime"]["values"] == [None]  # so it is known to be resumed
    assert again["final_reward"] == entry["final_reward"]

    log = (run / "launch.log").read_text()
    assert main(["--config", str(path)]) == resumed
    assert (run / "launch.log").read_text() == log  # nothing was launched
    assert "[1/1]" in capsys.readouterr().out

    write_sweep(tmp_path, **settings | {"overrides": overrides | {"max_steps": 3}})
    with pytest.raises(SystemExit, match=r"holds a run of another recipe \(recipe.yaml differs\); remove it"):
        main(["--config", str(path)])
