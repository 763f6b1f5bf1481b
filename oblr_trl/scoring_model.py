"""The scoring pass in the shape of a model, as TRL's trainers call one."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from oblr_trl.scores.one_pass import ScoreOutput
from oblr_trl.scores.score_pass import ScorePass

# Optional entries of the batch that the forward pass of multimodal models takes.
FORWARD_KEYS = (
    "pixel_values",
    "image_grid_thw",
    "num_images",
    "pixel_attention_mask",
    "spatial_shapes",
    "num_tiles",
    "image_sizes",
    "token_type_ids",
    "mm_token_type_ids",
    "image_position_ids",
)


class ScoringModel:
    """
    Stands in for the model in `_get_per_token_logps_and_entropies`, so that the parent's chunking, multimodal inputs and
    mixed precision serve the scoring pass.
    """

    def __init__(self, score_pass: ScorePass, token_weights: Tensor) -> None:
        self._score_pass = score_pass
        self._token_weights = token_weights  # (B, C)
        self._outputs: list[ScoreOutput] = []
        self._start = 0

    def __call__(self, *, labels: Tensor, fused_lm_head: bool, **model_inputs: Any) -> SimpleNamespace:
        input_ids = model_inputs["input_ids"]
        token_weights = self._token_weights[self._start : self._start + input_ids.size(0)]
        self._start += input_ids.size(0)
        output = self._score_pass(model_inputs, input_ids[:, -token_weights.size(1) :], token_weights)
        self._outputs.append(output)
        return SimpleNamespace(log_probs=output.log_probs)

    def result(self, gather: Callable[[Tensor], Tensor]) -> ScoreOutput:
        """All chunks of all processes."""

        def collect(parts: list[Tensor | None]) -> Tensor | None:
            tensors = [part for part in parts if part is not None]
            return gather(torch.cat(tensors)) if tensors else None

        return ScoreOutput(
            log_probs=torch.cat([output.log_probs for output in self._outputs]),
            sketches=collect([output.sketches for output in self._outputs]),
            squared_norms=collect([output.squared_norms for output in self._outputs]),
        )
