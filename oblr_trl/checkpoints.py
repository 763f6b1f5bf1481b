"""What a checkpoint holds in addition to a Trainer's, which checkpoints are complete, and a GRPOTrainer that resumes from them."""

import json
import logging
import os
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl import GRPOConfig, GRPOTrainer

from oblr_trl.oblrpo_config import OBLRPOConfig

logger = logging.getLogger(__name__)

STATE_FILE = "oblrpo_state.json"
STATE_TENSORS_FILE = "oblrpo_state.pt"
TRAINER_STATE_FILE = "trainer_state.json"


class ResumableGRPOTrainer(GRPOTrainer):
    """
    [`~trl.GRPOTrainer`] that resumes from the last checkpoint that was written to its end, also between two optimizer steps on the
    same rollouts, and saves a state of plain numbers and of tensors. A subclass adds to `_algorithm_state`, and to what loads it.
    """

    # Narrower than the parent declares, or declared optional there although set from the constructor on.
    args: OBLRPOConfig
    _buffered_inputs: Any
    _num_finished_epochs = 0  # before the checkpoint that training resumes from

    def train(self, resume_from_checkpoint=None, *args, **kwargs):
        if resume_from_checkpoint is True:  # the parent would take the newest one, complete or not
            assert self.args.output_dir is not None
            resume_from_checkpoint = last_complete_checkpoint(self.args.output_dir)
            if resume_from_checkpoint is None:
                raise ValueError(
                    f"There is no complete checkpoint in `output_dir` ({self.args.output_dir}) to resume from."
                )
        if resume_from_checkpoint and os.path.isdir(resume_from_checkpoint):
            load_state(resume_from_checkpoint)  # refuses one that cannot be resumed before the parent reads half of it
            epoch = TrainerState.load_from_json(os.path.join(resume_from_checkpoint, TRAINER_STATE_FILE)).epoch
            self._num_finished_epochs = int((epoch or 0) + 1e-6)  # steps over steps per epoch
        else:
            self._num_finished_epochs = 0
        return super().train(resume_from_checkpoint, *args, **kwargs)

    # TRL's sampler draws the order of each epoch from a generator of its own, which no checkpoint holds: a resumed run would begin
    # with the order of the first epoch again.
    def _get_train_sampler(self, *args, **kwargs):
        sampler = super()._get_train_sampler(*args, **kwargs)
        for _ in range(self._num_finished_epochs):
            next(iter(sampler), None)
        return sampler

    # The last thing every process writes, before one of them writes `trainer_state.json` and deletes old checkpoints.
    def _save_rng_state(self, output_dir):
        super()._save_rng_state(output_dir)
        if self._trains_on_old_rollouts():
            assert self._buffered_inputs is not None
            save_rollouts(output_dir, self.accelerator.process_index, self._buffered_inputs)
        if self.args.should_save:
            save_state(output_dir, self._algorithm_state())
        self.accelerator.wait_for_everyone()

    def _load_optimizer_and_scheduler(self, checkpoint):
        if checkpoint is None:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        # First: with other options it is refused by name, and the parent could not read the schedule of another kind.
        self._load_algorithm_state(load_state(checkpoint) | load_state_tensors(checkpoint))
        super()._load_optimizer_and_scheduler(checkpoint)
        if self._trains_on_old_rollouts():
            device = self.accelerator.device
            self._buffered_inputs = load_rollouts(checkpoint, self.accelerator.process_index, device)

    def _trains_on_old_rollouts(self) -> bool:
        """Whether the next training step is on rollouts that were generated before an optimizer step."""
        return self._step % self._steps_per_batch != 0

    @property
    def _steps_per_batch(self) -> int:
        """Training steps, of which gradient accumulation takes several, on a generation batch."""
        assert self.args.steps_per_generation is not None  # set by the configuration
        return self.args.steps_per_generation * self.num_iterations

    def _algorithm_state(self) -> dict[str, Any]:
        """State of the run that the parent does not save: plain numbers and strings, and tensors for what would be long as text."""
        return {"steps_on_batch": self._step % self._steps_per_batch, "steps_per_batch": self._steps_per_batch}

    def _load_algorithm_state(self, state: dict[str, Any]) -> None:
        self._step, written = state["steps_on_batch"], state["steps_per_batch"]
        if self._step and written != self._steps_per_batch:
            raise ValueError(
                f"The checkpoint was written after {self._step} of the {written} training steps on a generation batch "
                f"(steps_per_generation x num_iterations), of which this run has {self._steps_per_batch}. Resume with the former, or "
                "from a checkpoint at the end of a generation batch."
            )


