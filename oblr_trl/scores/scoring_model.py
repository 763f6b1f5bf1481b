"""The scoring pass in the shape of a model, as TRL's trainers call one."""

import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from oblr_trl.scores.loss_weights import loss_token_weights
from oblr_trl.scores.score_pass import ScoreOutput, ScorePass

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
    mixed precision serve the scoring pass, and its log-probabilities the parent.

    Args:
        score_pass ([`~scores.score_pass.ScorePass`]): The scoring pass.
        token_weights (`torch.Tensor` of shape `(B, C)`): Seed of every token of the local batch.
    """

    def __init__(self, score_pass: ScorePass, token_weights: Tensor) -> None:
        self._score_pass = score_pass
        self._token_weights = token_weights
        self._outputs: list[ScoreOutput] = []
        self._start = 0
        self.seconds = 0.0

    def __call__(self, *, labels: Tensor, fused_lm_head: bool, **model_inputs: Any) -> SimpleNamespace:
        start = time.perf_counter()
        input_ids = model_inputs["input_ids"]
        token_weights = self._token_weights[self._start : self._start + input_ids.size(0)]
        self._start += input_ids.size(0)
        output = self._score_pass(model_inputs, input_ids[:, -token_weights.size(1) :], token_weights)
        self._outputs.append(output)
        # Once for all chunks, so that the GPU is not kept waiting between them.
        if input_ids.device.type == "cuda" and self._start >= self._token_weights.size(0):
            torch.cuda.synchronize(input_ids.device)
        self.seconds += time.perf_counter() - start
        return SimpleNamespace(log_probs=output.log_probs)

    def result(self, gather: Callable[[Tensor], Tensor], sequence_weights: Tensor | None = None) -> ScoreOutput:
        """
        The scores of all chunks, gathered over processes by `gather`, and the log-probabilities of this one.

        `sequence_weights` (B, 1) is what every token weight of a sequence is multiplied by, where that became known after the pass.
        """
        log_probs = torch.cat([output.log_probs for output in self._outputs])
        weights = torch.ones_like(self._token_weights[:, :1]) if sequence_weights is None else sequence_weights
        assert weights.shape == (log_probs.size(0), 1), "weights of single tokens must be known before the pass"

        def collect(parts: list[Tensor | None], scale: Tensor) -> Tensor | None:
            tensors = [part for part in parts if part is not None]
            return gather(torch.cat(tensors) * scale) if tensors else None

        sketches = collect([output.sketches for output in self._outputs], weights)
        norms = collect([output.squared_norms for output in self._outputs], weights.squeeze(1).square())
        products = collect([output.products for output in self._outputs], weights)
        return ScoreOutput(log_probs, sketches, norms, products)


class OldLogpsForward:
    """The parent's forward pass for the old log-probabilities of `model`, whose place a scoring pass takes, once."""

    def __init__(self, model: Any, score_pass: ScorePass, loss_type: str, *, micro_batch_size: int) -> None:
        self._model = model
        self._score_pass = score_pass
        self._loss_type = loss_type
        self._micro_batch_size = micro_batch_size
        self.scoring_model: ScoringModel | None = None

    def in_place_of(self, model: Any, loss_mask: Tensor) -> Any:
        """The scoring pass in the shape of a model where it is due, else `model`."""
        if model is not self._model or self.scoring_model is not None:
            return model
        token_weights = loss_token_weights(self._loss_type, loss_mask, micro_batch_size=self._micro_batch_size)
        self.scoring_model = ScoringModel(self._score_pass, token_weights)
        return self.scoring_model
