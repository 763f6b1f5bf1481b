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
from oblr_trl.baselines.prior_strength import MEMORY_STRENGTH_GRID, PRIOR_STRENGTH_GRID, AutomaticPriorStrength
from oblr_trl.baselines.prompt_memory import PromptMemory, prompt_key
from oblr_trl.baselines.reward_scale import SCALE_EPSILON, leave_one_out_deviation, scaled_advantages
from oblr_trl.baselines.rewards import normalized_rewards, summed_rewards
from oblr_trl.baselines.weights_choice import WeightsChoice

__all__ = [
    "BASELINES",
    "MEMORY_STRENGTH_GRID",
    "PRIOR_STRENGTH_GRID",
    "SCALE_EPSILON",
    "AutomaticPriorStrength",
    "BaselineEstimator",
    "GroupedBatch",
    "PromptMemory",
    "WeightsChoice",
    "gradient_variance",
    "gradient_weighted_baseline",
    "group_mean_baseline",
    "leave_one_out_baseline",
    "leave_one_out_deviation",
    "length_weighted_baseline",
    "normalized_rewards",
    "prompt_key",
    "scaled_advantages",
    "summed_rewards",
]
