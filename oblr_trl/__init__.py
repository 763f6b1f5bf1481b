"""OBLR-PO for TRL: a gradient-weighted baseline and a learning rate driven by the gradient's signal-to-noise ratio."""

from typing import TYPE_CHECKING

from oblr_trl.baselines import (
    AutomaticPriorStrength,
    gradient_weighted_baseline,
    group_mean_baseline,
    leave_one_out_baseline,
    length_weighted_baseline,
)
from oblr_trl.gradient_snr import GradientSNR, gradient_moments, per_prompt_gradients, rho
from oblr_trl.lr_scheduler import SNRScheduler
from oblr_trl.scores import score_sketches

if TYPE_CHECKING:
    from oblr_trl.oblrpo_config import OBLRPOConfig
    from oblr_trl.oblrpo_trainer import OBLRPOTrainer

__version__ = "0.1.0"

__all__ = [
    "AutomaticPriorStrength",
    "GradientSNR",
    "OBLRPOConfig",
    "OBLRPOTrainer",
    "SNRScheduler",
    "gradient_moments",
    "gradient_weighted_baseline",
    "group_mean_baseline",
    "leave_one_out_baseline",
    "length_weighted_baseline",
    "per_prompt_gradients",
    "rho",
    "score_sketches",
]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> object:
    # TRL takes seconds to import; scores, baselines and the reading of logs do without it.
    if name == "OBLRPOConfig":
        from oblr_trl.oblrpo_config import OBLRPOConfig

        return OBLRPOConfig
    if name == "OBLRPOTrainer":
        from oblr_trl.oblrpo_trainer import OBLRPOTrainer

        return OBLRPOTrainer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
