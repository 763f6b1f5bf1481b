"""What OBLR-PO cannot honour, and what it honours with a qualification, as tables. `args` is an [`OBLRPOConfig`] throughout."""

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

from transformers.training_args import OptimizerNames

from oblr_trl.baselines import BASELINES
from oblr_trl.checks.adaptation import adapts, do_not_adapt, refusal_of
from oblr_trl.scores.loss_weights import LINEAR_LOSS_TYPES
from oblr_trl.scores.scopes import SCOPES
from oblr_trl.scores.score_pass import METHODS

LR_ADAPTATIONS = ("trust_region", "snr", "none")
TRUST_REGION_SCOPES = ("auto", "all")


class _Refusal(NamedTuple):
    """An option that cannot be honoured, when, why, and what to do; `{args.name}` in the reason is the option `name`."""

    field: str
    applies: Callable[[Any], bool]
    reason: str
    remedy: str


def _unknown(name: str, choices: tuple[str, ...]) -> _Refusal:
    return _Refusal(
        name, lambda args: getattr(args, name) not in choices, "it is not known", f"use one of {list(choices)}"
    )


def has_prior(args: Any) -> bool:
    """Whether the other prompts of a generation batch have a say in a baseline."""
    return args.baseline == "gradient_weighted" and args.baseline_prior_strength != 0


def _straddles(args: Any, num_iterations: int) -> bool:
    micro_batches, accumulated = args.steps_per_generation * num_iterations, args.gradient_accumulation_steps
    return bool(micro_batches % accumulated and accumulated % micro_batches)


_REFUSALS = (
    _unknown("baseline", BASELINES),
    _unknown("score_scope", SCOPES),
    _unknown("score_method", METHODS),
    _unknown("lr_adaptation", LR_ADAPTATIONS),
    _Refusal(
        "baseline_leave_one_out",
        lambda args: args.baseline == "leave_one_out" and not args.baseline_leave_one_out,
        "it contradicts baseline='leave_one_out'",
        "use 'group_mean'",
    ),
    _Refusal(
        "baseline_prior_strength",
        lambda args: (
            args.baseline_prior_strength is not None
            and not (args.baseline == "gradient_weighted" and args.baseline_prior_strength >= 0)
        ),
        "it counts completions, and only 'gradient_weighted' has a prior",
        "leave it unset, or use a number of at least 0 with baseline='gradient_weighted'",
    ),
    _Refusal(
        "baseline_memory_size",
        lambda args: (
            args.baseline_memory_size != 0
            and not (args.baseline == "gradient_weighted" and args.baseline_memory_size > 0)
        ),
        "it counts prompts, and only 'gradient_weighted' has a memory of them",
        "leave it unset, or use a number of at least 0 with baseline='gradient_weighted'",
    ),
    # A remembered reward lies outside of a batch of equal ones, whose deviation of 0 would divide the difference.
    _Refusal(
        "baseline_memory_size",
        lambda args: args.baseline_memory_size != 0 and args.scales_rewards,
        "rewards of earlier batches are in another unit than those that this one's deviation divides",
        "leave it unset, which is 0 here, or use scale_rewards='none' and multi_objective_aggregation='sum_then_normalize'",
    ),
    _Refusal(
        "num_generations",
        lambda args: args.num_generations == 1 and not has_prior(args),
        "without another completion of the prompt only the prior of baseline='gradient_weighted' gives a baseline",
        "use that with baseline_prior_strength unset or above 0, or at least 2 completions",
    ),
    _Refusal(
        "score_last_k",
        lambda args: (args.score_last_k or 0) < 1 if args.score_scope == "last_k" else args.score_last_k is not None,
        "it counts the blocks of score_scope='last_k', and score_scope is {args.score_scope!r}",
        "set it to at least 1 together with score_scope='last_k', and only then",
    ),
    _Refusal("score_min_prompts", lambda args: args.score_min_prompts < 2, "a variance needs two", "use at least 2"),
    _Refusal("score_sketch_dim", lambda args: args.score_sketch_dim < 2, "its halves are compared", "use at least 2"),
    _Refusal(
        "per_device_score_batch_size",
        lambda args: args.per_device_score_batch_size is not None and args.per_device_score_batch_size < 1,
        "it counts completions",
        "use at least 1, or None",
    ),
    _Refusal(
        "trust_region_kl",
        lambda args: not args.trust_region_kl > 0,
        "it is a part of the entropy",
        "use a positive number",
    ),
    _Refusal(
        "score_scope",
        lambda args: args.lr_adaptation == "trust_region" and args.score_scope not in TRUST_REGION_SCOPES,
        "the trust region measures how far all trainable parameters move the policy",
        "use 'auto' or 'all', or lr_adaptation='snr' or 'none'",
    ),
    _Refusal("snr_ema_decay", lambda args: not 0 <= args.snr_ema_decay < 1, "it is a decay", "use a number in [0, 1)"),
    _Refusal(
        "snr_min_multiplier",
        lambda args: not 0 <= args.snr_min_multiplier <= args.snr_max_multiplier,
        "it must lie between 0 and snr_max_multiplier ({args.snr_max_multiplier})",
        "lower it, or raise snr_max_multiplier",
    ),
    _Refusal(
        "reward_timeout",
        lambda args: args.reward_timeout is not None and not args.reward_timeout > 0,
        "it is a time in seconds",
        "use a positive number, or None",
    ),
    # The scoring pass must know, before training, what the loss will multiply each token's gradient by.
    _Refusal(
        "loss_type",
        lambda args: args.needs_scores and args.loss_type not in LINEAR_LOSS_TYPES,
        "it is not known, nor is what it multiplies a token's gradient by",
        f"use one of {list(LINEAR_LOSS_TYPES)}, or baseline='group_mean' with lr_adaptation='none'",
    ),
    _Refusal(
        "use_liger_kernel",
        lambda args: args.needs_scores and args.use_liger_kernel,
        "the scores of its layers have not been checked, and TRL removes it in its next major release",
        "set it to False; model_init_kwargs={'use_kernels': True} takes its place",
    ),
)

