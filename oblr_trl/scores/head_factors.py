"""The output projection's score before all token weights are known: both factors, projected, one pair per token.

A sketch is linear in the token weights, but keeping one sketch per token would take T x k numbers; the factors take about
2 T sqrt(k), so weights can be applied after the pass (vLLM's importance ratio follows from the pass's own log-probabilities).

Shapes: B sequences, T positions, r and c projected rows and columns, k sketch length.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from oblr_trl.scores.projections import Projections


@dataclass
class HeadFactors:
    """
    Projected factors of the output projection's parameters.

    Args:
        projections ([`~scores.projections.Projections`]): The projections that were applied.
        factors (`dict[str, tuple[torch.Tensor, torch.Tensor]]`): By parameter: rows `(B, T, r)`, times the token weights
            that the pass knew, and columns `(B, T, c)`.
    """

    projections: Projections
    factors: dict[str, tuple[Tensor, Tensor]]

    def sketch(self, token_weights: Tensor) -> Tensor:
        """Sketches `(B, k)` under further token weights, of shape `(B, T)` or `(B, 1)`."""
        sketch = torch.zeros(
            token_weights.size(0),
            self.projections.sketch_dim,
            dtype=self.projections.dtype,
            device=token_weights.device,
        )
        for name, (rows, columns) in self.factors.items():
            weighted = rows * token_weights.to(rows.dtype).unsqueeze(-1)
            self.projections.add_matrix(sketch, name, torch.bmm(weighted.mT, columns))
        return sketch

    @staticmethod
    def cat(parts: list["HeadFactors"]) -> "HeadFactors":
        """The factors of several micro-batches, one after the other."""
        names = parts[0].factors
        factors = {
            name: (
                torch.cat([part.factors[name][0] for part in parts]),
                torch.cat([part.factors[name][1] for part in parts]),
            )
            for name in names
        }
        return HeadFactors(parts[0].projections, factors)
