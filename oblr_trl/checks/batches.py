"""Batches that are too small. `args` is an [`OBLRPOConfig`] throughout."""

import warnings
from typing import Any

from oblr_trl.checks.adaptation import adapts, do_not_adapt, refusal_of
from oblr_trl.checks.options import has_prior
from oblr_trl.gradient_snr import MIN_PROMPTS

_MIN_COMPLETIONS = 32  # of a generation batch, for the trust region: the fewest of its study


def check_prompts(args: Any) -> None:
    """Warn of a batch of too few prompts: rho compares those of a step, the prior those of a generation batch. With a single one
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
        raise ValueError(refusal_of(args, "num_generations", reason, f"raise {size}, or use at least 2 completions"))
    remedy = f"raise gradient_accumulation_steps, with {MIN_PROMPTS} prompts or more per step as the aim"
    if args.num_generations > 1:
        remedy += ", or lower num_generations"
    if adapts(args) and max(per_step, per_batch) < 2:
        reason = f"{batch}, and neither noise nor movement is known from the completions of one prompt"
        do_not_adapt(args, "lr_adaptation", reason, f"{remedy}, or set lr_adaptation='none'")
    if has_prior(args) and per_batch < 2:
        warnings.warn(
            f"The baseline has no prior: a generation batch has {per_batch:g} prompt, and {batch}. Remedy: {remedy}."
        )
    if args.lr_adaptation == "snr" and max(per_step, per_batch) < MIN_PROMPTS:
        warnings.warn(f"rho will be mostly noise: {batch}. Remedy: {remedy}, or set lr_adaptation='none'.")
    if args.lr_adaptation == "trust_region" and args.generation_batch_size < _MIN_COMPLETIONS:
        warnings.warn(
            f"The learning rate will be noisy: how far a step moved the policy is measured on {args.generation_batch_size} completions, and "
            f"{batch}. Remedy: raise steps_per_generation (gradient_accumulation_steps unless set) or per_device_train_batch_size, with "
            f"{_MIN_COMPLETIONS} completions or more per generation batch as the aim, or set lr_adaptation='none'."
        )


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


def check_scores(finite: list[bool], step: int) -> None:
    """Raise a `ValueError` where a process's scores are not finite. All processes know of all: they raise together."""
    if not all(finite):
        raise ValueError(
            f"The score of step {step} is not finite on process {finite.index(False)}: the model's activations or logits are not. No "
            "weight was changed by it. Resume from the last checkpoint with a lower `trust_region_kl` (or learning rate), gradient "
            "clipping, or bf16 instead of fp16."
        )
