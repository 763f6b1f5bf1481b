"""Completions with a tool's replies in them: the replies are no part of the score, and an environment may own the reward."""

import asyncio
import json
import re

import pytest
import torch
from transformers import Qwen3ForCausalLM

from oblr_trl import OBLRPOTrainer, length_weighted_baseline
from tests.drop_in.chats import chat_model, chat_tokenizer, questions
from tests.drop_in.expected_advantages import assert_advantages, squared_norms
from tests.drop_in.scripts import OFF_POLICY, G, both_trainers, run, texts
from tests.tiny_models import logged

pytestmark = pytest.mark.filterwarnings("ignore:You are using 'environment_factory', which is an experimental feature")

RESPONSE_TEMPLATE = {
    "defaults": {"role": "assistant"},
    "start_anchor": "<assistant>",
    "fields": {
        "tool_calls": {
            "open": "<call>",
            "close_pattern": "</call>",
            "repeats": True,
            "content": "json",
            "transform": {"type": "function", "function": "{content}"},
        },
        "content": {"close_pattern": "<eos>", "content": "text"},
    },
}


def tool_tokenizer():
    tokenizer = chat_tokenizer()
    tokenizer.response_template = RESPONSE_TEMPLATE
    return tokenizer


class Scripted(Qwen3ForCausalLM):
    """Calls a tool in three of four first turns, and answers with a random digit after a tool has replied."""

    tool_names = ("add",)

    def generate(self, input_ids, attention_mask, generation_config):
        tokenizer = tool_tokenizer()
        tool = tokenizer.convert_tokens_to_ids("<tool>")
        replies = []
        for i, row in enumerate(input_ids):
            a, b, name = (int(torch.randint(high, ())) for high in (10, 10, len(self.tool_names)))
            if tool in row or i % 4 == 3:
                reply = f"{a}<eos>"
            else:
                function = {"name": self.tool_names[name], "arguments": {"a": a, "b": b}}
                reply = f"<call>{json.dumps(function)}</call><eos>"
            replies.append(tokenizer(reply)["input_ids"])
        width = max(len(reply) for reply in replies)
        padded = torch.tensor([reply + [0] * (width - len(reply)) for reply in replies])
        return torch.cat([input_ids, padded], dim=1)


class ScriptedWithTwoTools(Scripted):
    tool_names = ("add", "multiply")


def add(a: int, b: int) -> str:
    """
    Adds.

    Args:
        a: One number.
        b: The other.

    Returns:
        Their sum in words that no model wrote.
    """
    return f"the sum of {a} and {b} is {a + b}"


async def multiply(a: int, b: int) -> int:
    """
    Multiplies.

    Args:
        a: One number.
        b: The other.

    Returns:
        Their product.
    """
    await asyncio.sleep(0)
    return a * b


def calls(text):
    return [json.loads(call) for call in re.findall(r"<call>(.*?)</call>", text)]


def last_digit(completion):
    return int(completion[-1]["content"][-1]) / 9


def run_with_tools(trainer_class, tmp_path, **options):
    return run(
        trainer_class,
        tmp_path,
        trainer={
            "model": chat_model(ScriptedWithTwoTools),
            "processing_class": tool_tokenizer(),
            "train_dataset": questions(),
            "tools": [add, multiply],
            "reward_funcs": lambda completions, **kwargs: [last_digit(completion) for completion in completions],
        },
        max_completion_length=128,
        **options,
    )


@both_trainers
@pytest.mark.parametrize("options", [{}, OFF_POLICY], ids=["on policy", "off policy"])
def test_tools_are_called_and_their_tokens_are_no_part_of_the_score(tmp_path, trainer_class, options):
    """Off policy there is a forward pass for old log-probabilities, which knows of no tool mask."""
    trainer = run_with_tools(trainer_class, tmp_path, **options)
    used = set()
    for batch in trainer.batches:
        rows = zip(batch["completion_ids"], batch["completion_mask"], batch["tool_mask"], strict=True)
        for ids, completion_mask, tool_mask in rows:
            called = calls(trainer._tokenizer.decode(ids))
            from_tools = trainer._tokenizer.decode(ids[(completion_mask * (1 - tool_mask)).bool()])
            results = [
                add(**function["arguments"])
                if function["name"] == "add"
                else function["arguments"]["a"] * function["arguments"]["b"]
                for function in called
            ]
            assert from_tools == "".join(f"<tool>{result}<eos><assistant>" for result in results)
            used |= {function["name"] for function in called}
    assert used == {"add", "multiply"}
    assert logged(trainer, "tools/call_frequency") == [0.75, 0.75]
    assert logged(trainer, "tools/failure_frequency") == [0.0, 0.0]

    def rewards(batch):
        return [int(text[-1]) / 9 for text in texts(trainer, batch)]

    assert_advantages(trainer, rewards)
    batch = trainer.batches[0]
    with_tools = squared_norms(trainer, batch, token_weights=batch["completion_mask"])
    assert (with_tools / squared_norms(trainer, batch) - 1).abs().max() > 0.1  # else the mask had no effect to test


def test_a_completions_length_counts_the_tokens_of_the_loss_and_not_those_of_tools(tmp_path):
    trainer = run_with_tools(OBLRPOTrainer, tmp_path, baseline="length_weighted", lr_adaptation="none")
    for batch in trainer.batches:
        rewards = torch.tensor([int(text[-1]) / 9 for text in texts(trainer, batch)]).view(-1, G)
        lengths = (batch["completion_mask"] * batch["tool_mask"]).sum(dim=1).view(-1, G)
        with_tools = batch["completion_mask"].sum(dim=1).view(-1, G)
        expected = rewards - length_weighted_baseline(rewards, lengths)
        assert (expected - (rewards - length_weighted_baseline(rewards, with_tools))).abs().max() > 1e-3
        torch.testing.assert_close(batch["advantages"].view_as(expected), expected)


class Guessing:
    """An environment that owns its data and its reward: the sum of what it was told."""

    def reset(self, **kwargs):
        self.told = 0
        return "guess"

    def add(self, a: int, b: int) -> int:
        """
        Adds.

        Args:
            a: One number.
            b: The other.

        Returns:
            Their sum.
        """
        self.told += a + b
        return self.told

    def get_reward(self):
        return self.told / 18


@both_trainers
def test_an_environment_may_own_prompts_tools_and_reward(tmp_path, trainer_class):
    trainer = run(
        trainer_class,
        tmp_path,
        trainer={
            "model": chat_model(Scripted),
            "processing_class": tool_tokenizer(),
            "train_dataset": None,
            "reward_funcs": None,
            "environment_factory": Guessing,
        },
        max_completion_length=128,
    )

    def rewards(batch):
        assert set(trainer._tokenizer.batch_decode(batch["prompt_ids"])) == {"<user>guess<eos><assistant>"}
        told = [calls(text) for text in trainer._tokenizer.batch_decode(batch["completion_ids"])]
        return [sum(f["arguments"]["a"] + f["arguments"]["b"] for f in functions) / 18 for functions in told]

    assert_advantages(trainer, rewards)
    assert len(logged(trainer, "rewards/Guessing/mean")) == 2
