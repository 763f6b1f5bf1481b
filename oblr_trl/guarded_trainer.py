"""GRPOTrainer whose failures name their cause, reach all processes, and cost no checkpoint.

Nothing here changes a number: what trains without trouble trains as `GRPOTrainer` does, bit for bit.
"""

import os
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from trl import GRPOTrainer

from oblr_trl.checkpoints import last_complete_checkpoint, load_rollouts, load_state, save_rollouts, save_state
from oblr_trl.faults.processes import raise_everywhere
from oblr_trl.faults.reward_functions import RewardGuard
from oblr_trl.oblrpo_config import OBLRPOConfig


class GuardedGRPOTrainer(GRPOTrainer):
    """
    [`~trl.GRPOTrainer`] that

    - raises on every process when a reward function fails or takes longer than `reward_timeout` on one;
    - refuses token ids beyond the model's vocabulary, infinite rewards, and a loss that is not finite, before they reach a
      weight;
    - resumes from the last checkpoint that was written to its end, and also between two optimizer steps on the same rollouts.
    """

    # Narrower than the parents declare, or declared optional there although set from the constructor on.
    args: OBLRPOConfig
    model: Any
    _buffered_inputs: Any

    def __init__(self, model, reward_funcs, args: OBLRPOConfig, *positional, **kwargs):
        super().__init__(model, reward_funcs, args, *positional, **kwargs)
        self._losses_of_step: list[Tensor] = []
        self._reward_guard = RewardGuard(args.reward_timeout)
        self.reward_funcs = [self._reward_guard.guard(reward_func) for reward_func in self.reward_funcs]

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        rewards_per_func = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        raise_everywhere(self.accelerator, self._reward_guard.take_error())
        infinite = rewards_per_func.isinf().any(dim=0)
        if infinite.any():  # gathered, hence the same on all processes: all raise
            names = [name for name, bad in zip(self.reward_func_names, infinite.tolist(), strict=True) if bad]
            raise ValueError(
                f"Reward functions {names} returned an infinite reward, which no baseline can balance. Return a finite "
                "number, or None for a completion that cannot be scored."
            )
        return rewards_per_func

    def _tokenize_prompts(self, prompts):
        prompt_ids, *others = super()._tokenize_prompts(prompts)
        raise_everywhere(self.accelerator, self._beyond_vocabulary(prompt_ids, "A prompt"))
        return prompt_ids, *others

    def _generate(self, prompts):
        prompt_ids, completion_ids, *others = super()._generate(prompts)
        error = self._beyond_vocabulary(prompt_ids, "A prompt") or self._beyond_vocabulary(
            completion_ids, "A completion"
        )
        raise_everywhere(self.accelerator, error)
        return prompt_ids, completion_ids, *others

    def _beyond_vocabulary(self, token_ids: list[list[int]], what: str) -> ValueError | None:
        """An embedding look-up out of range is an unclear error on a CPU and the end of the process on a GPU."""
        size = self.model.config.get_text_config().vocab_size
        highest = max((max(ids) for ids in token_ids if len(ids)), default=0)
        lowest = min((min(ids) for ids in token_ids if len(ids)), default=0)
        if highest < size and lowest >= 0:
            return None
        return ValueError(
            f"{what} has token id {highest if highest >= size else lowest}, but the model's vocabulary has {size} entries. "
            "Use the tokenizer the model was trained with, or call `model.resize_token_embeddings(len(tokenizer))`."
        )

    def _compute_loss(self, model, inputs):
        loss = super()._compute_loss(model, inputs)
        self._losses_of_step.append(loss.detach())
        if self.accelerator.sync_gradients:  # the last backward before the optimizer's step comes next
            losses, self._losses_of_step = torch.stack(self._losses_of_step), []
            self._refuse_not_finite("loss", self.accelerator.gather(losses))
        return loss

    def _refuse_not_finite(self, what: str, values: Tensor) -> None:
        """Raise unless all values are finite, on all processes: they are gathered, as many rows from every process."""
        finite = values.isfinite().view(self.accelerator.num_processes, -1).all(dim=1)
        if finite.all():
            return
        kind = "nan" if values.isnan().any() else "infinite"
        raise ValueError(
            f"The {what} of step {self.state.global_step} is {kind} on process {finite.tolist().index(False)}: the model's "
            "activations or logits are not finite. No weight was changed by it. Resume from the last checkpoint with a lower "
            "learning rate, gradient clipping, or bf16 instead of fp16."
        )

    def train(self, resume_from_checkpoint=None, *args, **kwargs):
        if resume_from_checkpoint is True:  # the parent would take the newest one, whole or not
            assert self.args.output_dir is not None
            resume_from_checkpoint = last_complete_checkpoint(self.args.output_dir)
            if resume_from_checkpoint is None:
                raise ValueError(
                    f"There is no complete checkpoint in `output_dir` ({self.args.output_dir}) to resume from."
                )
        if resume_from_checkpoint and os.path.isdir(resume_from_checkpoint):
            load_state(
                resume_from_checkpoint
            )  # refuses one that cannot be resumed, before the parent reads half of it
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _save_checkpoint(self, model, trial):
        try:
            super()._save_checkpoint(model, trial)
        except (OSError, RuntimeError, SafetensorError) as error:  # all three report a full disk
            error.add_note(
                f"The checkpoint of step {self.state.global_step} could not be written and will not be resumed from. Earlier "
                "checkpoints are untouched: free some space, then resume with `resume_from_checkpoint=True`."
            )
            raise

    # The last thing every process writes, before one of them writes `trainer_state.json` and deletes old checkpoints.
    def _save_rng_state(self, output_dir):
        super()._save_rng_state(output_dir)
        if self._trains_on_old_rollouts():
            assert self._buffered_inputs is not None
            save_rollouts(output_dir, self.accelerator.process_index, self._buffered_inputs)
        if self.args.should_save:
            save_state(output_dir, self._algorithm_state())
        self.accelerator.wait_for_everyone()

    def _trains_on_old_rollouts(self) -> bool:
        """Whether the next training step is on rollouts that were generated before an optimizer step."""
        assert self.args.steps_per_generation is not None  # set by the configuration
        return self._step % (self.args.steps_per_generation * self.num_iterations) != 0

    def _load_optimizer_and_scheduler(self, checkpoint):
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        self._load_algorithm_state(load_state(checkpoint))
        if self._trains_on_old_rollouts():
            device = self.accelerator.device
            self._buffered_inputs = load_rollouts(checkpoint, self.accelerator.process_index, device)

    def _algorithm_state(self) -> dict[str, Any]:
        """State of the run that the parent does not save, as plain numbers and strings."""
        return {"training_steps": self._step}

    def _load_algorithm_state(self, state: dict[str, Any]) -> None:
        self._step = state["training_steps"]
