"""Scores a generation batch: every completion, or a sample of the prompts and the others by something cheaper."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from oblr_trl.baselines import GroupedBatch
from oblr_trl.baselines.weights_choice import ALL, EQUAL, LM_HEAD
from oblr_trl.scores.loss_weights import applied_importance_ratio, loss_token_weights
from oblr_trl.scores.prompt_sample import PromptSample, sample_prompts
from oblr_trl.scores.score_pass import ScoreOutput, ScorePass
from oblr_trl.scores.scoring_model import ScoringModel, weighted_lengths

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


class CompletionScorer:
    """
    Scores one generation batch: all completions in the parent's forward pass for the old log-probabilities, whose place a scoring pass
    then takes, or in a pass of its own. With a sample of the prompts `score_pass` scores only those, and `head_pass`, where it is given, the
    output projection for all.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]): The model whose log-probabilities the parent asks for.
        score_pass ([`~scores.score_pass.ScorePass`]): The scoring pass.
        args ([`OBLRPOConfig`]): Options of the run.
        accelerator ([`~accelerate.Accelerator`]): The processes.
        masks_later (`bool`): Whether the parent's forward pass comes before the loss mask is known.
        num_rows (`int`): Completions of the batch on every process, where not all may be scored.
        weights (`str`): What the weights of the batch shall be, one of [`~baselines.weights_choice.WEIGHTS`].
        head_pass ([`~scores.score_pass.ScorePass`], *optional*): A pass of the scope `"lm_head"`, for weights of that name.

    Attributes:
        seconds (`float`): What the passes took on this process.
    """

    def __init__(
        self,
        model: Any,
        score_pass: ScorePass,
        args: Any,
        accelerator: Any,
        *,
        masks_later: bool,
        num_rows: int = 0,
        weights: str = ALL,
        head_pass: ScorePass | None = None,
    ) -> None:
        self.seconds = 0.0
        self._model = model
        self._score_pass = score_pass
        self._args = args
        self._accelerator = accelerator
        self._sample: PromptSample | None = None
        if weights != ALL:
            self._sample = sample_prompts(
                num_rows * accelerator.num_processes // args.num_generations,
                args.num_generations,
                at_least=args.score_min_prompts,
                process_index=accelerator.process_index,
                num_processes=accelerator.num_processes,
            )
        passes = {EQUAL: None, LM_HEAD: head_pass, ALL: score_pass}
        self._pass_of_all = passes[ALL if self._sample is None else weights]
        self._reuses_forward = args.reuses_old_logps_forward and not masks_later
        self._scoring_model: ScoringModel | None = None

    def in_place_of(self, model: Any, loss_mask: Tensor) -> Any:
        """The pass over all completions in the shape of a model, once, where it is due, else `model`."""
        due = self._reuses_forward and self._scoring_model is None
        if model is not self._model or not due or self._pass_of_all is None:
            return model
        self._scoring_model = ScoringModel(self._pass_of_all, self._token_weights(loss_mask))
        return self._scoring_model

    def score(
        self, batch: GroupedBatch, output: dict[str, Any], loss_mask: Tensor, forward: Callable[..., Any]
    ) -> tuple[GroupedBatch, Tensor]:
        """
        Score the batch whose rewards and lengths are known, and give it weights.

        Args:
            batch ([`~baselines.GroupedBatch`]): The batch, of which `weights` is set.
            output (`dict`): What the parent returned for this process's rows.
            loss_mask (`torch.Tensor` of shape `(B, C)`): Which of their tokens are in the loss.
            forward (`Callable`): The parent's method for log-probabilities, which takes the rows in chunks of `score_batch_size`.

        Returns:
            The scored prompts, with all that scores say of them and their squared norms for weights, and their indices; with no sample
            that is `batch` itself.
        """
        ratio = output.get("importance_sampling_ratio")
        if ratio is not None:
            loss_type, level = self._args.loss_type, self._args.importance_sampling_level
            ratio = applied_importance_ratio(ratio, loss_mask, loss_type=loss_type, importance_sampling_level=level)
        token_weights = self._token_weights(loss_mask, ratio)
        of_all: ScoreOutput | None = None
        if self._scoring_model is not None:
            assert "old_per_token_logps" in output, "the scoring pass took the place of another forward pass"
            of_all = self._scoring_model.result(self._accelerator.gather, ratio)
            self.seconds += self._scoring_model.seconds
        elif self._pass_of_all is not None:
            of_all = self._own_pass(self._pass_of_all, torch.arange(len(loss_mask)), output, token_weights, forward)

        scored, scores, rows = batch, of_all, torch.arange(batch.rewards.numel())
        prompts = torch.arange(len(batch.rewards), device=batch.rewards.device)
        if (sample := self._sample) is not None:
            batch.weights = (
                torch.ones_like(batch.rewards) if of_all is None else _squares(of_all).view_as(batch.rewards)
            )
            scores = self._own_pass(self._score_pass, sample.rows, output, token_weights, forward)
            prompts, rows = sample.groups.to(prompts.device), sample.gathered
            keys = None if batch.prompt_keys is None else batch.prompt_keys[prompts]
            scored = GroupedBatch(batch.rewards[prompts], batch.lengths[prompts], prompt_keys=keys)
        assert scores is not None

        def by_prompt(values: Tensor | None) -> Any:
            return None if values is None else values[rows].view(*scored.rewards.shape, *values.shape[1:])

        scored.sketches = by_prompt(scores.sketches)
        scored.products = by_prompt(scores.products)
        scored.weights = by_prompt(_squares(scores))
        scored.head_weights = by_prompt(scores.head_squared_norms)
        scored.log_probs = by_prompt(self._accelerator.gather(scores.log_probs.sum(dim=1)))
        scored.token_weights = (
            self._accelerator.gather(token_weights.sum(dim=1)).view_as(batch.rewards)[prompts] / scored.lengths
        )
        return scored, prompts

    def _own_pass(
        self, score_pass: ScorePass, rows: Tensor, output: dict[str, Any], token_weights: Tensor, forward: Callable
    ) -> ScoreOutput:
        """A pass over some of this process's rows, with those of the other processes."""
        others = {key: output[key] for key in FORWARD_KEYS if key in output}
        # Completions of like length share a chunk, which ends with the longest one; images do not come by rows.
        if not others:
            rows = rows[weighted_lengths(token_weights)[rows].argsort(descending=True).cpu()]
        scoring_model = ScoringModel(score_pass, token_weights, rows)
        forward(
            scoring_model,
            torch.cat([output["prompt_ids"], output["completion_ids"]], dim=1)[rows],
            torch.cat([output["prompt_mask"], output["completion_mask"]], dim=1)[rows],
            output["completion_ids"].size(1),
            batch_size=self._args.score_batch_size,
            **others,
        )
        self.seconds += scoring_model.seconds
        return scoring_model.result(self._accelerator.gather)

    def _token_weights(self, loss_mask: Tensor, ratio: Tensor | None = None) -> Tensor:
        args = self._args
        return loss_token_weights(args.loss_type, loss_mask, ratio, micro_batch_size=args.per_device_train_batch_size)


def _squares(scores: ScoreOutput) -> Tensor:
    """Squared norms, exact ones where they were asked for."""
    if scores.squared_norms is not None:
        return scores.squared_norms
    assert scores.sketches is not None  # the first of the methods
    return scores.sketches.square().sum(dim=1)
