"""Whatever a reward is, function, coroutine, model or several of them, the advantages are made of what it returns."""

import asyncio

import pandas
import pytest
import torch
from transformers import Qwen2ForSequenceClassification

from tests.drop_in.expected_advantages import assert_advantages
from tests.drop_in.scripts import G, both_trainers, moved, prompt_texts, run, texts
from tests.tiny_models import digit_reward, logged, prompts, tiny_model, tiny_tokenizer


def letter_share(text):
    return sum(character.isalpha() for character in text) / 8


def digit_share(text):
    return sum(character.isdigit() for character in text) / 8


@both_trainers
def test_a_synchronous_reward_is_what_the_advantages_are_made_of(tmp_path, trainer_class):
    trainer = run(trainer_class, tmp_path, max_steps=3)
    assert_advantages(trainer)
    assert moved(trainer) == set(dict(trainer.model.named_parameters()))


@both_trainers
def test_an_asynchronous_reward_is_awaited(tmp_path, trainer_class):
    async def judged(completions, **kwargs):
        await asyncio.sleep(0)
        return [letter_share(text) for text in completions]

    trainer = run(trainer_class, tmp_path, trainer={"reward_funcs": judged}, max_steps=1)
    assert_advantages(trainer, lambda batch: [letter_share(text) for text in texts(trainer, batch)])


@both_trainers
def test_several_rewards_are_summed_with_their_weights(tmp_path, trainer_class):
    async def letters(completions, **kwargs):
        return [letter_share(text) for text in completions]

    script = {"reward_funcs": [digit_reward, letters]}
    trainer = run(trainer_class, tmp_path, trainer=script, reward_weights=[2.0, 0.5], max_steps=1)
    assert_advantages(
        trainer, lambda batch: [2 * digit_share(text) + 0.5 * letter_share(text) for text in texts(trainer, batch)]
    )


@both_trainers
def test_a_reward_may_be_none(tmp_path, trainer_class):
    def unless_it_starts_with_a_digit(text):
        return None if text[:1].isdigit() else letter_share(text)

    def reward(completions, **kwargs):
        return [unless_it_starts_with_a_digit(text) for text in completions]

    trainer = run(trainer_class, tmp_path, trainer={"reward_funcs": reward}, max_steps=1)
    skipped = [reward(texts(trainer, batch)).count(None) for batch in trainer.batches]
    assert all(0 < number < 4 * G for number in skipped)
    assert_advantages(trainer, lambda batch: reward(texts(trainer, batch)))


@both_trainers
def test_reward_models_score_prompt_and_completion(tmp_path, trainer_class):
    def judge(seed):
        torch.manual_seed(seed)
        config = tiny_model("qwen2", hidden_size=32, num_layers=1).config
        config.num_labels = 1
        model = Qwen2ForSequenceClassification(config).eval()
        model.config._name_or_path = "tiny-judge"
        return model

    in_memory, on_disk = judge(1), judge(2)
    on_disk.save_pretrained(tmp_path / "judge")
    trainer = run(
        trainer_class,
        tmp_path,
        trainer={
            "reward_funcs": [in_memory, str(tmp_path / "judge"), digit_reward],
            "reward_processing_classes": [tiny_tokenizer(), tiny_tokenizer(), None],
        },
        reward_weights=[1.0, 10.0, 1.0],
        max_steps=1,
    )

    def rewards(batch):
        tokenizer = tiny_tokenizer()
        total = []
        for prompt, completion in zip(prompt_texts(batch), texts(trainer, batch), strict=True):
            inputs = tokenizer(prompt + completion, return_tensors="pt")
            with torch.no_grad():
                verdicts = in_memory(**inputs).logits + 10 * on_disk(**inputs).logits
            total.append(verdicts.item() + digit_share(completion))
        return total

    assert_advantages(trainer, rewards)
    assert len(logged(trainer, "rewards/tiny-judge/mean")) == 1


@both_trainers
def test_what_a_reward_logs_arrives_in_the_metrics_and_in_the_table(tmp_path, trainer_class):
    def reward(completions, log_metric, log_extra, trainer_state, answer, **kwargs):
        log_metric("step_seen_by_the_reward", trainer_state.global_step)
        log_extra("answer", list(answer))
        return digit_reward(completions)

    data = prompts().map(lambda row: {"answer": row["prompt"][::-1]})
    trainer = run(
        trainer_class, tmp_path, trainer={"reward_funcs": reward, "train_dataset": data}, log_completions=True
    )
    assert logged(trainer, "step_seen_by_the_reward") == [0, 1]
    for step, batch in enumerate(trainer.batches, start=1):
        table = pandas.read_parquet(tmp_path / "completions" / f"completions_{step:05d}.parquet")
        assert table["answer"].tolist() == [prompt[::-1] for prompt in table["prompt"]]
        assert table["completion"].tolist() == texts(trainer, batch)
        assert table["advantage"].tolist() == pytest.approx(batch["advantages"].tolist())
