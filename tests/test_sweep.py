"""The sweep: which runs it plans, what it refuses before the first of them, and real runs: failed, repeated, tabulated."""

import json
import shutil
from pathlib import Path

import pytest
import yaml

from oblr_trl.scripts.sweep import main, plan, read_sweep, tabulate
from tests import recipe_stand_ins

ROOT = Path(__file__).parent.parent
SWEEPS = sorted((ROOT / "recipes" / "ablation").glob("*.yaml"))
RECIPE = str(ROOT / "recipes" / "tiny-Qwen3" / "oblrpo" / "config_chain_sum.yaml")


def write_sweep(folder, **changes):
    content = {
        "recipe": RECIPE,
        "output_dir": str(folder / "runs"),
        "grid": {"baseline": ["gradient_weighted", "leave_one_out"]},
        "seeds": [0, 1],
    }
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump(content | changes, sort_keys=False))
    return path


def test_every_grid_spans_its_own_combinations_of_values_and_their_options(tmp_path):
    scopes = {"all": {}, "last_k": {"score_last_k": 2}}
    prior = {"baseline": ["gradient_weighted"], "score_scope": scopes, "baseline_prior_strength": [None, 4]}
    grid = [prior, {"baseline": ["leave_one_out"], "score_scope": scopes}]

    runs = plan(read_sweep(write_sweep(tmp_path, grid=grid, seeds=[7, 8], overrides={"max_steps": 5})))

    prior_combinations = [f"gradient_weighted-{scope}-{prior}" for scope in scopes for prior in ("auto", 4)]
    combinations = [*prior_combinations, "leave_one_out-all", "leave_one_out-last_k"]
    assert list(runs) == [tmp_path / "runs" / name / f"seed-{seed}" for name in combinations for seed in (7, 8)]
    for directory, recipe in runs.items():
        assert (f"seed-{recipe['seed']}", recipe["max_steps"]) == (directory.name, 5)
        assert recipe["output_dir"] == str(directory)
        assert recipe.get("score_last_k") == (2 if recipe["score_scope"] == "last_k" else None)
        assert recipe.get("baseline_prior_strength") == (4 if directory.parent.name.endswith("4") else None)
        assert recipe["num_generations"] == 8  # from the recipe that every run starts from


def test_combinations_that_end_in_the_same_directory_name_are_tabulated_apart(tmp_path):
    """A hub id has a slash, so that its combinations lie a directory deeper."""
    runs = [tmp_path / name / "Qwen" / "Qwen3-0.6B" / "seed-0" for name in ("group_mean-", "leave_one_out-")]
    for directory, reward in zip(runs, (0.25, 0.75), strict=True):
        directory.mkdir(parents=True)
        state = {"global_step": 1, "log_history": [{"step": 1, "reward": reward}]}
        (directory / "trainer_state.json").write_text(json.dumps(state))
    methods = tabulate(runs, tmp_path)["methods"]
    assert [entry["final_reward"]["values"] for entry in methods.values()] == [[0.25], [0.75]]


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
        ({"seed": [0]}, r"Unknown key `seed`; the nearest name is 'seeds'"),
        ({"seeds": []}, r"`seeds` is missing or empty; set it"),
        ({"recipe": "nowhere.yaml"}, r"`recipe` names 'nowhere.yaml', but there is no such file"),
        ({"grid": {"baseline": "leave_one_out"}}, r"the axis `baseline` is 'leave_one_out'; give a list of values"),
        ({"grid": [["baseline"]]}, r"`grid` holds \['baseline'\]; give a mapping from options to their values"),
        ({"grid": {"basline": ["leave_one_out"]}}, r"seed-0: Unknown key `basline`; the nearest name is 'baseline'"),
        ({"grid": {"baseline_prior_strength": [-1]}}, r"-1/seed-0: OBLR-PO cannot honour baseline_prior_strength=-1"),
        ({"grid": {"baseline": ["leave_one_out"], "baseline_prior_strength": [4]}}, r"only 'gradient_weighted' has a"),
        ({"grid": [{"seed": {1: {}}}, {"seed": {1: {"beta": 1}}}]}, r"1/seed-0: two grids have this combination"),
        ({"overrides": {"loss_type": "sapo"}}, r"cannot honour loss_type='sapo'"),
    ],
)
def test_a_wrong_sweep_is_refused_before_the_first_run(changes, message, tmp_path):
    with pytest.raises(SystemExit, match=message):
        main(["--config", str(write_sweep(tmp_path, **changes))])

    assert not (tmp_path / "runs").exists()


def test_a_sweep_file_that_does_not_exist_is_refused(tmp_path):
    with pytest.raises(SystemExit, match=r"sweep: `--config` names .*sweep.yaml', but there is no such file"):
        main(["--config", str(tmp_path / "sweep.yaml")])


@pytest.mark.slow
def test_a_sweep_repeats_what_failed_resumes_what_was_killed_and_skips_what_is_finished(tmp_path, capsys):
    model = tmp_path / "model"
    model.mkdir()  # no model in it: the run fails
    sizes = {"train_size": 32, "test_size": 8, "per_device_train_batch_size": 16, "per_device_eval_batch_size": 8}
    saving = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    overrides = {"model_name_or_path": str(model), **sizes, **saving}
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
    assert entry["num_seeds"] == 1
    assert entry["steps"]["values"] == [2.0]
    assert json.loads((tmp_path / "runs" / "results.json").read_text()) == results
    header, _, row = (tmp_path / "runs" / "results.md").read_text().splitlines()
    assert header.startswith("| combination | seeds | held-out accuracy, start | ")
    assert row.startswith("| gradient_weighted-inf | 1 | ")

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
