"""The sweep: which runs it plans, what it refuses before the first of them, and real runs: failed, repeated, tabulated."""

import shutil
from pathlib import Path

import pytest
import yaml

from oblr_trl.scripts.sweep import main, plan
from oblr_trl.scripts.train import parse
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

    runs, _ = plan(write_sweep(tmp_path, grid=grid, seeds=[7, 8], overrides={"max_steps": 5}))

    prior_combinations = [f"gradient_weighted-{scope}-{prior}" for scope in scopes for prior in ("auto", 4)]
    combinations = [*prior_combinations, "leave_one_out-all", "leave_one_out-last_k"]
    assert list(runs) == [tmp_path / "runs" / name / f"seed-{seed}" for name in combinations for seed in (7, 8)]
    for directory, recipe in runs.items():
        assert (f"seed-{recipe['seed']}", recipe["max_steps"]) == (directory.name, 5)
        assert recipe["output_dir"] == str(directory)
        assert recipe.get("score_last_k") == (2 if recipe["score_scope"] == "last_k" else None)
        assert recipe.get("baseline_prior_strength") == (4 if directory.parent.name.endswith("4") else None)
        assert recipe["num_generations"] == 8  # from the recipe that every run starts from


@pytest.mark.parametrize("changes", [{"grid": {"lr_adaptation": "snr"}}, {"seeds": 3}, {"seeds": []}])
def test_an_axis_that_is_no_list_of_values_is_refused(tmp_path, changes):
    with pytest.raises(ValueError, match=r"`(lr_adaptation|seeds)` is .*; set a list of values"):
        plan(write_sweep(tmp_path, **changes))


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_every_run_of_the_ablations_is_one_that_the_training_script_takes(path, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    runs, _ = plan(path)
    seeds = yaml.safe_load(path.read_text())["seeds"]
    assert f"{len(runs) // len(seeds)} combinations x {len(seeds)} seeds" in path.read_text()
    for recipe in runs.values():
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        parse(["--config", str(tmp_path / "recipe.yaml"), "--use_cpu", "true", "--bf16", "false"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": [0]}, r"Unknown key `seed`; the nearest name is 'seeds'"),
        ({"recipe": "nowhere.yaml"}, r"`recipe` names 'nowhere.yaml', but there is no such file"),
        ({"grid": [{"seed": {1: {}}}, {"seed": {1: {"beta": 1}}}]}, r"1/seed-0: .* two grids give it other options"),
    ],
)
def test_a_wrong_sweep_is_refused_before_the_first_run(changes, message, tmp_path):
    with pytest.raises(SystemExit, match=message):
        main(["--config", str(write_sweep(tmp_path, **changes))])

    assert not (tmp_path / "runs").exists()


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

    with pytest.raises(SystemExit, match="some runs failed; start it again to repeat only those"):
        main(["--config", str(path)])
    assert f"{run}: FAILED, see launch.log" in capsys.readouterr().out

    recipe_stand_ins.write_model(model)
    (run / "launch.log").unlink()
    main(["--config", str(path)])
    header, _, row = capsys.readouterr().out.splitlines()[-3:]
    assert header.split("|")[2:4] == [" seeds (±: deviation) ", " steps "]
    assert [cell.strip() for cell in row.split("|")[1:4]] == [str(run.parent), "1", "2"]

    first = (run / "checkpoint-1" / "trainer_state.json").stat().st_mtime_ns
    (run / "trainer_state.json").unlink()  # as if it had been killed in its second step
    shutil.rmtree(run / "checkpoint-2")
    main(["--config", str(path)])
    assert (run / "trainer_state.json").is_file()
    assert (run / "checkpoint-1" / "trainer_state.json").stat().st_mtime_ns == first  # the step was not taken again

    log = (run / "launch.log").read_text()
    main(["--config", str(path)])
    assert (run / "launch.log").read_text() == log  # nothing was launched
    assert "[1/1]" in capsys.readouterr().out

    write_sweep(tmp_path, **settings | {"overrides": overrides | {"max_steps": 3}})
    with pytest.raises(SystemExit, match=r"holds a run of other options.*; remove it"):
        main(["--config", str(path)])