def rollouts_file(process_index: int) -> str:
    """Name of the file that holds a process's rollouts that are still to be trained on."""
    return f"oblrpo_rollouts_{process_index}.pt"


def save_state(folder: str, state: dict[str, Any]) -> None:
    """Write the algorithm's state into a checkpoint: plain numbers and strings, and its tensors, if any, next to them."""
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    with open(os.path.join(folder, STATE_FILE), "w") as f:
        json.dump({name: value for name, value in state.items() if name not in tensors}, f)
    if tensors:
        torch.save(tensors, os.path.join(folder, STATE_TENSORS_FILE))


def load_state(folder: str) -> dict[str, Any]:
    """
    Read the algorithm's state, without its tensors, from a checkpoint.

    Raises:
        `ValueError`: If there is none, or it cannot be read.
    """
    path = os.path.join(folder, STATE_FILE)
    if not os.path.isfile(path) and _has_weights_only(Path(folder)):
        raise ValueError(
            f"The checkpoint {folder!r} holds weights only, as save_only_model=True writes it: no optimizer state, "
            "learning-rate schedule or moving averages to resume with. Start a new run from its weights (pass it as the "
            "model), and set save_only_model=False for checkpoints that can be resumed."
        )
    if not os.path.isfile(path):
        raise ValueError(
            f"The checkpoint has no `{STATE_FILE}`: it was not written by `OBLRPOTrainer`. Start a new run from its "
            "weights (pass it as the model), or resume it with the trainer that wrote it."
        )
    try:
        with open(path) as f:
            state = json.load(f)
        if not isinstance(state, dict):
            raise ValueError(f"it holds a {type(state).__name__}, not an object")
    except ValueError as error:  # JSON and encoding errors are ValueErrors too
        raise ValueError(
            f"`{STATE_FILE}` of the checkpoint cannot be read ({error}). Resume from an older checkpoint, or start a new run "
            "from this one's weights."
        ) from error
    return state


def load_state_tensors(folder: str) -> dict[str, Tensor]:
    """Read the tensors of the algorithm's state from a checkpoint; none, if it was written without them."""
    path = os.path.join(folder, STATE_TENSORS_FILE)
    return torch.load(path, map_location="cpu", weights_only=True) if os.path.isfile(path) else {}


def save_rollouts(folder: str, process_index: int, rollouts: list[dict[str, Any]]) -> None:
    """Write this process's rollouts that the next optimizer steps still train on."""
    torch.save(rollouts, os.path.join(folder, rollouts_file(process_index)))


def load_rollouts(folder: str, process_index: int, device: torch.device) -> list[dict[str, Any]]:
    """
    Read what [`save_rollouts`] wrote.

    Raises:
        `ValueError`: If this process's file is missing, because the run that wrote the checkpoint had fewer processes.
    """
    path = os.path.join(folder, rollouts_file(process_index))
    if not os.path.isfile(path):
        raise ValueError(
            f"The checkpoint was written between two optimizer steps on the same rollouts, but has no "
            f"`{rollouts_file(process_index)}`. Resume with as many processes as wrote it, or from a checkpoint whose step "
            "is a multiple of the optimizer steps per generation."
        )
    rollouts = torch.load(path, map_location="cpu", weights_only=True)
    return [
        {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}
        for batch in rollouts
    ]


