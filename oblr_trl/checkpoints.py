"""What a checkpoint of ours holds beside a Trainer's, and which checkpoints are whole."""

import json
import logging
import os
from pathlib import Path
from typing import Any

import torch
from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

logger = logging.getLogger(__name__)

STATE_FILE = "oblrpo_state.json"
TRAINER_STATE_FILE = "trainer_state.json"


def rollouts_file(process_index: int) -> str:
    """Name of the file that holds a process's rollouts that are still to be trained on."""
    return f"oblrpo_rollouts_{process_index}.pt"


def save_state(folder: str, state: dict[str, Any]) -> None:
    """Write the algorithm's state, plain numbers and strings, into a checkpoint."""
    with open(os.path.join(folder, STATE_FILE), "w") as f:
        json.dump(state, f)


def load_state(folder: str) -> dict[str, Any]:
    """
    Read the algorithm's state from a checkpoint.

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


def save_rollouts(folder: str, process_index: int, rollouts: list[dict[str, Any]]) -> None:
    """Write this process's rollouts that the next optimizer steps still train on."""
    os.makedirs(folder, exist_ok=True)
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
        {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in batch.items()}
        for batch in rollouts
    ]


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
            f"The checkpoint {folder!r} was written by `OBLRPOTrainer`, and `trainer` is 'grpo', which cannot go on with its "
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
