"""The scoring pass in the shape of a model, as TRL's trainers call one."""

import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from oblr_trl.scores.loss_weights import applied_importance_ratio, loss_token_weights
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
    mixed precision serve the scoring pass, and its log-probabilities the parent. Columns after the last weighted token of a chunk
    do not take part, but where positions are encoded by the length of a batch.

    Args:
        score_pass ([`~scores.score_pass.ScorePass`]): The scoring pass.
        token_weights (`torch.Tensor` of shape `(B, C)`): Seed of every token of the local batch.
        order (`torch.Tensor` of shape `(B,)`, *optional*): Rows in the order in which the chunks come, the batch's own if not given.
    """

    def __init__(self, score_pass: ScorePass, token_weights: Tensor, order: Tensor | None = None) -> None:
        self._score_pass = score_pass
        self._scoped = score_pass.scoped_parameters()  # for all chunks: it looks at every module
        self._order = torch.arange(token_weights.size(0), device=token_weights.device) if order is None else order
        self._token_weights = token_weights[self._order]
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
        The scores of all chunks, gathered over processes by `gather`, and the log-probabilities of this one.

        `sequence_weights` (B, 1) is what every token weight of a sequence is multiplied by, where that became known after the pass.
        """
        back = self._order.argsort()
        log_probs = torch.cat([output.log_probs for output in self._outputs])[back]
        weights = torch.ones_like(self._token_weights[:, :1]) if sequence_weights is None else sequence_weights
        assert weights.shape == (log_probs.size(0), 1), "weights of single tokens must be known before the pass"

        def collect(parts: list[Tensor | None], scale: Tensor) -> Tensor | None:
            tensors = [part for part in parts if part is not None]
            return gather(torch.cat(tensors)[back] * scale) if tensors else None

        sketches = collect([output.sketches for output in self._outputs], weights)
        norms = collect([output.squared_norms for output in self._outputs], weights.squeeze(1).square())
        products = collect([output.products for output in self._outputs], weights)
        return ScoreOutput(log_probs, sketches, norms, products)


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


class CompletionScorer:
    """
    Scores one generation batch: in the parent's forward pass for the old log-probabilities, whose place a scoring pass then takes, or
    in a pass of its own.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]): The model whose log-probabilities the parent asks for.
        score_pass ([`~scores.score_pass.ScorePass`]): The scoring pass.
        args ([`OBLRPOConfig`]): Options of the run.
        masks_later (`bool`): Whether the parent's forward pass comes before the loss mask is known.
    """

    def __init__(self, model: Any, score_pass: ScorePass, args: Any, *, masks_later: bool) -> None:
        self._model = model
        self._score_pass = score_pass
        self._args = args
        self._reuses_forward = args.reuses_old_logps_forward and not masks_later
        self._scoring_model: ScoringModel | None = None

    def in_place_of(self, model: Any, loss_mask: Tensor) -> Any:
        """The scoring pass in the shape of a model, once, where it is due, else `model`."""
        if model is not self._model or not self._reuses_forward or self._scoring_model is not None:
            return model
        self._scoring_model = ScoringModel(self._score_pass, self._token_weights(loss_mask))
        return self._scoring_model

    def score(
        self,
        output: dict[str, Any],
        loss_mask: Tensor,
        forward: Callable[..., Any],
        gather: Callable[[Tensor], Tensor],
    ) -> tuple[ScoreOutput, Tensor, float]:
        """The scores of all processes, the weights of the local tokens in them, and the seconds that the pass took. A pass of its own goes
        over the parent's `output` by its method `forward` for log-probabilities, in chunks of `score_batch_size`."""
        args, ratio = self._args, output.get("importance_sampling_ratio")
        if ratio is not None:
            ratio = applied_importance_ratio(
                ratio, loss_mask, loss_type=args.loss_type, importance_sampling_level=args.importance_sampling_level
            )
        token_weights = self._token_weights(loss_mask, ratio)
        if self._scoring_model is not None:
            assert "old_per_token_logps" in output, "the scoring pass took the place of another forward pass"
            return self._scoring_model.result(gather, ratio), token_weights, self._scoring_model.seconds
        others = {key: output[key] for key in FORWARD_KEYS if key in output}
        # Completions of like length share a chunk, which ends with the longest one; images do not come by rows.
        order = torch.arange(len(loss_mask)) if others else weighted_lengths(token_weights).argsort(descending=True)
        scoring_model = ScoringModel(self._score_pass, token_weights, order)
        forward(
            scoring_model,
            torch.cat([output["prompt_ids"], output["completion_ids"]], dim=1)[order],
            torch.cat([output["prompt_mask"], output["completion_mask"]], dim=1)[order],
            output["completion_ids"].size(1),
            batch_size=args.score_batch_size,
            **others,
        )
        return scoring_model.result(gather), token_weights, scoring_model.seconds

    def _token_weights(self, loss_mask: Tensor, ratio: Tensor | None = None) -> Tensor:
        args = self._args
        return loss_token_weights(args.loss_type, loss_mask, ratio, micro_batch_size=args.per_device_train_batch_size)
