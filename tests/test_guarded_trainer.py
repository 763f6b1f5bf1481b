"""Faults in one process: each has a clear error, before a weight, a moving average or a checkpoint is touched.

What happens to the other processes is in tests/backends/test_faults.py.
"""

import asyncio
import ctypes
import json
import math
import shutil
import signal
import time
import traceback

import pytest
import torch
from datasets import Dataset
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from oblr_trl import OBLRPOConfig, OBLRPOTrainer
from oblr_trl.checkpoints import last_complete_checkpoint
from oblr_trl.faults.reward_functions import RewardGuard
from tests.tiny_models import ALPHABET, digit_reward, prompts, tiny_model, tiny_tokenizer, train


def weights_of(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_the_error_of_a_reward_function_keeps_its_type_and_names_the_function(tmp_path):
    def broken_reward(completions, **kwargs):
        raise KeyError("no such answer")

    async def broken_async_reward(completions, **kwargs):
        raise KeyError("no such answer")

    for reward in (broken_reward, broken_async_reward):
        with pytest.raises(KeyError, match="no such answer") as caught:
            train(OBLRPOTrainer, OBLRPOConfig, tmp_path, reward=reward)
        assert caught.value.__notes__ == [f"Raised by the reward function '{reward.__name__}'."]


def test_a_reward_that_is_no_number_is_refused(tmp_path):
    with pytest.raises(ValueError, match="could not convert string to float: 'good'"):
        train(OBLRPOTrainer, OBLRPOConfig, tmp_path, reward=lambda completions, **kwargs: ["good"] * len(completions))


def test_a_reward_function_that_takes_too_long_is_interrupted(tmp_path):
    async def slow_async_reward(completions, **kwargs):
        await asyncio.sleep(60)

    def slow_reward(completions, **kwargs):
        time.sleep(60)

    for reward in (slow_reward, slow_async_reward):
        before = time.monotonic()
        with pytest.raises(TimeoutError, match=rf"'{reward.__name__}' took longer than reward_timeout=0.5 seconds"):
            train(OBLRPOTrainer, OBLRPOConfig, tmp_path, reward=reward, reward_timeout=0.5)
        assert time.monotonic() - before < 50


WAIT = 20  # seconds: how long what follows goes on if nothing interrupts it


def catches_exceptions():
    """As a client that gives a completion nothing when its judge fails."""
    try:
        time.sleep(WAIT)
    except Exception:
        return 0.0


def catches_everything():
    try:
        time.sleep(WAIT)
    except:  # noqa: E722
        return 0.0


def tries_again():
    end = time.monotonic() + WAIT
    while time.monotonic() < end:
        try:
            catches_everything()
            time.sleep(WAIT)
        except BaseException:
            continue


def waits_in_its_clean_up():
    try:
        time.sleep(WAIT)
    finally:
        time.sleep(WAIT)


def raises_an_error_of_its_own():
    try:
        time.sleep(WAIT)
    except BaseException as error:
        raise KeyError("no such answer") from error


def holds_the_interpreter_lock():
    ctypes.PyDLL(None).usleep(500_000)  # microseconds; nothing can interrupt it


async def catches_its_cancellation():
    try:
        await asyncio.sleep(WAIT)
    except asyncio.CancelledError:
        return 0.0


async def tries_again_when_cancelled():
    end = time.monotonic() + WAIT
    while time.monotonic() < end:
        try:
            await asyncio.sleep(WAIT)
        except (asyncio.CancelledError, TimeoutError):
            continue


async def blocks_the_event_loop():
    time.sleep(0.5)


@pytest.mark.parametrize(
    "wait",
    [
        catches_exceptions,
        catches_everything,
        tries_again,
        waits_in_its_clean_up,
        raises_an_error_of_its_own,
        holds_the_interpreter_lock,
        catches_its_cancellation,
        tries_again_when_cancelled,
        blocks_the_event_loop,
    ],
)
def test_the_time_limit_holds_whatever_a_reward_function_catches(wait):
    def reward(prompts):
        return [wait() for _ in prompts]

    async def async_reward(prompts):
        return [await wait() for _ in prompts]

    guard = RewardGuard(timeout=0.25)
    signal_handler = signal.getsignal(signal.SIGURG)
    before = time.monotonic()
    if asyncio.iscoroutinefunction(wait):
        asyncio.new_event_loop().run_until_complete(guard.guard(async_reward)(prompts=["a", "b"]))
    else:
        guard.guard(reward)(prompts=["a", "b"])

    assert time.monotonic() - before < WAIT
    error = guard.take_error()
    assert isinstance(error, TimeoutError)
    assert "reward' took longer than reward_timeout=0.25 seconds" in str(error)
    assert signal.getsignal(signal.SIGURG) is signal_handler


def test_the_error_of_a_time_limit_shows_where_the_function_was():
    guard = RewardGuard(timeout=0.25)
    guard.guard(lambda prompts: [catches_exceptions() for _ in prompts])(prompts=["a"])

    assert "in catches_exceptions" in "".join(traceback.format_exception(guard.take_error()))


def test_of_two_rewards_that_fail_the_first_error_is_kept():
    def fails(message):
        def reward(prompts):
            raise KeyError(message)

        return reward

    guard = RewardGuard()
    for message in ("first", "second"):
        guard.guard(fails(message))(prompts=["a"])

    assert guard.take_error().args == ("first",)
    guard.guard(fails("of the next batch"))(prompts=["a"])
    assert guard.take_error().args == ("of the next batch",)


def test_a_timeout_of_the_reward_function_itself_is_passed_on(tmp_path):
    def impatient_reward(completions, **kwargs):
        raise TimeoutError("the server is busy")

    with pytest.raises(TimeoutError, match="the server is busy"):
        train(OBLRPOTrainer, OBLRPOConfig, tmp_path, reward=impatient_reward, reward_timeout=30)


def test_the_time_limit_leaves_signals_and_rewards_alone():
    def uses_alarms(prompts, **kwargs):  # as math-verify does
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(5)
        signal.alarm(0)
        return [None, 1]

    before = signal.getsignal(signal.SIGURG)
    guard = RewardGuard(timeout=5)

    assert guard.guard(uses_alarms)(prompts=["a", "b"]) == [None, 1.0]
    assert guard.take_error() is None
    assert signal.getsignal(signal.SIGURG) is before


@pytest.mark.parametrize("timeout", [0, -1.0, math.nan])
def test_a_time_limit_must_be_positive(tmp_path, timeout):
    with pytest.raises(ValueError, match=r"cannot honour reward_timeout=.*seconds"):
        OBLRPOConfig(str(tmp_path), bf16=False, use_cpu=True, reward_timeout=timeout)


def test_prompts_beyond_the_models_vocabulary_are_refused_before_generation(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([f"<extra {i}>" for i in range(20)])
    highest = len(tokenizer) - 1
    trainer = OBLRPOTrainer(
        tiny_model(num_layers=1),
        digit_reward,
        OBLRPOConfig(
            str(tmp_path),
            per_device_train_batch_size=16,
            max_completion_length=4,
            bf16=False,
            use_cpu=True,
            report_to="none",
        ),
        train_dataset=Dataset.from_dict({"prompt": ["1+1=<extra 19>"] * 8}),
        processing_class=tokenizer,
    )

    with pytest.raises(
        ValueError,
        match=rf"A prompt has token id {highest}, but the model's vocabulary has 40 .*resize_token_embeddings",
    ):
        trainer.train()


def test_completions_beyond_the_models_vocabulary_are_refused(tmp_path):
    def rollout(prompts, trainer):
        rows = range(len(prompts))
        return {"prompt_ids": [[3, 4] for _ in rows], "completion_ids": [[5, 40] for _ in rows], "logprobs": None}

    trainer = OBLRPOTrainer(
        tiny_model(num_layers=1),
        digit_reward,
        OBLRPOConfig(
            str(tmp_path),
            per_device_train_batch_size=16,
            max_completion_length=4,
            bf16=False,
            use_cpu=True,
            report_to="none",
        ),
        train_dataset=prompts(),
        processing_class=tiny_tokenizer(),
        rollout_func=rollout,
    )

    with pytest.raises(ValueError, match="A completion has token id 40, but the model's vocabulary has 40 entries"):
        trainer.train()


class _StepThree(OBLRPOTrainer):
    """Lets something become nan from the third optimizer step on."""

    poison = ""

    def _generate(self, prompts):
        output = super()._generate(prompts)
        if self.state.global_step == 2 and self.poison == "score":
            self.model.model.norm.register_forward_hook(
                lambda module, inputs, output: output.index_fill(0, torch.tensor([1]), math.nan)
            )
        return output

    def _get_per_token_logps_and_entropies(self, model, *args, **kwargs):
        logps, *others = super()._get_per_token_logps_and_entropies(model, *args, **kwargs)
        # Only in the first of the step's two batches: the second one's loss is finite.
        if self._step == 4 and self.poison == "loss" and logps.requires_grad:
            logps = logps * math.nan
        return logps, *others


@pytest.mark.parametrize("what", ["score", "loss"])
def test_what_is_not_finite_reaches_no_weight_and_no_moving_average(tmp_path, what):
    trainer = _StepThree(
        tiny_model(num_layers=1),
        digit_reward,
        OBLRPOConfig(
            str(tmp_path),
            per_device_train_batch_size=8,
            gradient_accumulation_steps=2,
            max_completion_length=4,
            max_steps=4,
            save_strategy="steps",
            save_steps=2,
            bf16=False,
            use_cpu=True,
            report_to="none",
        ),
        train_dataset=prompts(),
        processing_class=tiny_tokenizer(),
    )
    trainer.poison = what

    with pytest.raises(ValueError, match=rf"The {what} of step 2 is nan on process 0.*No weight was changed"):
        trainer.train()

    assert trainer.state.global_step == 2
    saved = json.loads((tmp_path / "checkpoint-2" / "oblrpo_state.json").read_text())
    if what == "score":
        assert trainer._gradient_snr.state_dict() == saved["gradient_snr"]
        assert trainer._baseline_estimator.automatic.state_dict() == saved["prior_strength"]
    assert all(math.isfinite(value) for value in trainer._gradient_snr.state_dict().values())
    assert all(parameter.isfinite().all() for parameter in trainer.model.parameters())
    assert last_complete_checkpoint(str(tmp_path)) == str(tmp_path / "checkpoint-2")


def test_an_optimizer_without_rates_is_refused(tmp_path):
    class Rateless(torch.optim.Optimizer):
        def __init__(self, parameters):
            super().__init__(parameters, {})

    model = tiny_model(num_layers=1)
    before = weights_of(model)
    with pytest.raises(
        ValueError, match=r"needs an optimizer that steps by the `lr` of its parameter groups.*lr_adaptation='none'"
    ):
        train(OBLRPOTrainer, OBLRPOConfig, tmp_path, model=model, optimizers=(Rateless(model.parameters()), None))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_a_full_disk_names_the_checkpoint_and_keeps_the_others(tmp_path):
    full = tmp_path / "checkpoint-2" / "optimizer.pt"
    saving = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 1}

    class FillDisk(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 1:
                full.parent.mkdir()
                full.symlink_to("/dev/full")  # every write to it fails for want of space

    with pytest.raises((OSError, RuntimeError)) as caught:
        train(OBLRPOTrainer, OBLRPOConfig, tmp_path, callbacks=[FillDisk()], **saving)

    assert "The checkpoint of step 2 could not be written" in "".join(caught.value.__notes__)
    assert last_complete_checkpoint(str(tmp_path)) == str(tmp_path / "checkpoint-1")

    full.unlink()
    trainer = train(OBLRPOTrainer, OBLRPOConfig, tmp_path, resume_from_checkpoint=True, **saving)
    assert trainer.state.global_step == 3


def test_resuming_without_a_whole_checkpoint_is_refused(tmp_path):
    (tmp_path / "checkpoint-5").mkdir()
    with pytest.raises(ValueError, match="There is no complete checkpoint in `output_dir`"):
        train(OBLRPOTrainer, OBLRPOConfig, tmp_path, resume_from_checkpoint=True)


def test_checkpoints_of_weights_only_are_skipped_and_refused_with_the_remedy(tmp_path, caplog):
    saving = {"save_strategy": "steps", "save_steps": 1}
    train(OBLRPOTrainer, OBLRPOConfig, tmp_path, max_steps=1, **saving)
    train(OBLRPOTrainer, OBLRPOConfig, tmp_path / "weights", max_steps=2, save_only_model=True, **saving)
    newest = (tmp_path / "weights" / "checkpoint-2").rename(tmp_path / "checkpoint-2")

    assert last_complete_checkpoint(str(tmp_path)) == str(tmp_path / "checkpoint-1")
    assert f"Skipping {newest}: it holds weights only, as save_only_model=True writes it." in caplog.messages
    with pytest.raises(ValueError, match=r"weights only, as save_only_model=True .*pass it as the model.*=False"):
        train(OBLRPOTrainer, OBLRPOConfig, tmp_path, resume_from_checkpoint=str(newest), **saving)
    with pytest.raises(ValueError, match="There is no complete checkpoint in `output_dir`"):
        train(OBLRPOTrainer, OBLRPOConfig, tmp_path / "weights", resume_from_checkpoint=True, **saving)


def test_a_checkpoint_of_grpo_is_refused_with_the_remedy(tmp_path):
    train(GRPOTrainer, GRPOConfig, tmp_path, max_steps=1, save_strategy="steps", save_steps=1)
    with pytest.raises(ValueError, match=r"not written by `OBLRPOTrainer`.*resume it with the trainer that wrote it"):
        train(OBLRPOTrainer, OBLRPOConfig, tmp_path, resume_from_checkpoint=True)


def test_the_last_checkpoint_is_that_of_the_highest_step(tmp_path):
    """As text, checkpoint-9 comes after checkpoint-10."""
    train(OBLRPOTrainer, OBLRPOConfig, tmp_path, max_steps=1, save_strategy="steps", save_steps=1)
    for step in (9, 10):
        shutil.copytree(tmp_path / "checkpoint-1", tmp_path / f"checkpoint-{step}")
    assert last_complete_checkpoint(str(tmp_path)) == str(tmp_path / "checkpoint-10")


@pytest.mark.parametrize(("steps_per_generation", "num_iterations"), [(3, 1), (1, 2), (2, 2)])
def test_a_run_resumed_between_two_steps_on_the_same_rollouts_equals_an_uninterrupted_one(
    tmp_path, steps_per_generation, num_iterations
):
    window = {"steps_per_generation": steps_per_generation, "num_iterations": num_iterations, "max_steps": 6}
    window |= {"save_strategy": "steps", "save_steps": 1}
    whole = train(OBLRPOTrainer, OBLRPOConfig, tmp_path, **window)
    for step in (1, 2, 3):
        resumed = train(
            OBLRPOTrainer,
            OBLRPOConfig,
            tmp_path / "resumed",
            resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"),
            **window,
        )
        for name, value in whole.model.state_dict().items():
            assert torch.equal(resumed.model.state_dict()[name], value), f"{name}, resumed at {step}"


def test_rollouts_of_another_number_of_processes_are_refused(tmp_path):
    window = {"steps_per_generation": 3, "save_strategy": "steps", "save_steps": 1}
    train(OBLRPOTrainer, OBLRPOConfig, tmp_path, **window)
    (tmp_path / "checkpoint-2" / "oblrpo_rollouts_0.pt").unlink()
    with pytest.raises(ValueError, match=r"no `oblrpo_rollouts_0.pt`. Resume with as many processes"):
        train(OBLRPOTrainer, OBLRPOConfig, tmp_path, resume_from_checkpoint=str(tmp_path / "checkpoint-2"), **window)


@pytest.mark.parametrize("content", ["", "[]", '{"baseline": ', "\x00\x01"])
def test_an_unreadable_state_is_refused(tmp_path, content):
    train(OBLRPOTrainer, OBLRPOConfig, tmp_path, max_steps=1, save_strategy="steps", save_steps=1)
    (tmp_path / "checkpoint-1" / "oblrpo_state.json").write_text(content)
    with pytest.raises(ValueError, match=r"`oblrpo_state.json` of the checkpoint cannot be read \(.+\)"):
        train(OBLRPOTrainer, OBLRPOConfig, tmp_path, resume_from_checkpoint=True)


def test_the_alphabet_fits_the_model():
    """The vocabulary tests need a tokenizer below the model's size."""
    assert len(tiny_tokenizer()) == len(ALPHABET) + 3 <= tiny_model().config.vocab_size
