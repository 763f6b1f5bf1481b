"""DeepSpeed files that bring an optimizer or a scheduler of their own, as many of those in circulation do."""

import json

import pytest

from tests.backends import runs

OPTIMIZER = {
    "type": "AdamW",
    "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto", "torch_adam": True},
}
SCHEDULER = {
    "type": "WarmupLR",
    "params": {"warmup_min_lr": "auto", "warmup_max_lr": "auto", "warmup_num_steps": "auto"},
}
SETTINGS = {
    "engine": "deepspeed",
    "sampling": None,  # whose state a checkpoint restores
    "zero_stage": 2,
    "processes": 2,
    "per_device_train_batch_size": 8,
    "max_steps": 4,
    "save_strategy": "steps",
    "save_steps": 2,
}


def file(folder, **sections):
    path = folder / "deepspeed.json"
    path.write_text(json.dumps(json.loads((runs.HERE / "zero2.json").read_text()) | sections))
    return {"deepspeed": path}


def test_the_files_own_optimizer_steps_at_the_schedule_times_rho_also_resumed_at_another_rate(model, tmp_path):
    settings = SETTINGS | file(tmp_path, optimizer=OPTIMIZER)
    whole = runs.run(tmp_path / "whole", model, **settings)
    rows = [row for row in whole.history if "loss" in row]
    multipliers = [row["lr_multiplier"] for row in rows]
    assert len(set(multipliers)) > 1
    # The recipe's schedule falls linearly from 2e-4 over four steps.
    expected = [2e-4 * (1 - step / 4) * multiplier for step, multiplier in enumerate(multipliers)]
    assert whole.learning_rates.tolist() == pytest.approx(expected)

    (tmp_path / "resumed").mkdir()
    resumed = runs.run(
        tmp_path / "resumed",
        model,
        **settings,
        learning_rate=2e-5,
        resume_from_checkpoint=whole.output_dir / "checkpoint-2",
    )
    assert resumed.learning_rates[0].item() == pytest.approx(whole.learning_rates[2].item() / 10)


def test_the_files_own_scheduler_is_refused_with_the_remedy(model, tmp_path):
    settings = SETTINGS | file(tmp_path, optimizer=OPTIMIZER, scheduler=SCHEDULER)
    failed = runs.run(tmp_path / "run", model, expect_failure=True, **settings)
    assert "Remedy: remove the `scheduler` section from the DeepSpeed file and set `lr_scheduler_type`" in failed.log
    assert not any(failed.records)  # nothing was generated


def test_the_files_own_scheduler_is_resumed_where_nothing_multiplies_it(model, tmp_path):
    settings = SETTINGS | file(tmp_path, optimizer=OPTIMIZER, scheduler=SCHEDULER)
    settings |= {"lr_adaptation": "none", "baseline": "group_mean", "warmup_steps": 4}
    whole = runs.run(tmp_path / "whole", model, **settings)
    assert whole.learning_rates[2] < whole.learning_rates[3]
    (tmp_path / "resumed").mkdir()
    resumed = runs.run(
        tmp_path / "resumed", model, **settings, resume_from_checkpoint=whole.output_dir / "checkpoint-2"
    )
    assert resumed.learning_rates.tolist() == whole.learning_rates[2:].tolist()