# Options under which the learning rate cannot be adapted: its rate is that of a step, known before the first micro-batch.
_OBSTACLES = (
    _Refusal(
        "lr_scheduler_type",
        lambda args: args.lr_scheduler_type in ("reduce_lr_on_plateau", "greedy"),
        "it sets the learning rate from an evaluation metric, which the SNR multiplier would overwrite",
        "use a schedule of steps, or lr_adaptation='none'",
    ),
    _Refusal(
        "optim",
        lambda args: any(word in OptimizerNames(args.optim).value for word in ("layerwise", "lomo")),
        "it steps inside the backward pass without parameter groups whose learning rate could be set",
        "use another optimizer, or lr_adaptation='none'",
    ),
    _Refusal(
        "steps_per_generation",
        lambda args: _straddles(args, 1) or _straddles(args, args.num_iterations),
        "optimizer steps of {args.gradient_accumulation_steps} micro-batches would straddle generation batches, each of which lasts "
        "for {args.num_iterations} x as many, so that no batch's SNR would be that of the step",
        "make it, and its product with num_iterations, a divisor or a multiple of gradient_accumulation_steps, or set "
        "lr_adaptation='none'",
    ),
)


class _Qualification(NamedTuple):
    """An option that is honoured, but not in every respect."""

    field: str
    applies: Callable[[Any], bool]
    text: str


_QUALIFICATIONS = (
    _Qualification(
        "top_entropy_quantile",
        lambda args: args.needs_scores and args.top_entropy_quantile < 1.0,
        "the loss leaves out tokens of low entropy, by a quantile of micro-batches that are drawn after scoring. The baseline's "
        "weights and the SNR are those of all tokens. But for that quantile the gradient stays unbiased: the entropy at a token is known "
        "before the token is drawn",
    ),
    _Qualification(
        "off_policy_mask_threshold",
        lambda args: args.needs_scores and args.off_policy_mask_threshold is not None,
        "the loss drops completions of negative advantage from which the policy has moved away, which biases the gradient, as in "
        "GRPOTrainer. Baseline and SNR are those of all completions",
    ),
    _Qualification(
        "loss_type",
        lambda args: (
            args.needs_scores
            and args.loss_type == "vespo"
            and args.use_vllm
            and args.vllm_importance_sampling_correction
        ),
        "it weights a completion by vLLM's importance ratio and by the sign of the advantage, which is known only after scoring. The "
        "baseline's weights and the SNR are those at ratio 1, right to first order",
    ),
)


def check_options(args: Any) -> None:
    """Raise a `ValueError` for the first option that cannot be honoured, and warn of those that are in part."""
    for obstacle in _OBSTACLES:
        if adapts(args) and obstacle.applies(args):
            do_not_adapt(args, obstacle.field, obstacle.reason.format(args=args), obstacle.remedy)
    for refusal in _REFUSALS:
        if refusal.applies(args):
            raise ValueError(refusal_of(args, refusal.field, refusal.reason.format(args=args), refusal.remedy))
    for name, applies, text in _QUALIFICATIONS:
        if applies(args):
            warnings.warn(f"{name}={getattr(args, name)!r}: {text}.")
