"""The scoring pass: one forward and one activation-only backward that reduces every sequence's score to a short vector.

Differs from a training step in that no parameter gradient is formed: parameters are frozen, the backward pass is driven by
`torch.autograd.grad` towards a scalar anchor, and identity taps read each layer's input and output gradient on the way. The
output projection is not differentiated by autograd at all: [`~scores.head.score_head`] computes its log-probabilities, its
sketch and the gradient of the hidden states in one sweep over the vocabulary.

Shapes: B sequences, L = P + C tokens (prompt and completion), d hidden features, k sketch length.
"""

import warnings
from collections import Counter
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import KW_ONLY, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from oblr_trl.scores.accumulator import SketchAccumulator
from oblr_trl.scores.calls import LayerCall, Layout
from oblr_trl.scores.exact_norms import ExactNormAccumulator
from oblr_trl.scores.factors import PerSequenceGradient
from oblr_trl.scores.head import HeadScores, score_head
from oblr_trl.scores.projections import ROWS, Projections
from oblr_trl.scores.rules import CallRule, ScoreRule, apply_rule
from oblr_trl.scores.scopes import ScopedParameters, resolve_scope
from oblr_trl.scores.taps import (
    frozen_parameters,
    intercepted_head,
    non_reentrant_checkpointing,
    suspended_backward_hooks,
    tapped,
)

METHODS = ("sketch", "exact")


@dataclass
class ScoreOutput:
    """What the pass knows about each sequence."""

    log_probs: Tensor  # (B, C), of every completion token; 0 where the token weight is
    sketches: Tensor | None = None  # (B, k), for the method "sketch"
    squared_norms: Tensor | None = None  # (B,), exact, for the method "exact"
    head_squared_norms: Tensor | None = None  # (B,), of the output projection alone, where it is scored with others
    products: Tensor | None = None  # (B, 4), with an update (see `scores.movement`)


@dataclass(eq=False)
class ScorePass:
    r"""
    Computes the scores \\( s_i = \nabla_\theta \sum_t c_{i,t} \log \pi(o_{i,t}) \\) of a batch, sketched or as exact norms.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Causal language model, not wrapped by DDP or an engine. Its parameters may be partitioned by ZeRO-3.
        scope (`str`, *optional*, defaults to `"all"`): `"auto"`, `"all"`, `"last_k"` or `"lm_head"`.
        last_k (`int`, *optional*): Number of blocks of the scope `"last_k"`.
        methods (`tuple[str, ...]`, *optional*, defaults to `("sketch",)`): Any of `"sketch"` and `"exact"`.
        sketch_dim (`int`, *optional*, defaults to `4096`): Length k of a sketch.
        seed (`int`, *optional*, defaults to `0`): Seed of the projections; must be the same on all processes.
        temperature (`float`, *optional*, defaults to `1.0`): Temperature of the policy.
        head_dtype (`torch.dtype`, *optional*):
            Dtype of the output projection. If not given, autocast's where autocast is on, else the model's.
        gradient_checkpointing (`bool`, *optional*):
            Whether the pass checkpoints the model's blocks. As the model is set if not given.

    Attributes:
        update (`torch.Tensor` of shape `(n,)`, *optional*):
            Sketch of an update of the parameters, whose inner products with the scores the next passes shall return too.

    Raises:
        `ValueError`: For an unknown method.
    """

    model: nn.Module
    _: KW_ONLY
    scope: str = "all"
    last_k: int | None = None
    methods: tuple[str, ...] = ("sketch",)
    sketch_dim: int = 4096
    seed: int = 0
    temperature: float = 1.0
    head_dtype: torch.dtype | None = None
    gradient_checkpointing: bool | None = None
    update: Tensor | None = field(default=None, init=False, repr=False)
    _projections: Projections | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        for method in self.methods:
            if method not in METHODS:
                raise ValueError(f"`method` must be one of {list(METHODS)}, got {method!r}.")

    def __call__(
        self,
        model_inputs: Mapping[str, Any],
        targets: Tensor,
        token_weights: Tensor,
        scoped: ScopedParameters | None = None,
    ) -> ScoreOutput:
        """
        Run the pass on one micro-batch.

        `model_inputs` are keyword arguments of the model's forward: `input_ids` (B, L), `attention_mask` and the like; `targets`
        (B, C) its last C columns, the completions; `token_weights` (B, C) the seed of every token's log-probability, of which 0
        keeps a token out of the score; `scoped` the result of `scoped_parameters`, where it has been asked for already.
        """
        return _MicroBatch(self, targets, token_weights, scoped or self.scoped_parameters()).run(model_inputs)

    def scoped_parameters(self) -> ScopedParameters:
        """The parameters of the scope, of which some may have been frozen or unfrozen since."""
        return resolve_scope(self.model, self.scope, self.last_k)

    def projections(self, scoped: ScopedParameters, device: torch.device) -> Projections:
        """The projections of the scope's parameters, drawn once and kept while the parameters stay the same."""
        drawn, device = self._projections, torch.empty(0, device=device).device  # with its index
        if drawn is None or drawn.shapes != scoped.shapes or drawn.device != device:
            drawn = self._projections = Projections(
                scoped.shapes,
                tables=scoped.tables,
                sketch_dim=self.sketch_dim,
                seed=self.seed,
                dtype=scoped.dtype,
                device=device,
            )
        return drawn


