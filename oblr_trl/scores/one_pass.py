"""One micro-batch of the scoring pass: the hooks of its forward and backward, and the state that they share.

Shapes: B sequences, L = P + C tokens (prompt and completion), d hidden features, k sketch length.
"""

import warnings
from collections import Counter
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from oblr_trl.scores.accumulators import Accumulator
from oblr_trl.scores.factors import HeadRows, OuterProduct, PerSequenceGradient
from oblr_trl.scores.head import head_pass
from oblr_trl.scores.rules import find_score_rule
from oblr_trl.scores.scopes import ScopedParameters
from oblr_trl.scores.taps import frozen_parameters, tapped

if TYPE_CHECKING:
    from oblr_trl.scores.score_pass import ScorePass


@dataclass
class ScoreOutput:
    """
    What the pass knows about each sequence.

    Args:
        log_probs (`torch.Tensor` of shape `(B, C)`): Log-probability of every completion token; 0 where the token weight is.
        sketches (`torch.Tensor` of shape `(B, k)`, *optional*): Score sketches, if the method "sketch" was asked for.
        squared_norms (`torch.Tensor` of shape `(B,)`, *optional*): Exact squared score norms, for the method "exact".
    """

    log_probs: Tensor
    sketches: Tensor | None = None
    squared_norms: Tensor | None = None


