"""GRPOTrainer whose advantages come from a gradient-weighted baseline and whose learning rate follows the gradient's SNR."""

import logging
import math
import textwrap
import warnings
from typing import Any

import torch
from accelerate.scheduler import AcceleratedScheduler
from torch import Tensor
from trl.trainer.utils import get_config_model_id, nanstd

from oblr_trl import metrics
from oblr_trl.baselines import (
    SCALE_EPSILON,
    BaselineEstimator,
    GroupedBatch,
    normalized_rewards,
    prompt_key,
    scaled_advantages,
    summed_rewards,
)
from oblr_trl.checkpoints import ResumableGRPOTrainer, add_method_settings, check_same_options
from oblr_trl.checks.adaptation import adapt_if_possible
from oblr_trl.checks.backends import check_backend, check_vocabulary
from oblr_trl.checks.batches import check_dataset
from oblr_trl.checks.coverage import settle_coverage
from oblr_trl.checks.processes import raise_everywhere
from oblr_trl.checks.reward_functions import RewardFunctions
from oblr_trl.gradient_snr import MIN_PROMPTS, GradientSNR, StepGradientSNR, per_prompt_gradients, sampling_variance
from oblr_trl.lr_scheduler import SNRScheduler, check_steerable, check_wrappable, initial_lrs, restore_initial_lrs
from oblr_trl.oblrpo_config import OBLRPOConfig
from oblr_trl.scores.loss_weights import applied_importance_ratio, loss_token_weights
from oblr_trl.scores.parameters import local_parameter_sketch
from oblr_trl.scores.scopes import resolve_scope
from oblr_trl.scores.score_pass import ScoreOutput, ScorePass
from oblr_trl.scores.scoring_model import FORWARD_KEYS, OldLogpsForward, ScoringModel
from oblr_trl.trust_region import TrustRegion

logger = logging.getLogger(__name__)

_TINY = 1e-300  # keeps a rate of 0 from dividing by it
# Losses that TRL divides by the number of tokens of the generation batch, not by a constant.
_DIVIDED_BY_TOKENS = ("dapo", "cispo", "vespo")
# Options that the averages of signal and noise, or the variances of the prior strengths, are in the unit of.
_AVERAGED_OPTIONS = (
    "baseline_leave_one_out",
    "score_scope",
    "score_last_k",
    "loss_type",
    "importance_sampling_level",
    "scale_rewards",
    "reward_weights",
    "multi_objective_aggregation",
    "temperature",
    "num_generations",
)
_PROJECTION_OPTIONS = ("score_sketch_dim", "seed")


