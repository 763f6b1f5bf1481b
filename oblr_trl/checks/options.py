"""What OBLR-PO cannot honour, and what it honours with a qualification, as tables. `args` is an [`OBLRPOConfig`] throughout.

An option may rule out that the learning rate is adapted. It is an error where `lr_adaptation` was asked for; where it was left unset,
the run trains without, as [`~trl.GRPOTrainer`] does, and says so.
"""

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import nn
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames

from oblr_trl.baselines import BASELINES
from oblr_trl.gradient_snr import MIN_PROMPTS
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


def _adapts(args: Any) -> bool:
    return args.lr_adaptation != "none"


def _has_prior(args: Any) -> bool:
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
        lambda args: args.num_generations == 1 and not _has_prior(args),
        "without another completion of the prompt only the prior of baseline='gradient_weighted' gives a baseline",
        "use that with baseline_prior_strength unset or above 0, or at least 2 completions",
    ),
    _Refusal(
        "score_last_k",
        lambda args: (args.score_last_k or 0) < 1 if args.score_scope == "last_k" else args.score_last_k is not None,
        "it counts the blocks of score_scope='last_k', and score_scope is {args.score_scope!r}",
        "set it to at least 1 together with score_scope='last_k', and only then",
    ),
    _Refusal("score_sketch_dim", lambda args: args.score_sketch_dim < 1, "it is a length", "use at least 1"),
    _Refusal(
        "trust_region_kl",
        lambda args: not args.trust_region_kl > 0,
        "it is a distance in nats",
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
        "the loss drops completions of negative advantage once the policy has moved away from them. Baseline and SNR are those of "
        "the batch before that",
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
        if _adapts(args) and obstacle.applies(args):
            _do_not_adapt(args, obstacle.field, obstacle.reason.format(args=args), obstacle.remedy)
    for refusal in _REFUSALS:
        if refusal.applies(args):
            raise ValueError(_refusal(args, refusal.field, refusal.reason.format(args=args), refusal.remedy))
    for name, applies, text in _QUALIFICATIONS:
        if applies(args):
            warnings.warn(f"{name}={getattr(args, name)!r}: {text}.")


def check_prompts(args: Any) -> None:
    """Warn of a batch of too few prompts: the SNR compares those of a step, the prior those of a generation batch. With a single one
    the learning rate cannot be adapted."""
    per_step, per_batch = args.prompts_per_step, args.generation_batch_size / args.num_generations
    batch = (
        f"an optimizer step has {per_step:g} prompt{'' if per_step == 1 else 's'} x {args.num_generations} "
        f"completion{'' if args.num_generations == 1 else 's'} "
        f"(per_device_train_batch_size={args.per_device_train_batch_size} x {args.world_size} process(es) x "
        f"gradient_accumulation_steps={args.gradient_accumulation_steps}, num_iterations={args.num_iterations})"
    )
    if args.num_generations == 1 and per_batch < 2:
        reason = f"a generation batch of one prompt has no other completion to take a baseline from, and {batch}"
        size = "steps_per_generation (gradient_accumulation_steps unless set) or per_device_train_batch_size"
        raise ValueError(_refusal(args, "num_generations", reason, f"raise {size}, or use at least 2 completions"))
    remedy = f"raise gradient_accumulation_steps, with {MIN_PROMPTS} prompts or more per step as the aim"
    if args.num_generations > 1:
        remedy += ", or lower num_generations"
    if _adapts(args) and max(per_step, per_batch) < 2:
        reason = f"{batch}, and the noise of a gradient shows only between prompts"
        _do_not_adapt(args, "lr_adaptation", reason, f"{remedy}, or set lr_adaptation='none'")
    if _has_prior(args) and per_batch < 2:
        warnings.warn(
            f"The baseline has no prior: a generation batch has {per_batch:g} prompt, and {batch}. Remedy: {remedy}."
        )
    if _adapts(args) and max(per_step, per_batch) < MIN_PROMPTS:
        warnings.warn(f"rho will be mostly noise: {batch}. Remedy: {remedy}, or set lr_adaptation='none'.")


def check_dataset(args: Any, num_prompts: int) -> None:
    """Raise a `ValueError` for a training set smaller than a generation batch: the parent leaves batches that are not full out,
    and would end at once, without a step and without an error."""
    per_batch = args.generation_batch_size // args.num_generations
    if num_prompts < per_batch:
        raise ValueError(
            f"The training set has {num_prompts} prompts, but a generation batch takes {per_batch} x {args.num_generations} "
            f"completions (generation_batch_size={args.generation_batch_size}), so that no batch would be full. Remedy: lower "
            "per_device_train_batch_size or steps_per_generation (gradient_accumulation_steps unless set), or add prompts."
        )


def adapt_if_possible(args: Any, check: Callable[[Any], None], subject: Any) -> None:
    """Apply a check that raises a `ValueError` for what keeps the learning rate from being adapted."""
    if not _adapts(args):
        return
    try:
        check(subject)
    except ValueError as error:
        if not args.default_to("none"):
            raise
        _warn_not_adapted(str(error))


def check_backend(trainer: Any) -> None:
    """Raise a `ValueError` for what the trainer's backend does that OBLR-PO cannot work with."""
    args, state = trainer.args, trainer.accelerator.state
    adapt_if_possible(args, _check_deepspeed, state.deepspeed_plugin if trainer.is_deepspeed_enabled else None)
    if args.needs_scores and trainer.is_fsdp_enabled and state.fsdp_plugin.fsdp_version == 1:
        raise ValueError(
            "OBLR-PO's scoring pass needs parameters of their own shape, which FSDP 1 flattens. Remedy: set fsdp_version: 2 in "
            "the accelerate configuration, use DeepSpeed ZeRO, or baseline='group_mean' with lr_adaptation='none'."
        )


def check_vocabulary(model: Any, tokenizer: Any) -> None:
    """Raise a `ValueError` for a tokenizer that makes token ids of text which the model has no embedding for: the look-up of one is
    an unclear error on a CPU and the end of the process on a GPU. Special tokens, which text need not contain, may be missing."""
    embeddings = model.get_input_embeddings()
    if not isinstance(embeddings, nn.Embedding):
        return
    special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    special -= {tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id}
    highest = max(set(tokenizer.get_vocab().values()) - special)
    if highest >= embeddings.num_embeddings:
        raise ValueError(
            f"The tokenizer has token id {highest}, but the model's vocabulary has {embeddings.num_embeddings} entries. Use the "
            "tokenizer the model was trained with, or call `model.resize_token_embeddings(len(tokenizer))`."
        )


def _check_deepspeed(plugin: Any) -> None:
    if plugin is not None and "scheduler" in plugin.deepspeed_config:
        raise ValueError(
            "DeepSpeed steps the scheduler of its file itself, so that the SNR could not multiply its rate. Remedy: remove the "
            "`scheduler` section from the DeepSpeed file and set `lr_scheduler_type`, or set lr_adaptation='none'."
        )


def _do_not_adapt(args: Any, name: str, reason: str, remedy: str) -> None:
    """Refuse the adaptation that was asked for, or switch off the default with a warning."""
    refusal = _refusal(args, name, reason, remedy)
    if not args.default_to("none"):
        raise ValueError(refusal)
    _warn_not_adapted(refusal)


def _warn_not_adapted(refusal: str) -> None:
    warnings.warn(f"The learning rate is not adapted: lr_adaptation is 'none', as in GRPOTrainer. {refusal}")


def _refusal(args: Any, name: str, reason: str, remedy: str) -> str:
    value = getattr(args, name)
    value = value.value if isinstance(value, SchedulerType | OptimizerNames) else value
    return f"OBLR-PO cannot honour {name}={value!r}: {reason}. Remedy: {remedy}."
