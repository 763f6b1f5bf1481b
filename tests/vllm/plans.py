"""The runs that the tests look at, by launch: runs of one launch share its processes and its engine.

Server mode is missing: its weight sync is NCCL only, which needs GPUs.
"""

from typing import Any

# A rate at which three steps move the weights by far more than rounding does. Without the SNR multiplier it is certain to be used.
FAST = {"learning_rate": 0.05, "snr_min_multiplier": 1.0}
LORA = {"use_peft": True, "lora_r": 4, "lora_dropout": 0.0, "lora_target_modules": ["all-linear"]}

# Up to this many nats by which the sampler's log-probability of a token is off: sequence ratios from about 1/4 to 4.
SHIFT = {"shift": 0.5}
MODES = ("sequence_mask", "sequence_truncate", "token_mask", "token_truncate")
# The clip range is narrow enough to be reached by single tokens too.
CLIP = {"vllm_importance_sampling_clip_max": 1.5, "vllm_importance_sampling_clip_min": 0.7}

RATIO_RUNS: dict[str, dict[str, Any]] = {
    f"{scope}-{method}-{mode}": {
        "score_scope": scope,
        "score_method": method,
        "vllm_importance_sampling_mode": mode,
        "max_steps": 2,
        "faults": SHIFT,
    }
    | CLIP
    for scope, method, modes in (
        ("all", "exact", MODES),
        ("lm_head", "sketch", MODES),
        ("lm_head", "exact", ("token_truncate",)),
    )
    for mode in modes
}
# The loss differentiates one ratio per sequence, so that every token has the mean of its tokens' ratios.
RATIO_RUNS["all-exact-token_truncate-averaged"] = RATIO_RUNS["all-exact-token_truncate"] | {
    "importance_sampling_level": "sequence"
}

# From the second batch on two of four prompts are scored, and the output projection for all.
SAMPLE = {"score_min_prompts": 2, "vllm_importance_sampling_mode": "sequence_truncate", "max_steps": 2} | CLIP
SAMPLE |= {"faults": SHIFT | {"weights": "lm_head"}}

# Runs of three steps with the algorithm at its defaults, on an engine that is in order.
SYNCED_RUNS = ("full", "snr", "lora", "one_completion", "zero_3", "zero_3_lora")

LAUNCHES: dict[str, dict[str, Any]] = {
    "one_process": {
        "plan": {
            "full": FAST,
            "snr": {"learning_rate": 0.5, "snr_min_multiplier": 1e-6},
            "trust_region": {"lr_adaptation": "trust_region", "learning_rate": 0.05, "max_steps": 4},
            "lora": FAST | LORA,
            "one_completion": FAST | {"num_generations": 1},
            "stale": FAST | {"faults": {"sync": False}},
        },
    },
    "zero_3": {"plan": {"zero_3": FAST}, "num_processes": 2, "zero_3": True},
    "zero_3_lora": {"plan": {"zero_3_lora": FAST | LORA}, "num_processes": 2, "zero_3": True},
    "ratios": {"plan": RATIO_RUNS | {"sample": SAMPLE}},
}