class _MicroBatch:
    """
    One call of [`ScorePass`]: what the hooks of its forward and backward share.

    The graph's taps refer to this object, so it refers to nothing of the graph: neither would ever be freed, because Python's
    garbage collector does not see references that pass through autograd.
    """

    def __init__(self, settings: ScorePass, targets: Tensor, token_weights: Tensor, scoped: ScopedParameters) -> None:
        self._settings = settings
        self._scoped = scoped
        self._targets = targets
        self._token_weights = token_weights
        self._begun = self._scoped.first_block is None
        self._sketches: SketchAccumulator | None = None
        self._norms: ExactNormAccumulator | None = None
        self._projections: Projections | None = None
        if "sketch" in settings.methods:
            self._projections = settings.projections(self._scoped, targets.device)

    def run(self, model_inputs: Mapping[str, Any]) -> ScoreOutput:
        """The forward pass, the backward pass where anything below the head is in scope, and what they gave."""
        settings, scoped, (batch_size, num_tokens) = self._settings, self._scoped, self._targets.shape
        anchor = torch.zeros((), device=self._targets.device, requires_grad=True)
        with ExitStack() as stack:
            stack.enter_context(torch.set_grad_enabled(bool(scoped.names)))
            stack.enter_context(frozen_parameters(settings.model))
            stack.enter_context(suspended_backward_hooks(settings.model))
            stack.enter_context(non_reentrant_checkpointing(settings.model, enabled=settings.gradient_checkpointing))
            head_calls = stack.enter_context(intercepted_head(scoped.head, self._score_head))
            if scoped.first_block is not None:
                stack.callback(scoped.first_block.register_forward_pre_hook(self._on_first_block).remove)
            taps = tapped(
                scoped.names,
                anchor,
                self._on_layer,
                layout=Layout(batch_size, model_inputs["input_ids"].size(1)),
                is_active=lambda: self._begun,
                on_unknown_layout=self._on_unknown_layout,
            )
            calls = stack.enter_context(taps)
            settings.model(**model_inputs, use_cache=False)
            self._warn_of_uncalled(calls)
            assert len(head_calls) == 1, "the model did not call its output projection once"
            hidden, head = head_calls[0]

            if self._projections is not None:
                self._sketches = SketchAccumulator(batch_size, self._projections, settings.update)
            if "exact" in settings.methods:
                norms = torch.zeros(batch_size, dtype=scoped.dtype, device=self._targets.device)
                self._norms = ExactNormAccumulator(norms, shared=scoped.shared(calls))
            # Autocast is for the model: the products of scores keep the precision that they come in.
            stack.enter_context(torch.autocast(hidden.device.type, enabled=False))
            with torch.no_grad():
                sketches = [self._add(scoped.head_names[name], product) for name, product in head.products.items()]
                of_head = [sketch for sketch in sketches if sketch is not None]
            # Without a graph every parameter of the scope sits in the output projection.
            if head.grad_hidden is not None and hidden.requires_grad:
                seed = torch.zeros_like(hidden)
                seed[:, -num_tokens - 1 : -1] = head.grad_hidden.to(seed.dtype)
                torch.autograd.grad(hidden, anchor, grad_outputs=seed, allow_unused=True)
            output = ScoreOutput(head.log_probs)
            with torch.no_grad():
                if self._sketches is not None:
                    output.sketches = self._sketches.result() / head.scale
                    if of_head and scoped.names:  # or it is all that is scored, and no cheaper
                        squares = torch.cat([sketch.flatten(1) for sketch in of_head], dim=1).square().sum(dim=1)
                        output.head_squared_norms = squares / head.scale.squeeze(1).square()
                    if (products := self._sketches.products()) is not None:
                        output.products = products / head.scale
                if self._norms is not None:
                    output.squared_norms = self._norms.result() / head.scale.squeeze(1).square()
        return output

    def _score_head(self, head: nn.Linear, hidden: Tensor) -> HeadScores:
        hidden = hidden[:, -self._targets.size(1) - 1 : -1]
        dtype = self._settings.head_dtype or _compute_dtype(head, hidden)
        drawn, names, transform = self._projections, self._scoped.head_names, self._scoped.logit_transform
        with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
            return score_head(
                head,
                hidden.to(dtype),
                self._targets,
                self._token_weights,
                names,
                {} if drawn is None else {name: drawn.projection(ours, ROWS) for name, ours in names.items()},
                # Both in the unit of the projection's own output.
                temperature=self._settings.temperature / transform.scale,
                softcap=transform.softcap / transform.scale,
                needs_grad_hidden=bool(self._scoped.names),
                copy_parameters="exact" in self._settings.methods,
            )

    def _on_first_block(self, module: nn.Module, args: tuple) -> None:
        self._begun = True

    def _on_layer(
        self, module: nn.Module, rule: ScoreRule | CallRule, call: LayerCall, grad_outputs: tuple[Tensor | None, ...]
    ) -> None:
        names = self._scoped.names[module]
        for name, gradient in apply_rule(rule, module, call, grad_outputs).items():
            if name in names:
                self._add(names[name], gradient)

    def _on_unknown_layout(self, module: nn.Module, tensor: Tensor) -> None:
        name = next(iter(self._scoped.names[module].values()))
        message = (
            f"The {type(module).__name__} of `{name}` was called with tensors that do not keep the sequences of the batch apart, and "
            "neither can its gradient"
        )
        if self._settings.scope != "auto":
            raise ValueError(
                f"{message} (shape {tuple(tensor.shape)}, {self._targets.size(0)} sequences). Freeze it, or use `scope='auto'`, "
                "which leaves such calls out, or `scope='lm_head'`."
            )
        # The same text for all batches, so that it is said once.
        warnings.warn(f"{message}: such calls are left out of the scores.")

    def _add(self, name: str, gradient: PerSequenceGradient) -> Tensor | None:
        """Take in the gradient of one use of a parameter, and return its sketch, of shape `(B, r, c)`."""
        if self._norms is not None:
            self._norms.add(name, gradient)
        return None if self._sketches is None else self._sketches.add(name, gradient)

    def _warn_of_uncalled(self, calls: Counter[nn.Module]) -> None:
        uncalled = [next(iter(names.values())) for module, names in self._scoped.names.items() if not calls[module]]
        if uncalled:
            warnings.warn(
                f"{len(uncalled)} layers with trainable parameters, the first with `{uncalled[0]}`, were not called in the scoring "
                "pass (unused, or run by a fused kernel) and count as zero score. Freeze them if they are unused."
            )


def _compute_dtype(head: nn.Linear, hidden: Tensor) -> torch.dtype:
    device_type = hidden.device.type
    if torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return torch.promote_types(head.weight.dtype, hidden.dtype)
