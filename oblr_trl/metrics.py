"""Names under which the trainers log: every reader and writer takes them from here."""

# Of TRL and transformers.
REWARD = "reward"
EVAL_ACCURACY = "eval_accuracy"
EVAL_REWARD = "eval_reward"
EVALUATIONS = (EVAL_ACCURACY, EVAL_REWARD)
LEARNING_RATE = "learning_rate"  # with the multiplier in it
TRAIN_RUNTIME = "train_runtime"
TRAIN_STEPS_PER_SECOND = "train_steps_per_second"

# Of OBLRPOTrainer.
BASELINE_MEAN = "baseline/mean"
BASELINE_SHIFT = "baseline/shift"
PRIOR_STRENGTH = "baseline/prior_strength"
EFFECTIVE_GROUP_SIZE = "baseline/effective_group_size"
SCORE_NORM_MEAN = "score/norm/mean"
SCORE_NORM_MAX = "score/norm/max"
PASS_TIME = "score/pass_time"
SIGNAL = "gradient_snr/signal"
NOISE = "gradient_snr/noise"
RHO = "gradient_snr/rho"
NUM_PROMPTS = "gradient_snr/num_prompts"
LR_MULTIPLIER = "lr_multiplier"
VARIANCE_VS_GROUP_MEAN = "variance_ratio/group_mean"
VARIANCE_VS_LEAVE_ONE_OUT = "variance_ratio/leave_one_out"
VARIANCE_VS_LENGTH_WEIGHTED = "variance_ratio/length_weighted"

METRICS = (
    BASELINE_MEAN,
    BASELINE_SHIFT,
    PRIOR_STRENGTH,
    EFFECTIVE_GROUP_SIZE,
    SCORE_NORM_MEAN,
    SCORE_NORM_MAX,
    PASS_TIME,
    SIGNAL,
    NOISE,
    RHO,
    NUM_PROMPTS,
    LR_MULTIPLIER,
    VARIANCE_VS_GROUP_MEAN,
    VARIANCE_VS_LEAVE_ONE_OUT,
    VARIANCE_VS_LENGTH_WEIGHTED,
)