def check_same_options(state: dict[str, Any], args: Any, names: Sequence[str]) -> None:
    """Refuse to resume with other values of the options `names`, which the saved state belongs to, as far as it has them."""
    for name in names:
        if name in state and state[name] != getattr(args, name):
            raise ValueError(
                f"The checkpoint was written with {name}={state[name]!r} but this run has {getattr(args, name)!r}. Resume "
                "with the former, or start a new run from the checkpoint's weights."
            )


def add_method_settings(args: OBLRPOConfig, prior_strength: float, lrs: Sequence[float]) -> None:
    """
    Add what was in use of the method to the model card that TRL has just written in `output_dir`.

    Args:
        args ([`OBLRPOConfig`]): Options of the run.
        prior_strength (`float`): Prior strength of the baseline for the next batch, in completions.
        lrs (`Sequence[float]`): Initial learning rates, one per parameter group.
    """
    own = {field.name for field in fields(OBLRPOConfig)} - {field.name for field in fields(GRPOConfig)}
    rows = {"Setting": "Value", "---": "---"} | {f"`{name}`": f"`{getattr(args, name)}`" for name in sorted(own)}
    rows |= {
        "prior strength, last": f"{prior_strength:g}",
        "initial learning rate": ", ".join(f"{lr:g}" for lr in sorted(set(lrs))),
        "prompts x completions per optimizer step": f"{args.prompts_per_step:g} x {args.num_generations}",
    }
    unused = []
    if args.baseline != "gradient_weighted":
        unused.append("the baseline")
    if args.lr_adaptation == "none":
        unused.append("the learning rate")
    sentence = "Trained with `oblr_trl`, which is not the authors' code."
    if unused:
        sentence += f" Not in use of OBLR-PO: {' and '.join(unused)}."
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    assert args.output_dir is not None  # set by the parent
    card = Path(args.output_dir) / "README.md"
    before, heading, after = card.read_text(encoding="utf-8").partition("### Framework versions")
    section = f"### Method settings\n\n{sentence}\n\n{table}\n\n"
    card.write_text(f"{before}{section}{heading}{after}", encoding="utf-8")


def last_complete_checkpoint(output_dir: str) -> str | None:
    """
    The newest checkpoint in `output_dir` that was written to its end.

    `trainer_state.json` is written last, so one that is missing or cut off marks a checkpoint that a crash or a full disk
    interrupted. Such checkpoints, and those of `save_only_model=True`, are skipped with a warning.

    Returns:
        `str`, *optional*: Its path, or `None` if there is none.
    """
    folders = [path for path in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*") if _step(path) is not None]
    for folder in sorted(folders, key=lambda path: _step(path) or 0, reverse=True):
        if not _is_written_to_its_end(folder):
            logger.warning("Skipping %s: it is incomplete, its `%s` cannot be read.", folder, TRAINER_STATE_FILE)
        elif _has_weights_only(folder):
            logger.warning("Skipping %s: it holds weights only, as save_only_model=True writes it.", folder)
        else:
            return str(folder)
    return None


def refuse_for_grpo(folder: str) -> None:
    """
    Check a checkpoint that [`~trl.GRPOTrainer`] is to resume.

    Raises:
        `ValueError`: If `OBLRPOTrainer` wrote it.
    """
    if os.path.isfile(os.path.join(folder, STATE_FILE)):
        raise ValueError(
            f"The checkpoint {folder!r} was written by `OBLRPOTrainer`, and `trainer` is 'grpo', which cannot continue its "
            "learning-rate schedule. Resume it with trainer: oblrpo, or start a new run from its weights: set "
            f"model_name_or_path: {folder}, another output_dir, and no resume_from_checkpoint."
        )


def _step(folder: Path) -> int | None:
    number = folder.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-")
    return int(number) if number.isdecimal() and folder.is_dir() else None


def _is_written_to_its_end(folder: Path) -> bool:
    try:
        TrainerState.load_from_json(str(folder / TRAINER_STATE_FILE))
    except (OSError, ValueError, TypeError):
        return False
    return True


def _has_weights_only(folder: Path) -> bool:
    """Every process saves the state of its random numbers, on every backend, unless the run has `save_only_model`."""
    return not any(folder.glob("rng_state*.pth"))
