"""Conversational, streamed and evaluated data: each prompt reaches the reward, and evaluation leaves training alone."""

import math
import re

import pytest
import torch
from datasets import Dataset, IterableDataset

from oblr_trl import OBLRPOTrainer
from tests.drop_in.chats import chat_model, chat_tokenizer, questions
from tests.drop_in.expected_advantages import assert_advantages
from tests.drop_in.scripts import G, both_trainers, build, prompt_texts, run, texts
from tests.tiny_models import digit_reward, logged, prompts


@both_trainers
def test_conversational_prompts_go_through_the_chat_template(tmp_path, trainer_class):
    def reward(prompts, completions, **kwargs):
        assert all(prompt[0]["role"] == "user" for prompt in prompts)
        return digit_reward([completion[0]["content"] for completion in completions])

    trainer = run(
        trainer_class,
        tmp_path,
        trainer={
            "model": chat_model(),
            "processing_class": chat_tokenizer(),
            "train_dataset": questions(),
            "reward_funcs": reward,
        },
        max_steps=1,
    )
    for batch in trainer.batches:
        decoded = trainer._tokenizer.batch_decode(batch["prompt_ids"])
        assert all(re.fullmatch(r"<user>\d\+\d<eos><assistant>", prompt) for prompt in decoded)
    assert_advantages(trainer)


@both_trainers
def test_an_iterable_data_set_is_streamed_in_groups(tmp_path, trainer_class):
    def stream():
        for a in range(8):
            for b in range(8):
                yield {"prompt": f"{b}+{a}="}

    trainer = run(
        trainer_class,
        tmp_path,
        trainer={"train_dataset": IterableDataset.from_generator(stream)},
        shuffle_dataset=False,
    )
    seen = [prompt for batch in trainer.batches for prompt in prompt_texts(batch)]
    assert seen == [f"{b}+0=" for b in range(8) for _ in range(G)]
    assert_advantages(trainer)


def first_digit_of_the_prompt(prompts, completions, **kwargs):
    return [int(prompt[0]) + digit / 100 for prompt, digit in zip(prompts, digit_reward(completions), strict=True)]


@both_trainers
@pytest.mark.parametrize("several", [False, True], ids=["one set", "a dict of sets"])
def test_evaluation_runs_during_training(tmp_path, trainer_class, several):
    sets = {f"of_{digit}": Dataset.from_dict({"prompt": [f"{digit}+{b}=" for b in range(4)]}) for digit in (2, 7)}
    trainer = run(
        trainer_class,
        tmp_path,
        trainer={"reward_funcs": first_digit_of_the_prompt, "eval_dataset": sets if several else sets["of_7"]},
        eval_strategy="steps",
        eval_steps=1,
        eval_on_start=True,
    )
    rounds = 3  # before the first step, and after each
    assert logged(trainer, "eval_reward") == pytest.approx(([2, 7] if several else [7]) * rounds, abs=0.02)
    for name in ("eval_of_2_loss", "eval_of_7_loss") if several else ("eval_loss",):
        assert len(logged(trainer, name)) == rounds
    assert len(trainer.batches) == 2
    assert_advantages(trainer, lambda batch: first_digit_of_the_prompt(prompt_texts(batch), texts(trainer, batch)))


@both_trainers
def test_evaluation_and_prediction_work_without_training(tmp_path, trainer_class):
    trainer = build(
        trainer_class,
        tmp_path,
        trainer={"reward_funcs": first_digit_of_the_prompt, "eval_dataset": prompts().select(range(8))},
    )
    before = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
    assert trainer.evaluate()["eval_reward"] == pytest.approx(0, abs=0.02)
    assert trainer.evaluate(prompts().select(range(56, 64)))["eval_reward"] == pytest.approx(7, abs=0.02)
    metrics = trainer.predict(prompts().select(range(8))).metrics
    assert math.isfinite(metrics["test_loss"])
    assert all(torch.equal(parameter, before[name]) for name, parameter in trainer.model.named_parameters())
    if trainer_class is OBLRPOTrainer:
        assert math.isnan(trainer._gradient_snr.averages.signal)  # no evaluated batch has entered the averages
