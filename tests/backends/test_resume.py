"""A run killed with SIGKILL at a random step and resumed from its last complete checkpoint equals one that was not killed."""

import json
import random
import time

import pytest
import torch

from tests.backends import runs

# Real random numbers here: whether their state comes back is part of the question. Rollouts serve three optimizer steps and
# checkpoints are written after every second one, so that most fall between two steps on the same rollouts. The 12 prompts of a
# generation batch are the dataset: every batch is an epoch, and meets what is remembered of the ones before.
SETTINGS = {
    "lr_adaptation": "trust_region",  # whose state holds everything that the SNR multiplier's does
    "sampling": None,
    "per_device_train_batch_size": 16,
    "train_size": 12,
    "steps_per_generation": 3,
    "max_steps": 9,
    "save_strategy": "steps",
    "save_steps": 2,
}
BACKENDS = {
    "1 process": {},
    "2 processes, ZeRO-3": {"processes": 2, "engine": "deepspeed", "per_device_train_batch_size": 8},
    "one completion per prompt": {"num_generations": 1, "train_size": 48},
}
TIMES = ("step_time", "score/pass_time", "train_runtime", "train_samples_per_second", "train_steps_per_second")


def run_until(folder, model, step, kind="step", **settings):
    """Start a run and kill all of its processes with SIGKILL in the middle of `step`: when its rollouts have been scored
    (`"batch"`), or right before the optimizer's step (`"step"`)."""
    process = runs.start(folder, model, env={"BACKENDS_PAUSE": f"{kind} {step}"}, **settings)
    record = folder / "record.0.jsonl"
    deadline = time.monotonic() + runs.TIMEOUT
    while process.poll() is None and time.monotonic() < deadline:
        if record.is_file() and f'"kind": "{kind}", "step": {step},' in record.read_text():
            runs.kill(process)
            return runs.read(folder)
        time.sleep(0.05)
    raise AssertionError(f"The run ended before step {step}:\n{(folder / 'log.txt').read_text()[-3000:]}")


def resume(folder, model, killed, **settings):
    """Resume in the output directory of a killed run, with records of its own."""
    folder.mkdir()
    (folder / "output").symlink_to(killed.output_dir)
    return runs.run(folder, model, resume_from_checkpoint=True, **settings)


def steps_of(run, kind):
    return {line["step"]: line for line in run.lines(kind)}


def numbers(line):
    # How large the process is says nothing about what it computed.
    return {key: value for key, value in line.items() if key not in ("resident", "hooks", "tensors")}


def metrics(run):
    rows = [row for row in run.history if "loss" in row]
    return {row["step"]: {key: value for key, value in row.items() if key not in TIMES} for row in rows}


@pytest.fixture(scope="module", params=BACKENDS)
def backend(request, shared_run):
    settings = SETTINGS | BACKENDS[request.param]
    return settings, shared_run(f"uninterrupted, {request.param}", **settings)


def test_a_killed_and_resumed_run_equals_an_uninterrupted_one(backend, model, tmp_path, report):
    settings, whole = backend
    # Rollouts are made in steps 0, 3, 6; of two processes only the first is certain to have come as far as the record says.
    kind, step = random.choice([("batch", 3), ("batch", 6), *(("step", step) for step in range(2, 9))])
    report.append(f"killed in step {step}, at its {kind}, {settings.get('engine', 'one process')}")
    killed = run_until(tmp_path / "killed", model, step, kind, **settings)
    assert not (killed.output_dir / "trainer_state.json").exists()

    resumed = resume(tmp_path / "resumed", model, killed, **settings)

    first = min(line["step"] for line in resumed.lines("step"))
    assert first == step - step % SETTINGS["save_steps"]
    for kind in ("batch", "step"):
        expected = {number: numbers(line) for number, line in steps_of(whole, kind).items() if number >= first}
        found = {number: numbers(line) for number, line in steps_of(resumed, kind).items()}
        assert found == expected, f"killed in step {step}, {kind}"
    assert resumed.lines("end") == whole.lines("end")  # moving averages, strengths and memory among others
    assert metrics(resumed) == metrics(whole)
    weights = whole.final_weights
    assert all(torch.equal(resumed.final_weights[name], value) for name, value in weights.items())


def test_the_comparison_sees_moving_averages_that_were_dropped(backend, model, tmp_path):
    settings, whole = backend
    killed = run_until(tmp_path / "killed", model, 5, **settings)

    resumed = resume(tmp_path / "resumed", model, killed, broken="dropped_ema", **settings)

    last = whole.lines("batch")[-1]
    assert resumed.lines("batch")[-1]["signal"] != last["signal"]
    assert resumed.learning_rates[-1] != whole.learning_rates[-1]


def test_a_checkpoint_that_was_cut_off_is_skipped_and_an_unreadable_state_is_refused(shared_run, model, tmp_path):
    whole = shared_run("uninterrupted, 1 process", **SETTINGS)
    killed = run_until(tmp_path / "killed", model, 7, **SETTINGS)
    newest, older = killed.output_dir / "checkpoint-6", killed.output_dir / "checkpoint-4"
    state = newest / "trainer_state.json"
    state.write_text(state.read_text()[:100])  # as a crash while writing leaves it

    resumed = resume(tmp_path / "resumed", model, killed, **SETTINGS)

    assert min(line["step"] for line in resumed.lines("step")) == 4
    assert "Skipping" in resumed.log
    assert all(torch.equal(resumed.final_weights[name], value) for name, value in whole.final_weights.items())

    (older / "oblrpo_state.json").write_text('{"baseline": ')
    refused = runs.run(tmp_path / "refused", model, expect_failure=True, **SETTINGS, resume_from_checkpoint=older)
    assert "`oblrpo_state.json` of the checkpoint cannot be read" in refused.log
    (older / "oblrpo_state.json").write_text(json.dumps({"baseline": "leave_one_out"}))
    refused = runs.run(tmp_path / "refused", model, expect_failure=True, **SETTINGS, resume_from_checkpoint=older)
    assert "The checkpoint was written with baseline='leave_one_out'" in refused.log
