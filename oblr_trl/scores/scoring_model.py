"""The scoring pass in the shape of a model, as TRL's trainers call one."""

import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from oblr_trl.scores.score_pass import ScoreOutput, ScorePass


class ScoringModel:
    """
    Stands in for the model in `_get_per_token_logps_and_entropies`, so that the parent's chunking, multimodal inputs and
    mixed precision serve the scoring pass, and its log-probabilities the parent. Columns after the last weighted token of a chunk
    do not take part, but where positions are encoded by the length of a batch.

    Args:
        score_pass ([`~scores.score_pass.ScorePass`]): The scoring pass.
        token_weights (`torch.Tensor` of shape `(B, C)`): Seed of every token of the local batch.
        rows (`torch.Tensor` of shape `(M,)`, *optional*): Rows in the order in which the chunks come, all in their own order if not given.
    """

    def __init__(self, score_pass: ScorePass, token_weights: Tensor, rows: Tensor | None = None) -> None:
        self._score_pass = score_pass
        self._scoped = score_pass.scoped_parameters()  # for all chunks: it looks at every module
        rows = torch.arange(token_weights.size(0)) if rows is None else rows
        self._back = rows.argsort().to(token_weights.device)  # to the rows' own order
        self._token_weights = token_weights[rows]
        # Here for all chunks at once: a device is waited for.
        self._lengths = weighted_lengths(self._token_weights).tolist()
        if _rotates_by_length(score_pass.model):
            self._lengths = [token_weights.size(1)] * len(self._lengths)
        self._outputs: list[ScoreOutput] = []
        self._start = 0
        self.seconds = 0.0

    def __call__(self, *, labels: Tensor, fused_lm_head: bool, **model_inputs: Any) -> SimpleNamespace:
        start = time.perf_counter()
        input_ids = model_inputs["input_ids"]
        rows = slice(self._start, self._start + input_ids.size(0))
        self._start = rows.stop
        # A tool may have put images into a completion, whose features come whole.
        whole = "pixel_values" in model_inputs
        num_tokens = self._token_weights.size(1) if whole else max(*self._lengths[rows], 1)
        unused = self._token_weights.size(1) - num_tokens
        for name, value in model_inputs.items():
            if isinstance(value, Tensor) and value.shape == input_ids.shape:
                model_inputs[name] = value[:, : value.size(1) - unused]
        token_weights = self._token_weights[rows, :num_tokens]
        output = self._score_pass(
            model_inputs, model_inputs["input_ids"][:, -num_tokens:], token_weights, self._scoped
        )
        output.log_probs = nn.functional.pad(output.log_probs, (0, unused))
        self._outputs.append(output)
        # Once for all chunks, so that the GPU is not kept waiting between them.
        if input_ids.device.type == "cuda" and self._start >= self._token_weights.size(0):
            torch.cuda.synchronize(input_ids.device)
        self.seconds += time.perf_counter() - start
        return SimpleNamespace(log_probs=output.log_probs)

    def result(self, gather: Callable[[Tensor], Tensor], sequence_weights: Tensor | None = None) -> ScoreOutput:
        """
        The scores of all chunks in the rows' own order, gathered over processes by `gather`, and the log-probabilities of this one.

        `sequence_weights` (B, 1) is what every token weight of a sequence is multiplied by, where that became known after the pass.
        """
        back = self._back
        log_probs = torch.cat([output.log_probs for output in self._outputs])[back]
        weights = torch.ones_like(self._token_weights[:, :1]) if sequence_weights is None else sequence_weights
        assert weights.shape == (log_probs.size(0), 1), "weights of single tokens must be known before the pass"

        def collect(parts: list[Tensor | None], scale: Tensor) -> Tensor | None:
            tensors = [part for part in parts if part is not None]
            return gather(torch.cat(tensors)[back] * scale) if tensors else None

        sketches = collect([output.sketches for output in self._outputs], weights)
        squares = weights.squeeze(1).square()
        norms = collect([output.squared_norms for output in self._outputs], squares)
        head_norms = collect([output.head_squared_norms for output in self._outputs], squares)
        products = collect([output.products for output in self._outputs], weights)
        return ScoreOutput(log_probs, sketches, norms, head_norms, products)


def weighted_lengths(token_weights: Tensor) -> Tensor:
    """Number of columns up to the last one that is not 0, of shape `(B,)`."""
    columns = torch.arange(1, token_weights.size(1) + 1, device=token_weights.device)
    return ((token_weights != 0) * columns).amax(dim=1)


def _rotates_by_length(model: nn.Module) -> bool:
    """Whether rotary frequencies depend on the longest sequence of a batch, for which the loss takes its padded length."""
    types = [getattr(module, "rope_type", None) for module in model.modules()]
    # By kind of layer in some models.
    flat = [kind for value in types for kind in (value.values() if isinstance(value, dict) else [value])]
    return "dynamic" in flat or "longrope" in flat
