r"""How far an update of the parameters moves every completion, \\( \langle s_i, \Delta\theta \rangle \\): the first-order change of its
log-probability.

An inner product of two sketches of all parameters has the variance \\( \|s_i\|^2 \|\Delta\theta\|^2 / k \\), which in a model of 10^8
parameters exceeds its square: an optimizer like Adam moves every entry, and only a small part of that along a score. Parameter by
parameter the same projections are far more precise, since products of different parameters are never formed: with L of about the same
norms by a factor of L. They cost nothing more, because the scoring pass projects parameter by parameter before it sums up.

The square of an inner product, which is what a KL is made of, still contains that variance. Each inner product is therefore estimated four
times, from both halves of the projections of the rows and of the columns: products of estimates that share no half do not ([`~trust_region.kl_of_update`]).
"""

from torch import Tensor

from oblr_trl.scores.projections import COLUMNS, ROWS, Projections

NUM_ESTIMATES = 4  # of rows and columns: (first, first), (first, second), (second, first), (second, second)


def inner_products(projections: Projections, name: str, projected: Tensor, update: Tensor) -> Tensor:
    """
    Inner products of every sequence's gradient by one use of a parameter with an update of that parameter.

    Args:
        projections ([`~scores.projections.Projections`]): Those of the scores.
        name (`str`): The parameter.
        projected (`torch.Tensor` of shape `(B, r, c)`): The gradient, projected.
        update (`torch.Tensor` of shape `(r * c,)`): The update, projected and flattened.

    Returns:
        `torch.Tensor` of shape `(B, 4)`, or `(B, 1)` where nothing is projected and all estimates are one.
    """
    if not projections.is_factored(name):
        return (projected.flatten(1) @ update).unsqueeze(1)
    products = projected * update.view(projected.shape[1:])
    return (projections.halves(name, ROWS).T @ products @ projections.halves(name, COLUMNS)).flatten(1)
