"""Errors of one process raised on all of them, so that none waits in a collective for one that has left."""

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object


class OtherProcessError(RuntimeError):
    """Raised on the processes that did not fail themselves; its message says which one did, and why."""


def raise_everywhere(accelerator: Accelerator, error: Exception | None) -> None:
    """
    Raise on every process if any of them has an error; a collective that all processes must call.

    `error` is what went wrong on this process, and is raised there; the other processes raise an [`OtherProcessError`].
    """
    failed = torch.tensor([error is not None], dtype=torch.long, device=accelerator.device)
    if not accelerator.gather(failed).any():
        return
    messages = gather_object([None if error is None else _describe(error)])
    if error is not None:
        raise error
    failures = "; ".join(f"process {i}: {message}" for i, message in enumerate(messages) if message is not None)
    raise OtherProcessError(f"Stopped because another process failed. {failures}")


def _describe(error: Exception) -> str:
    notes: list[str] = error.__dict__.get("__notes__", [])
    return " ".join([f"{type(error).__name__}: {error}", *notes])
