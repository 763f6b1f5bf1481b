"""What goes wrong on one of two processes: a clear error on both, no hang, and the last good checkpoint still good.

A hang shows as a run that is still there after `runs.TIMEOUT` seconds; the processes' own timeout is half an hour.
"""

import json
import socket
import threading

import pytest
import torch

from tests.backends import runs

SETTINGS = {
    "processes": 2,
    "per_device_train_batch_size": 8,
    "max_steps": 5,
    "save_strategy": "steps",
    "save_steps": 1,
}


@pytest.fixture(scope="module")
def whole(shared_run):
    return shared_run("no fault", **SETTINGS)


def assert_resumes(failed, whole, model, folder, step, **settings):
    """The failed run left a good checkpoint of `step`, from which the rest is as if nothing had happened."""
    checkpoint = f"checkpoint-{step}/oblrpo_state.json"
    state = json.loads((failed.output_dir / checkpoint).read_text())
    assert state == json.loads((whole.output_dir / checkpoint).read_text())
    folder.mkdir()
    (folder / "output").symlink_to(failed.output_dir)
    resumed = runs.run(folder, model, **SETTINGS, resume_from_checkpoint=True, **settings)
    assert min(line["step"] for line in resumed.lines("step")) == step
    assert all(torch.equal(resumed.final_weights[name], value) for name, value in whole.final_weights.items())


def test_a_score_that_is_not_finite_stops_all_processes_before_it_reaches_a_weight(whole, model, tmp_path):
    failed = runs.run(tmp_path / "failed", model, expect_failure=True, fault="logits", **SETTINGS)

    assert "ValueError: The score of step 3 is not finite on process 1" in failed.log
    assert "The score of step 3 is not finite on process 0" not in failed.log
    assert max(line["step"] for line in failed.lines("step")) == 2
    # The sampling of this suite counts its calls: a resumed run has to draw what the whole one drew.
    assert_resumes(failed, whole, model, tmp_path / "resumed", 3, env={"BACKENDS_FIRST_CALL": "3"})


def test_a_reward_function_that_raises_on_one_process_stops_both(whole, model, tmp_path):
    rewards = ["tests.backends.rewards.raises_on_the_second_process"]
    failed = runs.run(tmp_path / "failed", model, expect_failure=True, **SETTINGS, reward_funcs=rewards[0])

    assert "KeyError: 'no such answer'" in failed.log
    assert "Raised by the reward function 'raises_on_the_second_process'." in failed.log
    assert (
        "OtherProcessError: Stopped because another process failed. process 1: KeyError: 'no such answer'"
        in failed.log
    )
    assert_resumes(failed, whole, model, tmp_path / "resumed", 2, env={"BACKENDS_FIRST_CALL": "2"})


@pytest.fixture
def silent_server():
    """A server that accepts connections and never answers."""
    listener = socket.create_server(("localhost", 0))
    connections = []

    def accept():
        try:
            while True:
                connections.append(listener.accept())
        except OSError:
            return

    threading.Thread(target=accept, daemon=True).start()
    yield f"http://localhost:{listener.getsockname()[1]}"
    listener.close()
    for connection, _ in connections:
        connection.close()


@pytest.mark.parametrize("kind", ["waits", "waits_async"])
def test_a_reward_server_that_never_answers_stops_both_processes_when_the_time_is_up(
    kind, silent_server, model, tmp_path
):
    failed = runs.run(
        tmp_path / "failed",
        model,
        expect_failure=True,
        **SETTINGS,
        reward_funcs=f"tests.backends.rewards.{kind}_for_a_server",
        reward_timeout=2,
        env={"REWARD_SERVER": silent_server},
    )

    message = f"TimeoutError: The reward function '{kind}_for_a_server' took longer than reward_timeout=2.0 seconds"
    assert f"OtherProcessError: Stopped because another process failed. process 1: {message}" in failed.log
    assert max(line["step"] for line in failed.lines("step")) == 1


def test_a_disk_that_is_full_costs_the_checkpoint_at_hand_and_no_other(whole, model, tmp_path):
    folder = tmp_path / "failed"
    full = folder / "output" / "checkpoint-3" / "optimizer.pt"
    full.parent.mkdir(parents=True)
    full.symlink_to("/dev/full")  # every write to it fails for want of space

    failed = runs.run(folder, model, expect_failure=True, **SETTINGS)

    assert max(line["step"] for line in failed.lines("step")) == 2  # it ended where it could not write
    full.unlink()
    assert_resumes(failed, whole, model, tmp_path / "resumed", 2, env={"BACKENDS_FIRST_CALL": "2"})
