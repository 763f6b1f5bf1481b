r"""How far an update of the parameters moves every completion, \\( \langle s_i, \Delta\theta \rangle \\): the first-order change of its
log-probability.

An inner product of two sketches of all parameters has the variance \\( \|s_i\|^2 \|\Delta\theta\|^2 / k \\), which in a model of 10^8
parameters exceeds its square: an optimizer like Adam moves every entry, and only a small part of that along a score. Parameter by
parameter the same projections are far more precise, since products of different parameters are never formed: with L of about the same
norms by a factor of L. They cost nothing more, because the scoring pass projects parameter by parameter before it sums up.

The square of an inner product, which is what a KL is made of, still contains that variance. Each inner product is therefore estimated four
times, from both halves of the projections of the rows and of the columns: products of estimates that share no half do not ([`~trust_region.kl_of_update`]).
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from oblr_trl.scores.projections import COLUMNS, ROWS, Projections

NUM_ESTIMATES = 4  # of rows and columns: (first, first), (first, second), (second, first), (second, second)


class UpdateProducts:
    """
    Sums, for the sequences of a micro-batch, the inner products of their scores with an update over all parameters.

    Args:
        batch_size (`int`): B.
        projections ([`~scores.projections.Projections`]): Those of the scores.
        update (`torch.Tensor` of shape `(n,)`): Difference of two sketches of [`~scores.parameters.local_parameter_sketch`].
    """

    def __init__(self, batch_size: int, projections: Projections, update: Tensor) -> None:
        self._projections = projections
        self._update: Mapping[str, Tensor] = projections.split_by_parameter(update.to(projections.dtype))
        self._total = torch.zeros(batch_size, NUM_ESTIMATES, dtype=projections.dtype, device=projections.device)

    def add(self, name: str, projected: Tensor) -> None:
        """Add the projected gradient `(B, r, c)` of one use of a parameter."""
        drawn, update = self._projections, self._update[name]
        if not drawn.is_factored(name):
            self._total += (projected.flatten(1) @ update).unsqueeze(1)
            return
        products = projected * update.view(projected.shape[1:])
        self._total += (drawn.halves(name, ROWS).T @ products @ drawn.halves(name, COLUMNS)).flatten(1)

    def result(self) -> Tensor:
        """The estimates, of shape `(B, 4)`."""
        return self._total