class OBLRPOTrainer(ResumableGRPOTrainer):
    r"""
    Trainer for Optimal Baseline and Learning-Rate Policy Optimization (OBLR-PO).

    [OBLR-PO](https://huggingface.co/papers/2511.23310) weights the baseline of a group by the squared norms of its policy
    scores, \\( b^* = E[w r] / E[w] \\), which minimises the variance of the policy gradient, and scales the learning rate
    by \\( \rho = N\,\mathrm{SNR} / (1 + N\,\mathrm{SNR}) \\). Both come from one scoring pass over the generated batch, before
    any training step on it.

    The only changes with respect to [`~trl.GRPOTrainer`] are the advantages and the learning rate. In addition, a reward function
    that fails or returns an infinite reward stops all processes (see [`~checks.reward_functions`]), and runs resume exactly (see
    [`~checkpoints`]). With `baseline="group_mean"` and `lr_adaptation="none"` it is [`~trl.GRPOTrainer`], bit for bit. The constructor
    is the same; `args` is an [`OBLRPOConfig`], which without `args` accumulates gradients over 16 micro-batches: TRL's own batch
    defaults are one prompt per process, and the SNR needs several.

    Differences from the paper, each with the setting that restores it:

    - scores are random sketches, not full gradients (`score_method="exact"` gives exact norms to the baseline);
    - the baseline has priors from the other prompts and from a prompt's earlier visits (`baseline_prior_strength=0`);
    - the constant of the learning rate is measured: every step moves the policy by `trust_region_kl` x rho (`lr_adaptation="snr"`
      multiplies `learning_rate` by rho instead);
    - signal and noise are smoothed over batches (`snr_ema_decay=0`), and rho has a floor (`snr_min_multiplier=0`);
    - the score is that of the loss in use: completion and tool masks, vLLM's importance ratio and, for
      `loss_type="grpo"`, the division by length are part of it (`loss_type="dr_grpo"`, the default, is the plain sum);
    - a KL or entropy term (`beta`, `entropy_coef`), off by default, is not part of signal and noise.

    Example:

    ```python
    >>> from oblr_trl import OBLRPOConfig, OBLRPOTrainer
    >>> from trl.rewards import accuracy_reward
    >>> from datasets import load_dataset

    >>> trainer = OBLRPOTrainer(
    ...     model="Qwen/Qwen3-0.6B-Base",
    ...     reward_funcs=accuracy_reward,
    ...     args=OBLRPOConfig("Qwen3-0.6B-OBLRPO", gradient_accumulation_steps=32),  # 32 prompts x 8 per step on one GPU
    ...     train_dataset=load_dataset("trl-lib/DeepMath-103K", split="train"),
    ... )
    >>> trainer.train()
    ```
    """

    _name = "OBLR-PO"
    _tag_names = ["trl", "oblr-po", "oblr_trl"]
    _paper = {
        "title": "OBLR-PO: A Theoretical Framework for Stable Reinforcement Learning",
        "id": "2511.23310",
        # docstyle-ignore
        "citation": textwrap.dedent("""\
            @article{huang2025oblrpo,
                title        = {{OBLR-PO: A Theoretical Framework for Stable Reinforcement Learning}},
                author       = {Huang and Sheng and Zheng},
                year         = 2025,
                eprint       = {arXiv:2511.23310},
                note         = {Re-titled in 2026: Variance-aware baselines and adaptive learning rates for reinforcement
                                learning with verifiable rewards},
            }"""),
    }

    # Narrower than the parents declare, or declared optional there although set from the constructor on.
    model: Any
    train_dataset: Any
    num_generations: int
    _logs: dict[str, Any]

    # Without the constructor, as tests of a plug-in may make one, it is a `GRPOTrainer`.
    lr_scheduler: Any = None
    _baseline_estimator: Any = None
    _errors_of_rewards: RewardFunctions | None = None
    _old_logps_forward: OldLogpsForward | None = None

    def __init__(self, model, reward_funcs=None, args: OBLRPOConfig | None = None, *positional, **kwargs):
        if args is None:
            model_name = model if isinstance(model, str) else get_config_model_id(model.config)
            # TRL's default batch is one prompt per process, of which there is no SNR.
            args = OBLRPOConfig(f"{model_name.split('/')[-1]}-OBLRPO", gradient_accumulation_steps=MIN_PROMPTS)
        if not isinstance(args, OBLRPOConfig):
            raise ValueError(
                f"`args` must be an `OBLRPOConfig`, got a `{type(args).__name__}`. Replace the class name: every option of "
                "`GRPOConfig` exists there."
            )
        # Read by seams that the parent's constructor may call.
        self._baseline_estimator = BaselineEstimator(
            args.baseline,
            leave_one_out=args.baseline_leave_one_out,
            prior_strength=args.baseline_prior_strength,
            memory_size=args.baseline_memory_size,
        )
        # A trust region bounds what a chance estimate of the first signals can do; a multiplier alone must be held back.
        averages = GradientSNR(decay=args.snr_ema_decay, holds_back=args.lr_adaptation != "trust_region")
        self._gradient_snr = StepGradientSNR(averages)
        self._rho = math.nan  # of the batch at hand
        self._trust_region = TrustRegion(
            args.trust_region_kl, min_rho=args.snr_min_multiplier, max_rho=args.snr_max_multiplier
        )
        self._initial_lrs: list[float] = []
        self._rewards_per_func: Tensor | None = None
        self._score_pass: ScorePass | None = None
        super().__init__(model, reward_funcs, args, *positional, **kwargs)
        self._errors_of_rewards = RewardFunctions(args.reward_timeout)
        self.reward_funcs = [self._errors_of_rewards.wrap(reward_func) for reward_func in self.reward_funcs]
        check_backend(self)
        check_vocabulary(self.model, self._tokenizer)
        if args.needs_scores:
            # Layers that cannot be scored fail, or are reported, before any work is done.
            scoped = resolve_scope(self.model, args.score_scope, args.score_last_k)
            line = settle_coverage(scoped, self.args)
            if line is not None and self.is_world_process_zero():
                logger.warning(line)
            averages.holds_back = args.lr_adaptation != "trust_region"
            self._num_parameters = scoped.num_parameters
            self._score_pass = ScorePass(
                self.model,
                scope=args.score_scope,
                last_k=args.score_last_k,
                methods=("sketch",) if args.score_method == "sketch" else ("sketch", "exact"),
                sketch_dim=args.score_sketch_dim,
                seed=args.seed,
                temperature=args.temperature,
                head_dtype=torch.float32 if args.cast_lm_head_to_fp32 else None,
                gradient_checkpointing=args.gradient_checkpointing,
            )

    # Groups are intact here and nowhere later: `_prepare_inputs` shuffles the rows of what this returns.
    def _generate_and_score_completions(self, inputs):
        estimator = self._baseline_estimator
        as_parent = estimator is None or (estimator.baseline == "group_mean" and self._score_pass is None)
        if as_parent or not self.model.training:
            return super()._generate_and_score_completions(inputs)
        # A tool mask would be known too late for a pass that takes the place of the parent's.
        masked_later = self.tools or self.rollout_func is not None
        if self._score_pass is not None and self.args.reuses_old_logps_forward and not masked_later:
            self._old_logps_forward = OldLogpsForward(
                self.model,
                self._score_pass,
                self.args.loss_type,
                micro_batch_size=self.args.per_device_train_batch_size,
            )
        try:
            output = super()._generate_and_score_completions(inputs)
        finally:
            old_logps_forward, self._old_logps_forward = self._old_logps_forward, None

        batch = self._grouped_batch(output, old_logps_forward)
        if estimator.memory is not None:
            batch.prompt_keys = self._gathered_prompt_keys(inputs)
        baselines = estimator(batch)
        advantages = self._advantages(output, batch.rewards, baselines)
        if batch.sketches is not None:
            self._adapt_learning_rate(batch, baselines, advantages, output["num_items_in_batch"])
        priors = {
            metrics.PRIOR_STRENGTH: estimator.prior_strength,
            metrics.MEMORY_STRENGTH: estimator.memory_strength,
            metrics.REMEMBERED_FRACTION: estimator.remembered_fraction(batch),
        }
        self._log_train_metrics(priors | metrics.baseline_metrics(batch, baselines))
        estimator.update(batch)
        return output

    # The parent turns the rewards into advantages itself and returns only those; keep what it computed them from.
    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        rewards_per_func = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        if self._errors_of_rewards is None:
            return rewards_per_func
        raise_everywhere(self.accelerator, self._errors_of_rewards.take_error())
        infinite = rewards_per_func.isinf().any(dim=0)
        if infinite.any():  # gathered, hence the same on all processes: all raise
            names = [name for name, bad in zip(self.reward_func_names, infinite.tolist(), strict=True) if bad]
            raise ValueError(
                f"Reward functions {names} returned an infinite reward, which no baseline can balance. Return a finite "
                "number, or None for a completion that cannot be scored."
            )
        self._rewards_per_func = rewards_per_func
        return rewards_per_func

    def _get_per_token_logps_and_entropies(self, model, input_ids, attention_mask, logits_to_keep, *args, **kwargs):
        if self._old_logps_forward is not None:
            model = self._old_logps_forward.in_place_of(model, attention_mask[:, -logits_to_keep:])
        return super()._get_per_token_logps_and_entropies(
            model, input_ids, attention_mask, logits_to_keep, *args, **kwargs
        )

    def _grouped_batch(self, output: dict[str, Any], old_logps_forward: OldLogpsForward | None) -> GroupedBatch:
        """Rewards, lengths and scores of all processes, one row per prompt."""
        rewards_per_func, self._rewards_per_func = self._rewards_per_func, None
        assert rewards_per_func is not None, "the parent did not call `_calculate_rewards`"
        rewards_per_func = rewards_per_func.view(-1, self.num_generations, rewards_per_func.size(1))  # (N, G, F)
        weights = self.reward_weights.to(rewards_per_func.device)
        if self.multi_objective_aggregation == "normalize_then_sum":
            rewards = normalized_rewards(rewards_per_func, weights, by_group=not self._baseline_estimator.has_prior)
        else:
            rewards = summed_rewards(rewards_per_func, weights)
        loss_mask = output["completion_mask"] * output.get("tool_mask", 1)
        batch = GroupedBatch(rewards, self.accelerator.gather(loss_mask.sum(dim=1)).view_as(rewards))
        if self._score_pass is not None:
            scores, token_weights = self._score_completions(output, loss_mask, old_logps_forward)
            assert scores.sketches is not None  # the first of the methods
            batch.sketches = scores.sketches.view(*rewards.shape, -1)
            batch.token_weights = self.accelerator.gather(token_weights.sum(dim=1)).view_as(rewards) / batch.lengths
            exact = scores.squared_norms
            batch.weights = batch.sketches.square().sum(dim=2) if exact is None else exact.view_as(rewards)
        return batch

    def _gathered_prompt_keys(self, inputs: list[dict[str, Any]]) -> Tensor:
        """Keys of the prompts of all processes, one per group."""
        keys = [prompt_key(row.get("prompt")) for row in inputs]
        return self.accelerator.gather(torch.tensor(keys, device=self.accelerator.device))[:: self.num_generations]

    def _score_completions(
        self, output: dict[str, Any], loss_mask: Tensor, old_logps_forward: OldLogpsForward | None = None
    ) -> tuple[ScoreOutput, Tensor]:
        """The scores of all processes, and the weights of the local tokens in them: from the parent's forward pass for the old log-probabilities, if the scoring pass took its
        place, else from a pass over the local rows in chunks of `per_device_train_batch_size`."""
        vllm_ratio = output.get("importance_sampling_ratio")
        if vllm_ratio is not None:
            vllm_ratio = applied_importance_ratio(
                vllm_ratio,
                loss_mask,
                loss_type=self.args.loss_type,
                importance_sampling_level=self.args.importance_sampling_level,
            )
        micro_batch_size = self.args.per_device_train_batch_size
        token_weights = loss_token_weights(
            self.args.loss_type, loss_mask, vllm_ratio, micro_batch_size=micro_batch_size
        )
        scoring_model = None if old_logps_forward is None else old_logps_forward.scoring_model
        if scoring_model is not None:
            assert "old_per_token_logps" in output, "the scoring pass took the place of another forward pass"
            scores = scoring_model.result(self.accelerator.gather, vllm_ratio)
        else:
            assert self._score_pass is not None
            scoring_model = ScoringModel(self._score_pass, token_weights)
            self._get_per_token_logps_and_entropies(
                scoring_model,
                torch.cat([output["prompt_ids"], output["completion_ids"]], dim=1),
                torch.cat([output["prompt_mask"], output["completion_mask"]], dim=1),
                output["completion_ids"].size(1),
                batch_size=micro_batch_size,
                **{key: output[key] for key in FORWARD_KEYS if key in output},
            )
            scores = scoring_model.result(self.accelerator.gather)
        self._log_train_metrics({metrics.PASS_TIME: scoring_model.seconds})
        assert scores.sketches is not None
        finite = scores.sketches.isfinite().view(self.accelerator.num_processes, -1).all(dim=1)
        if not finite.all():  # gathered, hence the same on all processes: all raise
            raise ValueError(
                f"The score of step {self.state.global_step} is not finite on process {finite.tolist().index(False)}: the model's "
                "activations or logits are not. No weight was changed by it. Resume from the last checkpoint with a lower "
                "`trust_region_kl` (or learning rate), gradient clipping, or bf16 instead of fp16."
            )
        return scores, token_weights

    def _advantages(self, output: dict[str, Any], rewards: Tensor, baselines: Tensor) -> Tensor:
        """r - b, in the place of the parent's; `nan` where a completion could not be scored."""
        if self.args.baseline == "group_mean":
            advantages = self.accelerator.gather(output["advantages"]).view_as(rewards)
            unscorable = rewards.isnan()
            lowest = rewards.masked_fill(unscorable, math.inf).amin(dim=1, keepdim=True)
            highest = rewards.masked_fill(unscorable, -math.inf).amax(dim=1, keepdim=True)
            # Of equal rewards the parent's mean may differ by rounding, which would pass for a gradient.
            return advantages.masked_fill(lowest == highest, 0.0).masked_fill(unscorable, math.nan)
        advantages, estimator = rewards - baselines, self._baseline_estimator
        # A sum of normalised rewards is scaled over the batch whatever `scale_rewards` is, as in TRL.
        scale = "batch" if self.multi_objective_aggregation == "normalize_then_sum" else self.scale_rewards
        if scale == "group" and estimator.has_prior:
            advantages = scaled_advantages(rewards, baselines, prior_strength=estimator.prior_strength)
        elif scale != "none":
            std = nanstd(rewards, dim=1).unsqueeze(1) if scale == "group" else nanstd(rewards)
            advantages = advantages / (std + SCALE_EPSILON)
        self._write_advantages(output, advantages.nan_to_num(nan=0.0).flatten())
        return advantages

    def _write_advantages(self, output: dict[str, Any], advantages: Tensor) -> None:
        """Put this process's slice of the advantages into the batch, and all of them into the log."""
        num_local = output["advantages"].size(0)
        output["advantages"] = advantages[self.accelerator.process_index * num_local :][:num_local]
        logged = self._logs["advantages"]  # the parent has just appended its own: they are the tail
        for _ in range(min(len(logged), advantages.numel())):
            logged.pop()
        logged.extend(advantages.tolist())

    def _adapt_learning_rate(
        self, batch: GroupedBatch, baselines: Tensor, advantages: Tensor, num_tokens: Any
    ) -> None:
        """Signal, noise and rho of the optimizer step at hand, and its learning rate."""
        assert self.args.steps_per_generation is not None  # set by the configuration
        sketches = batch.sketches
        assert sketches is not None  # or there is no learning rate to adapt
        # Optimizer steps that share the batch, where above 1.
        steps = self.args.steps_per_generation / self.args.gradient_accumulation_steps
        movement = {}
        if self.args.lr_adaptation == "trust_region":
            num_steps = max(steps * self.num_iterations, 1)
            movement = self._measure_movement(batch, batch.rewards - baselines, num_steps)
        if self.args.loss_type in _DIVIDED_BY_TOKENS:
            advantages = advantages * (advantages.numel() / max(int(num_tokens), 1))
        snr = self._gradient_snr
        self._rho = snr.add(
            per_prompt_gradients(sketches, advantages),
            step=self.state.global_step,
            sampling_variance=sampling_variance(sketches, advantages, steps),
        )
        adapts = self.args.lr_adaptation != "none"
        if adapts and snr.num_prompts < 2 and snr.num_batches * steps * self.num_iterations >= 1:
            warnings.warn(
                "The completions of fewer than two prompts of a step could be scored, which says nothing about rho: the "
                "learning rate stays as it was. See for what the reward functions return None."
            )
        values = {
            metrics.SIGNAL: snr.averages.signal,
            metrics.NOISE: snr.averages.noise,
            metrics.NOISE_PER_ROLLOUT: self.num_generations * snr.averages.noise,
            metrics.RHO: self._rho,
            metrics.NUM_PROMPTS: snr.num_prompts,
        }
        if snr.num_batches == 1:  # of several batches of one step the first one tells how far the step before went
            values |= movement
        schedule = self._schedule
        if isinstance(schedule, SNRScheduler):
            if self.args.lr_adaptation == "trust_region":
                rate = self._trust_region.next_rate(self._rho, schedule.position)
                if not math.isnan(rate):  # or no token could be scored yet
                    self._set_rate(rate)
                values[metrics.KL_TARGET] = self._trust_region.target(self._rho, schedule.position)
            elif not math.isnan(self._rho):
                schedule.set_rho(self._rho)
            values[metrics.LR_MULTIPLIER] = schedule.multiplier
        # Of several batches of one step the last one's hold: the others were provisional.
        self._log_train_metrics(values, replace=snr.num_batches > 1)

    def _measure_movement(self, batch: GroupedBatch, advantages: Tensor, num_steps: float) -> dict[str, float]:
        """How far the policy has moved since the last generation batch, from this one's completions."""
        assert self._score_pass is not None
        assert batch.sketches is not None
        assert batch.token_weights is not None
        region, position = self._trust_region, self._schedule.position
        if position > 1 + 1e-6:
            warnings.warn(
                f"The schedule stands at {position:g} times its initial learning rate, and the KL of a step follows its square: the "
                "trust region takes the initial rate for the largest. Use a schedule that starts there or rises to it (warm-up)."
            )
        weighted = batch.token_weights > 0  # others are masked, and say nothing of how far they moved
        scores = batch.sketches[weighted] / batch.token_weights[weighted].unsqueeze(1)
        scoped = resolve_scope(self.model, self.args.score_scope, None)
        num_parameters = scoped.num_parameters
        if num_parameters != self._num_parameters:  # some were frozen or unfrozen
            self._num_parameters = num_parameters
            region.forget_parameters()
        if math.isnan(region.rate) and bool(scores.any()):
            region.start(scores.square().sum(dim=1).mean().item(), scoped.num_trainable, num_steps=num_steps)
        movement = region.observe(
            scores,
            advantages[weighted],
            self.accelerator.reduce(local_parameter_sketch(self._score_pass), "sum"),
            step=self.state.global_step,
            position=position,
            is_exact=num_parameters <= self.args.score_sketch_dim,
        )
        values = {metrics.KL: movement.kl, metrics.CURVATURE: movement.curvature}
        if self.multi_objective_aggregation != "normalize_then_sum":  # whose unit is another one in every batch
            values[metrics.PREDICTED_GAIN] = movement.predicted_gain
        return values

    def _log_train_metrics(self, values: dict[str, float], *, replace: bool = False) -> None:
        for name, value in values.items():
            logged = self._metrics["train"][name]
            if replace and logged:  # a callback may have logged in the middle of the step
                logged.pop()
            logged.append(value)

    def _prepare_inputs(self, generation_batch):
        inputs = super()._prepare_inputs(generation_batch)
        if self.model.training and isinstance(self._schedule, SNRScheduler):
            self._schedule.multiply()  # also in steps on rollouts of an earlier one, which set no rho
        return inputs

    def _get_train_sampler(self, dataset=None):
        check_dataset(self.args, len(self.train_dataset if dataset is None else dataset))
        return super()._get_train_sampler(dataset)

    def create_scheduler(self, num_training_steps, optimizer=None):
        # Once per `train`: its first step has the number of a step of an earlier one, whose batches it must not be pooled with.
        self._gradient_snr.restart()
        last_rate = self._trust_region.rate
        self._trust_region.restart()
        adapt_if_possible(self.args, check_steerable, self.optimizer if optimizer is None else optimizer)
        super().create_scheduler(num_training_steps, optimizer)
        if not isinstance(self._schedule, SNRScheduler):
            adapt_if_possible(self.args, check_wrappable, self.lr_scheduler)
        if not self.args.needs_scores:
            self._score_pass = None
        if self.args.lr_adaptation != "none" and not isinstance(self._schedule, SNRScheduler):
            low, high = self.args.snr_min_multiplier, self.args.snr_max_multiplier
            if self.args.lr_adaptation == "trust_region":
                low, high = 0.0, math.inf  # no step before the first batch
            self.lr_scheduler = SNRScheduler(self.lr_scheduler, min_multiplier=low, max_multiplier=high)
        lrs = initial_lrs(self._schedule)
        if lrs != self._initial_lrs:
            # In place: for a DeepSpeed file with an optimizer of its own transformers calls this first on a copy of the trainer.
            self._initial_lrs[:] = lrs
            if self.is_world_process_zero():
                logger.warning(self._start_line())
        # Rollouts that an earlier `train` has not used up.
        if self.args.lr_adaptation == "trust_region" and not math.isnan(last_rate):
            self._set_rate(last_rate)
        elif self.args.lr_adaptation == "snr" and not math.isnan(self._rho):
            self._schedule.set_rho(self._rho)
        return self.lr_scheduler

    def _set_rate(self, rate: float) -> None:
        """Let the schedule's initial rate be `rate`; of several parameter groups that of the largest."""
        self._schedule.set_multiplier(rate / max(*self._initial_lrs, _TINY))

    @property
    def _schedule(self) -> Any:
        """The scheduler without the wrapper that DeepSpeed's comes in."""
        scheduler = self.lr_scheduler
        return scheduler.scheduler if isinstance(scheduler, AcceleratedScheduler) else scheduler

    def _start_line(self) -> str:
        """What training is about to do, for a reader who kept the options of `GRPOTrainer`."""
        args = self.args
        rates = ", ".join(f"{lr:g}" for lr in sorted(set(self._initial_lrs)))
        completions = "1 completion" if args.num_generations == 1 else f"{args.num_generations} completions"
        line = f"{args.prompts_per_step:g} prompts x {completions} per optimizer step, baseline "
        line += f"{args.baseline!r}; learning rate: the schedule (from {rates})"
        if args.lr_adaptation == "none":
            return line + " alone, as in GRPOTrainer."
        if args.lr_adaptation == "trust_region":
            return (
                f"{line} gives shape and ratios; its size is found by moving the policy by KL = {args.trust_region_kl:g} x rho nats "
                "per generation batch, whatever `learning_rate` is; `learning_rate` is logged as applied."
            )
        low, high = args.snr_min_multiplier, args.snr_max_multiplier
        return (
            f"{line} x rho, {low:g} to {high:g} times it and {low:g} while rho is unknown. A rate that was tuned without this "
            "multiplier is therefore too small; `learning_rate` is logged as applied."
        )

    def _load_optimizer_and_scheduler(self, checkpoint):
        super()._load_optimizer_and_scheduler(checkpoint)
        wanted = list(self._initial_lrs)
        if checkpoint is not None and (loaded := restore_initial_lrs(self._schedule, wanted)) != wanted:
            logger.warning(
                "The schedule continues from initial learning rates %s, not the checkpoint's %s.", wanted, loaded
            )
            if not math.isnan(self._trust_region.rate):
                self._set_rate(self._trust_region.rate)

    def _algorithm_state(self) -> dict[str, Any]:
        return super()._algorithm_state() | {
            **{name: getattr(self.args, name) for name in ("baseline", "lr_adaptation", *_AVERAGED_OPTIONS)},
            **{name: getattr(self.args, name) for name in _PROJECTION_OPTIONS},
            "gradient_snr": self._gradient_snr.averages.state_dict(),
            "trust_region": self._trust_region.state_dict() if self.args.lr_adaptation == "trust_region" else None,
            "prior_strength": self._baseline_estimator.state_dict(),
        }

    def _load_algorithm_state(self, state: dict[str, Any]) -> None:
        args = self.args
        chooses_prior = args.baseline == "gradient_weighted" and self._baseline_estimator.automatic is not None
        averages = args.lr_adaptation != "none" or chooses_prior
        check_same_options(state, args, ("baseline", "lr_adaptation", *(_AVERAGED_OPTIONS if averages else ())))
        super()._load_algorithm_state(state)
        self._gradient_snr.averages.load_state_dict(state["gradient_snr"])
        if args.lr_adaptation == "trust_region":
            # A sketch of parameters says nothing under other projections: the next batch then measures nothing.
            same = all(state[name] == getattr(args, name) for name in _PROJECTION_OPTIONS)
            self._trust_region.load_state_dict(state["trust_region"] | ({} if same else {"parameters": None}))
        self._baseline_estimator.load_state_dict(state["prior_strength"])

    def _algorithm_tensors(self) -> dict[str, Tensor]:
        memory = self._baseline_estimator.memory
        return super()._algorithm_tensors() | ({} if memory is None else memory.state_dict())

    def _load_algorithm_tensors(self, tensors: dict[str, Tensor]) -> None:
        super()._load_algorithm_tensors(tensors)
        memory = self._baseline_estimator.memory
        if memory is not None and tensors:
            memory.load_state_dict(tensors)

    def create_model_card(self, *args, **kwargs):
        super().create_model_card(*args, **kwargs)
        if self.is_world_process_zero():
            lrs = self._initial_lrs or [self.args.learning_rate]
            add_method_settings(self.args, self._baseline_estimator.prior_strength, lrs)
