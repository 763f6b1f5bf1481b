"""What happens where the learning rate cannot be adapted. `args` is an [`OBLRPOConfig`] throughout.

It is an error where `lr_adaptation` was asked for; where it was left unset, the run trains without, as [`~trl.GRPOTrainer`] does, and
says so.
"""

import warnings
from collections.abc import Callable
from typing import Any

from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames


def adapts(args: Any) -> bool:
    """Whether the learning rate is adapted."""
    return args.lr_adaptation != "none"


def adapt_if_possible(args: Any, check: Callable[[Any], None], subject: Any) -> None:
    """Apply a check that raises a `ValueError` for what keeps the learning rate from being adapted."""
    if not adapts(args):
        return
    try:
        check(subject)
    except ValueError as error:
        if not args.default_to("none"):
            raise
        _warn_not_adapted(str(error))


def do_not_adapt(args: Any, name: str, reason: str, remedy: str) -> None:
    """Refuse the adaptation that was asked for, or switch off the default with a warning."""
    refusal = refusal_of(args, name, reason, remedy)
    if not args.default_to("none"):
        raise ValueError(refusal)
    _warn_not_adapted(refusal)


def _warn_not_adapted(refusal: str) -> None:
    warnings.warn(f"The learning rate is not adapted: lr_adaptation is 'none', as in GRPOTrainer. {refusal}")


def refusal_of(args: Any, name: str, reason: str, remedy: str) -> str:
    """Text of the error for an option that cannot be honoured."""
    value = getattr(args, name)
    value = value.value if isinstance(value, SchedulerType | OptimizerNames) else value
    return f"OBLR-PO cannot honour {name}={value!r}: {reason}. Remedy: {remedy}."
