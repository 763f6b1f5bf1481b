"""What is subtracted from a reward before it weighs a policy score: formulas, priors, and the choice of their strength."""

from oblr_trl.baselines.estimator import BaselineEstimator, GroupedBatch
from oblr_trl.baselines.formulas import (
    BASELINES,
    gradient_variance,
    gradient_weighted_baseline,
    group_mean_baseline,
    leave_one_out_baseline,
    length_weighted_baseline,
)
from oblr_trl.baselines.prior_strength import PRIOR_STRENGTH_GRID, AutomaticPriorStrength
from oblr_trl.baselines.rewards import normalized_rewards, summed_rewards

__all__ = [
    "BASELINES",
    "PRIOR_STRENGTH_GRID",
    "AutomaticPriorStrength",
    "BaselineEstimator",
    "GroupedBatch",
    "gradient_variance",
    "gradient_weighted_baseline",
    "group_mean_baseline",
    "leave_one_out_baseline",
    "length_weighted_baseline",
    "normalized_rewards",
    "summed_rewards",
]
