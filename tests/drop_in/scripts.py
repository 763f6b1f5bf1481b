"""Nothing but two names differs between a script for `GRPOTrainer` and one for ours; here both trainers run it.

The exception: ours is asked for exact score norms (`OPTIONS`), so that its advantages can be compared with those of one
backward pass per sequence.
"""

import pytest
import torch
from trl import GRPOConfig, GRPOTrainer

from oblr_trl import OBLRPOConfig, OBLRPOTrainer
from tests.tiny_models import digit_reward, prompts, tiny_model, tiny_tokenizer

both_trainers = pytest.mark.parametrize("trainer_class", [GRPOTrainer, OBLRPOTrainer], ids=["GRPO", "OBLRPO"])
CONFIGS = {GRPOTrainer: GRPOConfig, OBLRPOTrainer: OBLRPOConfig}
OPTIONS = {GRPOTrainer: {}, OBLRPOTrainer: {"score_method": "exact"}}
G = 4  # completions per prompt
# Two optimizer steps on every generation batch, which has as many rows as by default and comes as often.
OFF_POLICY = {"per_device_train_batch_size": 2 * G, "steps_per_generation": 2, "max_steps": 4}


def recording(trainer_class):
    """A subclass, as a user might write one, that keeps every generated training batch and the weights it came from."""

    class Recording(trainer_class):
        def __init__(self, *args, **kwargs):
            self.batches = []
            super().__init__(*args, **kwargs)

        def _generate_and_score_completions(self, inputs):
            state = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
            output = super()._generate_and_score_completions(inputs)
            if self.model.training:
                prior_strength = self._metrics["train"].get("baseline/prior_strength", [None])[-1]
                self.batches.append(dict(output) | {"state": state, "prior_strength": prior_strength})
            return output

    return Recording


def build(trainer_class, output_dir, *, trainer=None, **options):
    """The body of a script: `trainer` are arguments of the trainer, `options` fields of its configuration."""
    defaults = {
        "output_dir": str(output_dir),
        "per_device_train_batch_size": 4 * G,
        "per_device_eval_batch_size": 4 * G,
        "num_generations": G,
        "max_completion_length": 6,
        "learning_rate": 1e-3,
        "max_steps": 2,
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "seed": 3,
    }
    arguments = {"reward_funcs": digit_reward, "train_dataset": prompts(), "processing_class": tiny_tokenizer()}
    arguments |= trainer or {}
    arguments.setdefault("model", tiny_model(num_layers=2))
    args = CONFIGS[trainer_class](**(defaults | OPTIONS[trainer_class] | options))
    return recording(trainer_class)(args=args, **arguments)


def run(trainer_class, output_dir, **options):
    trainer = build(trainer_class, output_dir, **options)
    trainer.start = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
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
    """The prompts of the data set; decoding would put blanks between the characters."""
    tokenizer = tiny_tokenizer()
    rows = (tokenizer.convert_ids_to_tokens(ids, skip_special_tokens=True) for ids in batch["prompt_ids"])
    return ["".join(row) for row in rows]
