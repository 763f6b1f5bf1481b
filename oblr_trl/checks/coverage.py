"""What the scores of a model leave out, and what follows for the learning rate."""

from collections import Counter
from typing import Any

from oblr_trl.scores.scopes import ScopedParameters

# Where the rest moves completions as far per entry as the scored parameters do, and in the same direction, the KL of all is
# 1 / 0.9^2 = 1.23 times the measured one: less than delta itself is known to.
MIN_TRUST_REGION_COVERAGE = 0.9


def settle_coverage(scoped: ScopedParameters, args: Any) -> str | None:
    """
    The line that says what is left out of the scores, `None` if nothing is. Where it is too much for a trust region, `args`, an
    [`OBLRPOConfig`], defaults to `lr_adaptation="snr"`.

    Raises:
        `ValueError`: If the scores cover too little for a trust region that was asked for.
    """
    if not scoped.left_out:
        return None
    layers = Counter(layer for _, layer in scoped.left_out.values())
    share = f"{100 * scoped.coverage:.4g} % of the {scoped.num_trainable:,} trainable entries"
    line = (
        f"The scores cover {share}. Left out of the baseline's weights and of the SNR, and trained like the others: parameters of "
        f"{', '.join(f'{layer} ({count})' for layer, count in layers.most_common())}."
    )
    if not scoped.coverage:
        line += " The gradient of the output projection stands in for theirs."
    if args.lr_adaptation != "trust_region" or scoped.coverage >= MIN_TRUST_REGION_COVERAGE:
        return line
    if not args.default_to("snr"):
        raise ValueError(
            f"OBLR-PO cannot honour lr_adaptation='trust_region': the scores cover {share}, first left out is "
            f"`{next(iter(scoped.left_out))}`, so that most of a step's movement would not be measured. Remedy: use "
            "lr_adaptation='snr' (or leave it unset) or 'none', or train other parameters."
        )
    return (
        f"{line} A trust region would not see how far they move the policy, so lr_adaptation is 'snr': the schedule, from "
        f"learning_rate={args.learning_rate:g}, is multiplied by rho."
    )
