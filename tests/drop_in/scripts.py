"""Nothing but two names differs between a script for `GRPOTrainer` and one for ours; here both trainers run it.

The exception: ours is asked for exact score norms and for no memory of prompts (`OPTIONS`), so that its advantages can be compared
with those of one backward pass per sequence of the batch.
"""

import pytest
import torch
from trl import GRPOConfig, GRPOTrainer

from oblr_trl import OBLRPOConfig, OBLRPOTrainer
from tests.recording import recording
from tests.tiny_models import construct, digit_reward, tiny_tokenizer

both_trainers = pytest.mark.parametrize("trainer_class", [GRPOTrainer, OBLRPOTrainer], ids=["GRPO", "OBLRPO"])
CONFIGS = {GRPOTrainer: GRPOConfig, OBLRPOTrainer: OBLRPOConfig}
OPTIONS = {GRPOTrainer: {}, OBLRPOTrainer: {"score_method": "exact", "baseline_memory_size": 0}}
G = 4  # completions per prompt
# Two optimizer steps on every generation batch, which has as many rows as by default and comes as often.
OFF_POLICY = {"per_device_train_batch_size": 2 * G, "steps_per_generation": 2, "max_steps": 4}


def build(trainer_class, output_dir, *, trainer=None, **options):
    """The body of a script: `trainer` are arguments of the trainer, `options` fields of its configuration."""
    defaults = {
        "per_device_train_batch_size": 4 * G,
        "per_device_eval_batch_size": 4 * G,
        "num_generations": G,
        "max_completion_length": 6,
        "max_steps": 2,
    }
    arguments = dict(trainer or {})
    model, reward = arguments.pop("model", None), arguments.pop("reward_funcs", digit_reward)
    options = defaults | OPTIONS[trainer_class] | options
    own = {"model": model, "reward": reward, "trainer": arguments}
    return construct(recording(trainer_class), CONFIGS[trainer_class], output_dir, **own, **options)


def run(trainer_class, output_dir, **options):
    trainer = build(trainer_class, output_dir, **options)
    trainer.train()
    return trainer


def moved(trainer):
    """Names of the parameters that training changed."""
    return {
        name
        for name, parameter in trainer.model.named_parameters()
        if not torch.equal(parameter.detach(), trainer.start[name])
    }


def texts(trainer, batch):
    """The completions as reward functions see them."""
    return trainer._tokenizer.batch_decode(batch["completion_ids"], skip_special_tokens=True)


def prompt_texts(batch):
    """The prompts of the dataset; decoding would put blanks between the characters."""
    tokenizer = tiny_tokenizer()
    rows = (tokenizer.convert_ids_to_tokens(ids, skip_special_tokens=True) for ids in batch["prompt_ids"])
    return ["".join(row) for row in rows]
