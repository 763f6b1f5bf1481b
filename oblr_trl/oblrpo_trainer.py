"""GRPOTrainer whose advantages come from a gradient-weighted baseline and whose learning rate follows the gradient's SNR."""

import logging
import math
import warnings
from typing import Any

import torch
from accelerate.scheduler import AcceleratedScheduler
from torch import Tensor
from trl.trainer.utils import get_config_model_id, nanstd

from oblr_trl.advantages import (
    BaselineEstimator,
    GroupedBatch,
    applied_importance_ratio,
    baseline_metrics,
    loss_token_weights,
)
from oblr_trl.gradient_snr import (
    MIN_PROMPTS,
    GradientSNR,
    StepGradientSNR,
    per_prompt_gradients,
    sampling_variance,
)
from oblr_trl.guarded_trainer import GuardedGRPOTrainer
from oblr_trl.lr_scheduler import SNRScheduler, check_steerable, check_wrappable, initial_lrs, restore_initial_lrs
from oblr_trl.model_card import OBLRPO, complete_model_card, method_in_use
from oblr_trl.oblrpo_config import OBLRPOConfig
from oblr_trl.scores.score_pass import ScoreOutput
from oblr_trl.scores.scopes import resolve_scope
from oblr_trl.scores.score_pass import ScorePass
from oblr_trl.scores.scoring_model import FORWARD_KEYS, ScoringModel

logger = logging.getLogger(__name__)

# TRL's epsilon beside a standard deviation of rewards; it keeps groups of equal rewards from dividing by zero.
_SCALE_EPSILON = 1e-4
# Losses that TRL divides by the number of tokens of the generation batch, not by a constant.
_DIVIDED_BY_TOKENS = ("dapo", "cispo")
# Options that the averages of signal and noise, or the strengths of the prior, are in the unit of.
_AVERAGED_OPTIONS = (
    "baseline_leave_one_out",
    "score_scope",
    "score_last_k",
    "loss_type",
    "importance_sampling_level",
    "scale_rewards",
    "reward_weights",
    "temperature",
    "num_generations",
)