class OnePass:
    """State of one call of [`ScorePass`]: what the hooks of forward and backward share."""

    def __init__(
        self,
        owner: "ScorePass",
        scoped: ScopedParameters,
        model_inputs: Mapping[str, Any],
        targets: Tensor,
        token_weights: Tensor,
    ) -> None:
        self.owner = owner
        self.scoped = scoped
        self.model_inputs = model_inputs
        self.targets = targets
        self.token_weights = token_weights
        self.needs_backward = owner.scope != "lm_head"
        self.active = scoped.first_block is None
        (self.head_parameter, *_) = scoped.head.parameters(recurse=False)
        self.head_was_empty = self.head_parameter.numel() == 0
        self.head_is_sharded = False
        self.uses: Counter[str] = Counter()
        self.head_products: dict[str, OuterProduct] = {}
        self.accumulators: list[Accumulator] = []
        self.hidden: Tensor | None = None
        self.grad_hidden: Tensor | None = None
        self.log_probs: Tensor | None = None
        # By which each sequence's seed is larger than asked for, of shape (B, 1).
        self.scale = torch.ones_like(token_weights[:, :1])

    def run(self) -> ScoreOutput:
        try:
            return self._run()
        finally:
            # The graph's taps refer to this object: as long as it referred to the graph, neither would ever be freed,
            # because Python's garbage collector does not see references that pass through autograd.
            self.hidden = self.grad_hidden = None

    def _run(self) -> ScoreOutput:
        batch_size = self.targets.size(0)
        anchor = torch.zeros((), device=self.targets.device, requires_grad=True)
        with ExitStack() as stack:
            stack.enter_context(torch.set_grad_enabled(self.needs_backward))
            stack.enter_context(frozen_parameters(self.owner.model))
            stack.callback(self.scoped.head.register_forward_pre_hook(self._before_head, prepend=True).remove)
            stack.callback(self.scoped.head.register_forward_pre_hook(self._on_head).remove)
            if self.scoped.first_block is not None:
                stack.callback(self.scoped.first_block.register_forward_pre_hook(self._on_first_block).remove)
            calls: Counter[nn.Module] = Counter()
            if self.needs_backward:
                tap = tapped(
                    self.scoped.names, anchor, self._on_layer, batch_size=batch_size, is_active=lambda: self.active
                )
                calls = stack.enter_context(tap)
            self.owner.model(**self.model_inputs, use_cache=False)
            assert self.hidden is not None, "the model did not call its output projection"
            if self.needs_backward:
                self._warn_of_uncalled(calls)
            self.uses = self.scoped.num_uses(calls)
            assert self.log_probs is not None
            # Autocast is for the model: the products of scores keep the precision that they come in.
            stack.enter_context(_no_autocast(self.hidden))
            with torch.no_grad():
                for name, product in self.head_products.items():
                    self._add(name, product)
            if self.needs_backward:
                self._backward(anchor)
            with torch.no_grad():
                results = dict(zip(self.owner.methods, (a.result() for a in self.accumulators), strict=True))
        sketches, squared_norms = results.get("sketch"), results.get("exact")
        return ScoreOutput(
            self.log_probs,
            None if sketches is None else sketches / self.scale,
            None if squared_norms is None else squared_norms / self.scale.squeeze(1).square(),
        )

    def _on_first_block(self, module: nn.Module, args: tuple) -> None:
        self.active = True

    def _before_head(self, module: nn.Module, args: tuple) -> tuple[Tensor]:
        """Cut the graph before any other hook of the head sees it: ZeRO-3 would wait in the backward pass for a head that
        is not part of it."""
        self.hidden = args[0]
        return (args[0].detach(),)

    def _on_head(self, module: nn.Module, args: tuple) -> tuple[Tensor]:
        """Compute the head where its weight is at hand on every backend: in its own forward call, after the hooks that
        gather it; the call is then left a single position to project."""
        assert isinstance(module, nn.Linear)
        assert self.hidden is not None
        # FSDP puts another tensor in the parameter's place, ZeRO-3 fills the empty one.
        self.head_is_sharded = module.weight is not self.head_parameter or self.head_was_empty
        hidden = self.hidden[:, -self.targets.size(1) - 1 : -1].detach()
        dtype = self.owner.head_dtype or _compute_dtype(module, hidden)
        with torch.no_grad(), _no_autocast(hidden):
            self._score_head(module, hidden.to(dtype))
        return (args[0][:, -1:],)

    def _score_head(self, head: nn.Linear, hidden: Tensor) -> None:
        self.accumulators = self.owner.accumulators(self.scoped, hidden.size(0), hidden)
        projections = self._head_projections(head, hidden)
        scored = self.token_weights != 0
        result = head_pass(
            hidden[scored],
            head.weight,
            head.bias,
            self.targets[scored],
            temperature=self.owner.temperature,
            projection=torch.cat(projections, dim=1) if projections else None,
            needs_grad_hidden=self.needs_backward,
        )

        def spread(values: Tensor, elsewhere: float = 0.0) -> Tensor:
            """From scored positions back to (B, C, ...)."""
            out = values.new_full((*scored.shape, *values.shape[1:]), elsewhere)
            out[scored] = values
            return out

        self.log_probs = spread(result.log_probs)
        token_weights = self.token_weights.to(result.log_probs.dtype)  # (B, C)
        if result.grad_hidden is not None:
            grad_hidden = spread(result.grad_hidden) * token_weights.unsqueeze(-1)
            self.scale = _inverse_power_of_two(grad_hidden)
            self.grad_hidden = grad_hidden * self.scale.unsqueeze(-1)
            token_weights = token_weights * self.scale
        weight = self._kept(head.weight)
        assert weight is not None
        rows = HeadRows(
            hidden=hidden,
            weight=weight,
            bias=self._kept(head.bias),
            targets=self.targets,
            coefficients=token_weights / self.owner.temperature,
            log_normalizer=spread(result.log_normalizer, torch.inf),
            other_probs=spread(result.other_probs),
            temperature=self.owner.temperature,
        )
        projected: dict[str, Tensor] = {}
        if result.projected_rows is not None:
            parts = spread(result.projected_rows) * token_weights.unsqueeze(-1)
            widths = [projection.size(1) for projection in projections]
            projected = dict(zip(self.scoped.head_names, parts.split(widths, -1), strict=True))
        columns = {"weight": hidden, "bias": torch.ones_like(hidden[..., :1])}
        for name, full_name in self.scoped.head_names.items():
            own = HeadRows(**{**vars(rows), "projected": projected.get(name)})
            self.head_products[full_name] = OuterProduct(own, columns[name])

    def _kept(self, gathered: Tensor | None) -> Tensor | None:
        """A parameter of the head for exact norms, which are taken after its forward call: by then ZeRO-3 and FSDP have taken
        back what they gathered."""
        if gathered is None or "exact" not in self.owner.methods or not self.head_is_sharded:
            return gathered
        return gathered.detach().clone()

    def _head_projections(self, head: nn.Linear, hidden: Tensor) -> list[Tensor]:
        """Row projections of the head's parameters in scope, in the order of their names; none where nothing is sketched."""
        if "sketch" not in self.owner.methods:
            return []
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        projections = self.owner.projections(self.scoped, dtype, hidden.device)
        return [projections.rows(name, head.weight.size(0)) for name in self.scoped.head_names.values()]

    def _on_layer(self, module: nn.Module, inputs: Tensor, grad_output: Tensor) -> None:
        rule = find_score_rule(module)
        assert rule is not None
        names = self.scoped.names[module]
        for name, gradient in rule(module, inputs, grad_output).items():
            if name in names:
                self._add(names[name], gradient)

    def _add(self, name: str, gradient: PerSequenceGradient) -> None:
        num_rows = self.scoped.shapes[name][0]
        for accumulator in self.accumulators:
            accumulator.add(name, gradient, num_rows, self.uses[name])

    def _backward(self, anchor: Tensor) -> None:
        assert self.hidden is not None
        assert self.grad_hidden is not None
        if not self.hidden.requires_grad:
            return  # every parameter of the scope sits in the output projection
        seed = torch.zeros_like(self.hidden)
        seed[:, -self.targets.size(1) - 1 : -1] = self.grad_hidden.to(seed.dtype)
        torch.autograd.grad(self.hidden, anchor, grad_outputs=seed)

    def _warn_of_uncalled(self, calls: Counter[nn.Module]) -> None:
        uncalled = [next(iter(names.values())) for module, names in self.scoped.names.items() if not calls[module]]
        if uncalled:
            warnings.warn(
                f"{len(uncalled)} layers with trainable parameters were not called in the scoring pass and count as zero "
                f"score: {', '.join(uncalled[:3])}{', ...' if len(uncalled) > 3 else ''}. Freeze them if they are unused."
            )


def _inverse_power_of_two(gradients: Tensor) -> Tensor:
    """What brings each sequence's largest entry to [1/2, 1), exactly: gradients of long completions, or of tokens with p near 1,
    are below what float16 resolves. Of shape `(B, 1)`, and at most 2^60, whose square is still finite."""
    _, exponents = torch.frexp(gradients.abs().amax(dim=(1, 2)))
    return torch.ldexp(torch.ones_like(gradients[:, :1, 0]), exponents.clamp(min=-60).neg().unsqueeze(1))


def _no_autocast(reference: Tensor):
    return torch.autocast(reference.device.type, enabled=False)


def _compute_dtype(head: nn.Linear, hidden: Tensor) -> torch.dtype:
    device_type = hidden.device.type
    if torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return torch.promote_types(head.weight.dtype, hidden.dtype)
