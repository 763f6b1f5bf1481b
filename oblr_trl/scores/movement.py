r"""How far an update of the parameters moves every completion, \\( \langle s_i, \Delta\theta \rangle \\): the first-order change of its
log-probability.

An inner product of two sketches of all parameters has the variance \\( \|s_i\|^2 \|\Delta\theta\|^2 / k \\), which in a model of 10^8
parameters exceeds its square: an optimizer like Adam moves every entry, and only a small part of that along a score. Parameter by
parameter the same projections are far more precise, since products of different parameters are never formed: with L of about the same
norms by a factor of L. They cost nothing more, because the scoring pass projects parameter by parameter before it sums up.

The square of an inner product, which is what a KL is made of, still contains that variance. Each inner product is therefore estimated four
times, from both halves of the projections of the rows and of the columns: products of estimates that share no half do not ([`~trust_region.kl_of_update`]).
"""

import torch
from torch import Tensor

from oblr_trl.scores.projections import COLUMNS, ROWS, Projections

NUM_ESTIMATES = 4  # of rows and columns: (first, first), (first, second), (second, first), (second, second)


class InnerProducts:
    """
    Sums the inner products of every sequence's gradients with an update, over the uses of all parameters. Halves are taken of sums over
    parameters of like projections, once: a GPU is kept waiting by many small operations.

    Args:
        batch_size (`int`): Number B of sequences.
        projections ([`~scores.projections.Projections`]): Those of the scores.
        update (`torch.Tensor` of shape `(n,)`): Difference of two sketches of [`~scores.parameters.local_parameter_sketch`].
    """

    def __init__(self, batch_size: int, projections: Projections, update: Tensor) -> None:
        self._projections = projections
        self._update = projections.split_by_parameter(update.to(projections.dtype))
        self._of_entries = torch.zeros(batch_size, dtype=projections.dtype, device=projections.device)
        # By the halves of rows and columns: products entry by entry, of shape (B, r, c).
        self._products: dict[tuple[Tensor, Tensor], Tensor] = {}

    def add(self, name: str, projected: Tensor) -> None:
        """Add one use of a parameter, whose gradient `(B, r, c)` is projected."""
        drawn, update = self._projections, self._update[name]
        if not drawn.is_factored(name):  # nothing is projected: all estimates are one
            self._of_entries.addmv_(projected.flatten(1), update)
            return
        halves = drawn.halves(name, ROWS), drawn.halves(name, COLUMNS)  # the same objects for like projections
        if halves not in self._products:
            self._products[halves] = torch.zeros_like(projected)
        self._products[halves].addcmul_(projected, update.view(projected.shape[1:]))

    def result(self) -> Tensor:
        """The estimates, of shape `(B, 4)`."""
        estimates = self._of_entries.unsqueeze(1).expand(-1, NUM_ESTIMATES)
        for (rows, columns), products in self._products.items():
            estimates = estimates + (rows.T @ products @ columns).flatten(1)
        return estimates