class OBLRPOTrainer(GuardedGRPOTrainer):
    r"""
    Trainer for Optimal Baseline and Learning-Rate Policy Optimization (OBLR-PO).

    [OBLR-PO](https://huggingface.co/papers/2511.23310) weights the baseline of a group by the squared norms of its policy
    scores, \\( b^* = E[w r] / E[w] \\), which minimises the variance of the policy gradient, and multiplies the learning rate
    by \\( \rho = N\,\mathrm{SNR} / (1 + N\,\mathrm{SNR}) \\). Both come from one scoring pass over the generated batch, before
    any training step on it.

    The only changes with respect to [`~trl.GRPOTrainer`] are the advantages and the learning rate (and what happens when
    something fails, see [`~guarded_trainer.GuardedGRPOTrainer`]). With `baseline="group_mean"` and `lr_adaptation="none"` it is
    [`~trl.GRPOTrainer`], bit for bit. The constructor is the same; `args` is an [`OBLRPOConfig`], which without `args` accumulates
    gradients over 16 micro-batches: TRL's own batch defaults are one prompt per process, and the SNR needs several.

    Differences from the paper, each with the setting that restores it:

    - scores are random sketches, not full gradients (`score_method="exact"` gives exact norms to the baseline);
    - the baseline has a prior from the other prompts (`baseline_prior_strength=0`);
    - signal and noise are smoothed over batches (`snr_ema_decay=0`), and the multiplier has a floor (`snr_min_multiplier=0`);
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

    _name, _tag_names, _paper = OBLRPO

    # Narrower than the parents declare, or declared optional there although set from the constructor on.
    lr_scheduler: Any
    num_generations: int
    _logs: dict[str, Any]

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
        self._name, self._tag_names, self._paper = method_in_use(args)
        # Read by seams that the parent's constructor may call.
        self._baseline_estimator = BaselineEstimator(
            args.baseline, leave_one_out=args.baseline_leave_one_out, prior_strength=args.baseline_prior_strength
        )
        self._gradient_snr = GradientSNR(decay=args.snr_ema_decay)
        self._score_pass: ScorePass | None = None
        self._scoring_model: ScoringModel | None = None
        self._old_logps_due = False
        self._rewards_per_func: Tensor | None = None
        self._step_snr = StepGradientSNR(self._gradient_snr)
        self._rho = math.nan  # of the batch at hand
        self._initial_lrs: list[float] = []
        super().__init__(model, reward_funcs, args, *positional, **kwargs)

        plugin = self.accelerator.state.deepspeed_plugin if self.is_deepspeed_enabled else None
        if args.lr_adaptation == "snr" and plugin is not None and "scheduler" in plugin.deepspeed_config:
            raise ValueError(
                "DeepSpeed steps the scheduler of its file itself, so that the SNR could not multiply its rate. Remedy: remove the "
                "`scheduler` section from the DeepSpeed file and set `lr_scheduler_type`, or set lr_adaptation='none'."
            )
        if args.needs_scores:
            if self.is_fsdp_enabled and self.accelerator.state.fsdp_plugin.fsdp_version == 1:
                raise ValueError(
                    "OBLR-PO's scoring pass needs parameters of their own shape, which FSDP 1 flattens. Remedy: set "
                    "fsdp_version: 2 in the accelerate configuration, use DeepSpeed ZeRO, or baseline='group_mean' with "
                    "lr_adaptation='none'."
                )
            resolve_scope(
                self.model, args.score_scope, args.score_last_k
            )  # unknown layers fail before any work is done
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

    # The parent turns the rewards into advantages itself and returns only those; keep what it computed them from.
    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        rewards_per_func = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        self._rewards_per_func = rewards_per_func
        return rewards_per_func

    def _prepare_inputs(self, generation_batch):
        inputs = super()._prepare_inputs(generation_batch)
        if self.model.training and isinstance(self._schedule, SNRScheduler):
            self._schedule.multiply()  # also in steps on rollouts of an earlier one, which set no ratio
        return inputs

    # Groups are intact here and nowhere later: `_prepare_inputs` shuffles the rows of what this returns.
    def _generate_and_score_completions(self, inputs):
        training = self.model.training
        # A tool mask would be known too late for a pass that takes the place of the parent's.
        unmasked = not self.tools and self.rollout_func is None
        self._old_logps_due = training and self._score_pass is not None and unmasked and self.args.scores_ride
        output = super()._generate_and_score_completions(inputs)
        if not training or (self.args.baseline == "group_mean" and self._score_pass is None):
            return output
        loss_mask = output["completion_mask"] * output.get("tool_mask", 1)
        scores = self._score_completions(output, loss_mask) if self._score_pass is not None else None
        self._set_advantages(output, loss_mask, scores)
        return output

    def _get_per_token_logps_and_entropies(self, model, input_ids, attention_mask, logits_to_keep, *args, **kwargs):
        if self._old_logps_due and model is self.model:
            self._old_logps_due = False
            assert self._score_pass is not None
            loss_mask = attention_mask[:, -logits_to_keep:]
            model = ScoringModel(self._score_pass, loss_token_weights(self.args.loss_type, loss_mask))
            self._scoring_model = model
        return super()._get_per_token_logps_and_entropies(
            model, input_ids, attention_mask, logits_to_keep, *args, **kwargs
        )

    def _score_completions(self, output: dict[str, Any], loss_mask: Tensor) -> ScoreOutput:
        """Run the scoring pass on the local rows, in chunks of `per_device_train_batch_size`, unless it has been on the way,
        and gather its results."""
        scoring_model, self._scoring_model = self._scoring_model, None
        vllm_ratio = output.get("importance_sampling_ratio")
        if vllm_ratio is not None:
            vllm_ratio = applied_importance_ratio(
                vllm_ratio,
                loss_mask,
                loss_type=self.args.loss_type,
                importance_sampling_level=self.args.importance_sampling_level,
            )
        if scoring_model is not None:
            assert "old_per_token_logps" in output, "the scoring pass took the place of another forward pass"
            scores = scoring_model.result(self.accelerator.gather, vllm_ratio)
        else:
            assert self._score_pass is not None
            scoring_model = ScoringModel(
                self._score_pass, loss_token_weights(self.args.loss_type, loss_mask, vllm_ratio)
            )
            self._get_per_token_logps_and_entropies(
                scoring_model,
                torch.cat([output["prompt_ids"], output["completion_ids"]], dim=1),
                torch.cat([output["prompt_mask"], output["completion_mask"]], dim=1),
                output["completion_ids"].size(1),
                batch_size=self.args.per_device_train_batch_size,
                **{key: output[key] for key in FORWARD_KEYS if key in output},
            )
            scores = scoring_model.result(self.accelerator.gather)
        self._log_train_metrics({"score/pass_time": scoring_model.seconds})
        assert scores.sketches is not None
        self._refuse_not_finite("score", scores.sketches)
        return scores

    def _set_advantages(self, output: dict[str, Any], loss_mask: Tensor, scores: ScoreOutput | None) -> None:
        """Replace the parent's advantages by r - b, and set the learning rate of the step that will use them."""
        rewards = self._grouped_rewards()  # (N, G)
        weights = sketches = None
        if scores is not None:
            assert scores.sketches is not None
            sketches = scores.sketches.view(*rewards.shape, -1)
            exact = scores.squared_norms
            weights = sketches.square().sum(dim=2) if exact is None else exact.view_as(rewards)
        lengths = self.accelerator.gather(loss_mask.sum(dim=1)).view_as(rewards)
        batch = GroupedBatch(rewards, lengths, weights, sketches)

        prior_strength = self._baseline_estimator.prior_strength
        baselines = self._baseline_estimator(batch)
        self._log_train_metrics(baseline_metrics(batch, baselines) | {"baseline/prior_strength": prior_strength})
        if self.args.baseline == "group_mean":
            advantages = self.accelerator.gather(output["advantages"]).view_as(rewards)
            unscorable = rewards.isnan()
            lowest = rewards.masked_fill(unscorable, math.inf).amin(dim=1, keepdim=True)
            highest = rewards.masked_fill(unscorable, -math.inf).amax(dim=1, keepdim=True)
            # Of equal rewards the parent's mean may differ by rounding, which would pass for a gradient.
            advantages = advantages.masked_fill(lowest == highest, 0.0).masked_fill(unscorable, math.nan)
        else:
            advantages = (rewards - baselines) / self._reward_scale(rewards)
            self._write_advantages(output, advantages.nan_to_num(nan=0.0).flatten())
        if sketches is not None:
            unit = 1.0
            if self.args.loss_type in _DIVIDED_BY_TOKENS:
                unit = rewards.numel() / max(int(output["num_items_in_batch"]), 1)
            self._adapt_learning_rate(sketches, unit * advantages)

    def _grouped_rewards(self) -> Tensor:
        """Weighted sum of the reward functions over all processes, `(N, G)`; `nan` where none of them applied."""
        rewards_per_func, self._rewards_per_func = self._rewards_per_func, None
        assert rewards_per_func is not None, "the parent did not call `_calculate_rewards`"
        rewards = (rewards_per_func * self.reward_weights.to(rewards_per_func.device)).nansum(dim=1)
        rewards[rewards_per_func.isnan().all(dim=1)] = math.nan
        return rewards.view(-1, self.num_generations)

    def _reward_scale(self, rewards: Tensor) -> Tensor | float:
        if self.scale_rewards == "none":
            return 1.0
        std = nanstd(rewards, dim=1).unsqueeze(1) if self.scale_rewards == "group" else nanstd(rewards)
        return std + _SCALE_EPSILON

    def _write_advantages(self, output: dict[str, Any], advantages: Tensor) -> None:
        num_local = output["advantages"].size(0)
        output["advantages"] = advantages[self.accelerator.process_index * num_local :][:num_local]
        logged = self._logs["advantages"]  # the parent has just appended its own: they are the tail
        for _ in range(min(len(logged), advantages.numel())):
            logged.pop()
        logged.extend(advantages.tolist())

    def _adapt_learning_rate(self, sketches: Tensor, advantages: Tensor) -> None:
        assert self.args.steps_per_generation is not None  # set by the configuration
        # Optimizer steps that share the batch, where above 1.
        steps = self.args.steps_per_generation / self.args.gradient_accumulation_steps
        self._rho = self._step_snr.add(
            per_prompt_gradients(sketches, advantages),
            step=self.state.global_step,
            sampling_variance=sampling_variance(sketches, advantages, steps),
        )
        num_prompts, num_batches = self._step_snr.num_prompts, self._step_snr.num_batches
        if num_prompts < 2 and num_batches * steps * self.num_iterations >= 1:
            warnings.warn(
                "The completions of fewer than two prompts of a step could be scored, which says nothing about rho: the "
                "multiplier stays as it was, `snr_min_multiplier` at the start. See for what the reward functions return None."
            )
        metrics = {
            "gradient_snr/signal": self._gradient_snr.signal,
            "gradient_snr/noise": self._gradient_snr.noise,
            "gradient_snr/rho": self._rho,
            "gradient_snr/num_prompts": num_prompts,
        }
        schedule = self._schedule
        if isinstance(schedule, SNRScheduler):
            if not math.isnan(self._rho):
                schedule.set_rho(self._rho)
            metrics["lr_multiplier"] = schedule.multiplier
        # Of several batches of one step the last one's hold: the others were provisional.
        self._log_train_metrics(metrics, replace=num_batches > 1)

    def _log_train_metrics(self, metrics: dict[str, float], *, replace: bool = False) -> None:
        for name, value in metrics.items():
            logged = self._metrics["train"][name]
            if replace and logged:  # a callback may have logged in the middle of the step
                logged.pop()
            logged.append(value)

    def create_scheduler(self, num_training_steps, optimizer=None):
        # Once per `train`: its first step has the number of a step of an earlier one, whose batches it must not be pooled with.
        self._step_snr.restart()
        adapts = self.args.lr_adaptation == "snr"
        optimizer_in_use: Any = self.optimizer if optimizer is None else optimizer
        if adapts:
            check_steerable(optimizer_in_use)
        super().create_scheduler(num_training_steps, optimizer)
        if adapts and not isinstance(self._schedule, SNRScheduler):
            check_wrappable(self.lr_scheduler)
            self.lr_scheduler = SNRScheduler(
                self.lr_scheduler, min_factor=self.args.snr_min_multiplier, max_factor=self.args.snr_max_multiplier
            )
            if not math.isnan(self._rho):  # of rollouts that an earlier `train` has not used up
                self.lr_scheduler.set_rho(self._rho)
        lrs = initial_lrs(self._schedule)
        if lrs != self._initial_lrs:
            # In place: for a DeepSpeed file with an optimizer of its own transformers calls this first on a copy of the trainer.
            self._initial_lrs[:] = lrs
            if self.is_world_process_zero():
                logger.warning(self._start_line())
        return self.lr_scheduler

    @property
    def _schedule(self) -> Any:
        """The scheduler without the wrapper that DeepSpeed's comes in."""
        scheduler = self.lr_scheduler
        return scheduler.scheduler if isinstance(scheduler, AcceleratedScheduler) else scheduler

    def _start_line(self) -> str:
        """What training is about to do, for a reader who kept the options of `GRPOTrainer`."""
        args = self.args
        rates = ", ".join(f"{lr:g}" for lr in sorted(set(self._initial_lrs)))
        line = f"{args.prompts_per_step:g} prompts x {args.num_generations} completions per optimizer step, baseline "
        line += f"{args.baseline!r}; learning rate: the schedule (from {rates})"
        if args.lr_adaptation == "none":
            return line + " alone, as in GRPOTrainer."
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
                "The schedule goes on from initial learning rates %s, not the checkpoint's %s.", wanted, loaded
            )

    def create_model_card(self, *args, **kwargs):
        super().create_model_card(*args, **kwargs)
        if self.is_world_process_zero():
            complete_model_card(self.args, self.optimizer, self._baseline_estimator.prior_strength)

    def _algorithm_state(self) -> dict[str, Any]:
        automatic = self._baseline_estimator.automatic
        return super()._algorithm_state() | {
            **{name: getattr(self.args, name) for name in ("baseline", "lr_adaptation", *_AVERAGED_OPTIONS)},
            "gradient_snr": self._gradient_snr.state_dict(),
            "prior_strength": None if automatic is None else automatic.state_dict(),
        }

    def _load_algorithm_state(self, state: dict[str, Any]) -> None:
        args = self.args
        averages = args.lr_adaptation == "snr" or (
            args.baseline == "gradient_weighted" and args.baseline_prior_strength is None
        )
        compared = _AVERAGED_OPTIONS if averages else ()
        for name in ("baseline", "lr_adaptation", *compared):
            if state.get(name) != getattr(self.args, name):
                raise ValueError(
                    f"The checkpoint was written with {name}={state.get(name)!r} but this run has "
                    f"{getattr(self.args, name)!r}. Resume with the former, or start a new run from the checkpoint's weights."
                )
        super()._load_algorithm_state(state)
        self._gradient_snr.load_state_dict(state["gradient_snr"])
        if self._baseline_estimator.automatic is not None and state["prior_strength"] is not None:
            self._baseline_estimator.automatic.load_state_dict(state["prior_strength"])
