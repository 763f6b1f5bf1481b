"""The scoring pass: one forward and one activation-only backward that reduces every sequence's score to a short vector.

Differs from a training step in that no parameter gradient is formed: parameters are frozen, the backward pass is driven by
`torch.autograd.grad` towards a scalar anchor, and identity taps read each layer's input and output gradient on the way. The
output projection is not differentiated by autograd at all: [`~scores.head.head_pass`] computes its log-probabilities, its
sketch and the gradient of the hidden states in one sweep over the vocabulary.

Shapes: B sequences, L = P + C tokens (prompt and completion), d hidden features, k sketch length.
"""

from collections.abc import Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from oblr_trl.scores.accumulators import Accumulator, ExactNormAccumulator, SketchAccumulator
from oblr_trl.scores.checkpointing import non_reentrant_checkpointing
from oblr_trl.scores.one_pass import OnePass, ScoreOutput
from oblr_trl.scores.projections import Projections
from oblr_trl.scores.scopes import ScopedParameters, resolve_scope

ScoreMethod = Literal["sketch", "exact"]
METHODS: tuple[str, ...] = get_args(ScoreMethod)


class ScorePass:
    r"""
    Computes the scores \\( s_i = \nabla_\theta \sum_t c_{i,t} \log \pi(o_{i,t}) \\) of a batch, sketched or as exact norms.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Causal language model, not wrapped by DDP or an engine. Its parameters may be partitioned by ZeRO-3.
        scope (`str`, *optional*, defaults to `"all"`):
            `"all"`, `"last_k"` or `"lm_head"`.
        last_k (`int`, *optional*):
            Number of blocks of the scope `"last_k"`.
        methods (`tuple[str, ...]`, *optional*, defaults to `("sketch",)`):
            Any of `"sketch"` and `"exact"`.
        sketch_dim (`int`, *optional*, defaults to `4096`):
            Length k of a sketch.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the projections; must be the same on all processes.
        temperature (`float`, *optional*, defaults to `1.0`):
            Temperature of the policy.
        head_dtype (`torch.dtype`, *optional*):
            Dtype of the output projection. If not given, autocast's where autocast is on, else the model's.
        gradient_checkpointing (`bool`, *optional*):
            Whether the pass checkpoints the model's blocks. As the model is set if not given.

    Raises:
        `ValueError`: For an unknown method, a `sketch_dim` below 1, or a `temperature` that is not positive.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        scope: str = "all",
        last_k: int | None = None,
        methods: tuple[str, ...] = ("sketch",),
        sketch_dim: int = 4096,
        seed: int = 0,
        temperature: float = 1.0,
        head_dtype: torch.dtype | None = None,
        gradient_checkpointing: bool | None = None,
    ) -> None:
        for method in methods:
            if method not in METHODS:
                raise ValueError(f"`method` must be one of {list(METHODS)}, got {method!r}.")
        if sketch_dim < 1:
            raise ValueError(f"`sketch_dim` must be at least 1, got {sketch_dim}.")
        if not temperature > 0:
            raise ValueError(f"`temperature` must be positive, got {temperature}.")
        self.model = model
        self.scope = scope
        self.last_k = last_k
        self.methods = methods
        self.sketch_dim = sketch_dim
        self.seed = seed
        self.temperature = temperature
        self.head_dtype = head_dtype
        self.gradient_checkpointing = gradient_checkpointing
        self._projections: Projections | None = None
        self._projected_shapes: dict[str, tuple[int, ...]] = {}

    def __call__(self, model_inputs: Mapping[str, Any], targets: Tensor, token_weights: Tensor) -> ScoreOutput:
        """
        Run the pass on one micro-batch.

        Args:
            model_inputs (`Mapping[str, Any]`):
                Keyword arguments of the model's forward: `input_ids` (B, L), `attention_mask` and the like.
            targets (`torch.Tensor` of shape `(B, C)`):
                Completion tokens, the last C columns of `input_ids`.
            token_weights (`torch.Tensor` of shape `(B, C)`):
                Seed of every token's log-probability; 0 keeps a token out of the score.

        Returns:
            [`ScoreOutput`].

        Raises:
            `ValueError`: If the scope cannot be resolved.
        """
        scoped = resolve_scope(self.model, self.scope, self.last_k)
        with non_reentrant_checkpointing(self.model, enabled=self.gradient_checkpointing):
            return OnePass(self, scoped, model_inputs, targets, token_weights).run()

    def accumulators(self, scoped: ScopedParameters, batch_size: int, reference: Tensor) -> list[Accumulator]:
        """Fresh accumulators for one micro-batch, in the order of `methods`; `reference` gives dtype and device."""
        dtype = torch.promote_types(reference.dtype, torch.float32)
        built: list[Accumulator] = []
        for method in self.methods:
            if method == "exact":
                built.append(ExactNormAccumulator(batch_size, dtype, reference.device))
            else:
                built.append(SketchAccumulator(batch_size, self.projections(scoped, dtype, reference.device)))
        return built

    def projections(self, scoped: ScopedParameters, dtype: torch.dtype, device: torch.device) -> Projections:
        """The projections of the scope's parameters, drawn once and kept while the parameters stay the same."""
        if self._projections is None or self._projected_shapes != scoped.shapes:
            self._projected_shapes = dict(scoped.shapes)
            self._projections = Projections(
                scoped.shapes,
                tables=scoped.tables,
                sketch_dim=self.sketch_dim,
                seed=self.seed,
                dtype=dtype,
                device=device,
            )
        return self._projections
