"""Trainers and optimizers that write down what they used, and the scores of what was written down."""

import torch

from oblr_trl import OBLRPOTrainer
from oblr_trl.gradient_snr import per_prompt_gradients
from oblr_trl.scores import reference_scores
from tests.tiny_models import tiny_model


def _on_cpu(values):
    return {name: value.cpu() if isinstance(value, torch.Tensor) else value for name, value in values.items()}


def recording(trainer_class):
    """A subclass, as a user might write one, that keeps every generated training batch and the weights it came from, on the CPU."""

    class Recording(trainer_class):
        def __init__(self, *args, **kwargs):
            self.batches = []
            super().__init__(*args, **kwargs)
            self.start = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}

        def _calculate_rewards(self, *args):
            rewards = super()._calculate_rewards(*args)
            self.last_rewards = rewards.cpu()
            return rewards

        def _generate_and_score_completions(self, inputs):
            state = _on_cpu({name: tensor.clone() for name, tensor in self.model.state_dict().items()})
            output = super()._generate_and_score_completions(inputs)
            if self.model.training:
                prior_strength = self._metrics["train"].get("baseline/prior_strength", [None])[-1]
                rewards = self.last_rewards[:, 0].view(-1, self.num_generations)
                self.batches.append(
                    _on_cpu(output) | {"state": state, "rewards": rewards, "prior_strength": prior_strength}
                )
            return output

    return Recording


Recording = recording(OBLRPOTrainer)


class RecordingSGD(torch.optim.SGD):
    """Writes down, for each step, the rate of every parameter group."""

    used: list

    def step(self, closure=None):
        self.__dict__.setdefault("used", []).append([group["lr"] for group in self.param_groups])
        return super().step(closure)

    @property
    def rates(self):
        """Those of the first group."""
        return [rates[0] for rates in self.used]


def oracle_scores(batch, architecture="qwen3", **options):
    """Full scores of a recorded batch, at the weights it was generated with, one row of `(N, G)` per prompt."""
    model = tiny_model(architecture, num_layers=2)
    model.load_state_dict(batch["state"])
    input_ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    attention_mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
    scores = reference_scores(model, input_ids, attention_mask, batch["completion_mask"], **options)
    return scores.view(*batch["rewards"].shape, -1)


def head_gradients(batches, architecture="qwen3"):
    """Per-prompt gradients of the output projection, whose 2560 parameters fit a sketch without projection."""
    gradients = []
    for batch in batches:
        advantages = batch["advantages"].view_as(batch["rewards"])
        gradients.append(per_prompt_gradients(oracle_scores(batch, architecture, scope="lm_head"), advantages))
    return torch.cat(gradients)
