"""The output projection of a model, and what the model makes of its output before the softmax.

A scale a and a soft cap c, \\( z = c \\tanh(a l / c) \\) with l the projection's output, as TRL's fused head applies them.
"""

import math
from typing import Any, NamedTuple

from torch import nn

from oblr_trl.scores.rules import forward_owner

# Entries of a model's configuration that multiply the projection's output (Cohere, Muse, Falcon-H1), in TRL's order.
_LOGIT_MULTIPLIERS = ("logit_scale", "output_multiplier", "lm_head_multiplier")


class LogitTransform(NamedTuple):
    r"""\\( z = c \tanh(a l / c) \\), or \\( a l \\) without a cap."""

    scale: float = 1.0  # a
    softcap: float = math.inf  # c


def output_projection(model: Any) -> nn.Linear:
    """
    The layer that computes the logits.

    Raises:
        `ValueError`: If it is not a plain `nn.Linear`.
    """
    head = model.get_output_embeddings()
    if qualified_name(head) == "peft.utils.other.ModulesToSaveWrapper":
        if "forward" in vars(head):
            raise ValueError(
                "`cast_lm_head_to_fp32=True` replaces the forward of a head in `modules_to_save`, whose trained copy is then "
                "never called. Set `cast_lm_head_to_fp32=False`, or remove the head from `modules_to_save`."
            )
        head = head.modules_to_save[head.active_adapter]
    if forward_owner(head) is not nn.Linear:
        raise ValueError(
            f"The model's output embeddings are a `{qualified_name(head)}`, but the scoring pass computes logits as a plain "
            "`nn.Linear` does. Leave the head out of adapters (`modules_to_save=['lm_head']` trains a copy of it) and of "
            "quantization (`llm_int8_skip_modules` or `modules_to_not_convert`, as ['lm_head'])."
        )
    return head


def logit_transform(config: Any) -> LogitTransform:
    """The transform that a model's text configuration asks for."""
    softcap = getattr(config, "final_logit_softcapping", None) or math.inf
    for name in _LOGIT_MULTIPLIERS:
        if isinstance(multiplier := getattr(config, name, None), (int, float)):
            return LogitTransform(float(multiplier), softcap)
    # Granite divides by it, HyperCLOVA X multiplies; MiniCPM3 divides the head's input, which the pass sees divided.
    scaling = getattr(config, "logits_scaling", None) or 1.0
    scale = {"hyperclovax": scaling, "minicpm3": 1.0}.get(config.model_type, 1.0 / scaling)
    return LogitTransform(scale, softcap)


def qualified_name(module: nn.Module) -> str:
    """Module and name of a layer's class."""
    return f"{type(module).__module__}.{type(module).__name__}"
