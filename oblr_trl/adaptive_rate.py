"""GRPOTrainer whose learning rate follows the gradient's SNR: signal, noise, rho, the movement of the policy, the schedule."""

import logging
import math
import warnings
import zlib
from dataclasses import replace
from typing import Any

import torch
from accelerate.scheduler import AcceleratedScheduler
from torch import Tensor

from oblr_trl import metrics
from oblr_trl.baselines import GroupedBatch
from oblr_trl.checkpoints import ResumableGRPOTrainer
from oblr_trl.checks.adaptation import adapt_if_possible
from oblr_trl.checks.attention import avoid_nan_attention
from oblr_trl.checks.backends import check_backend, check_vocabulary
from oblr_trl.checks.coverage import settle_coverage
from oblr_trl.gradient_snr import GradientSNR, StepGradientSNR, per_prompt_gradients, sampling_variance
from oblr_trl.lr_scheduler import SNRScheduler, check_steerable, check_wrappable, initial_lrs, restore_initial_lrs
from oblr_trl.oblrpo_config import OBLRPOConfig
from oblr_trl.scores.parameters import local_parameter_sketch
from oblr_trl.scores.score_pass import ScorePass
from oblr_trl.trust_region import Movement, TrustRegion

logger = logging.getLogger(__name__)

_TINY = 1e-300  # keeps a rate of 0 from dividing by it
# Losses that TRL divides by the number of tokens of the generation batch, not by a constant.
_DIVIDED_BY_TOKENS = ("dapo", "cispo", "vespo")


class AdaptiveRateGRPOTrainer(ResumableGRPOTrainer):
    """
    [`~trl.GRPOTrainer`] that has a scoring pass and knows how to adapt its learning rate to a batch of scores and advantages. A subclass
    runs the pass and calls `_adapt_learning_rate` before any training step on the batch.
    """

    # Narrower than the parents declare. Without the constructor there is no schedule to multiply.
    model: Any
    lr_scheduler: Any = None
    num_generations: int
    _score_pass: ScorePass | None = None
    _head_pass: ScorePass | None = None  # of the output projection alone
    _sketched = ""  # what the trust region's sketch of the parameters is of

    def __init__(self, model, reward_funcs, args: OBLRPOConfig, *positional, **kwargs):
        self._rho = math.nan  # of the batch at hand
        self._trust_region = TrustRegion(
            args.trust_region_kl, min_correlation=args.snr_min_multiplier, max_correlation=args.snr_max_multiplier
        )
        self._initial_lrs: list[float] = []
        super().__init__(model, reward_funcs, args, *positional, **kwargs)
        check_backend(self)
        check_vocabulary(self.model, self._tokenizer)
        line = avoid_nan_attention(self.model, self.accelerator.device)
        if line is not None and self.is_world_process_zero():
            logger.warning(line)
        if args.needs_scores:
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
            self._head_pass = replace(self._score_pass, scope="lm_head", last_k=None, methods=("sketch",))
            # Layers that cannot be scored fail, or are reported, before any work is done.
            line = settle_coverage(self._score_pass.scoped_parameters(), args)
            if line is not None and self.is_world_process_zero():
                logger.warning(line)
        self._gradient_snr = StepGradientSNR(GradientSNR(decay=args.snr_ema_decay))

    def _adapt_learning_rate(
        self, batch: GroupedBatch, baselines: Tensor, advantages: Tensor, num_tokens: Any, *, share: float
    ) -> None:
        """Signal, noise and rho of the optimizer step at hand, and its learning rate, from a `share` of a batch's prompts."""
        assert self.args.steps_per_generation is not None  # set by the configuration
        sketches = batch.sketches
        assert sketches is not None  # or there is no learning rate to adapt
        # Optimizer steps that share the batch, where above 1.
        steps = self.args.steps_per_generation / self.args.gradient_accumulation_steps
        movement = {}
        if self.args.lr_adaptation == "trust_region":
            num_steps = max(steps * self.num_iterations, 1)
            movement = self._take_in_movement(batch, batch.rewards - baselines, num_steps)
        if self.args.loss_type in _DIVIDED_BY_TOKENS:
            advantages = advantages * (advantages.numel() / share / max(int(num_tokens), 1))
        snr = self._gradient_snr
        self._rho = snr.add(
            per_prompt_gradients(sketches, advantages),
            step=self.state.global_step,
            sampling_variance=share * sampling_variance(sketches, advantages, steps),
            share=share,
        )
        adapts = self.args.lr_adaptation == "snr"
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
                entropy = self._step_entropy(batch)
                rate = self._trust_region.next_rate(self._rho, entropy, schedule.position)
                if not math.isnan(rate):  # or no token could be scored yet
                    self._set_rate(rate)
                values[metrics.ENTROPY] = entropy
                values[metrics.CORRELATION] = self._trust_region.correlation
                values[metrics.KL_TARGET] = self._trust_region.target(self._rho, entropy, schedule.position)
            elif not math.isnan(self._rho):
                schedule.set_rho(self._rho)
            values[metrics.LR_MULTIPLIER] = schedule.multiplier
        # Of several batches of one step the last one's hold: the others were provisional.
        self._log_train_metrics(values, replace=snr.num_batches > 1)

    def _step_entropy(self, batch: GroupedBatch) -> float:
        """Entropy of a completion over all generation batches of the step at hand, in nats: the mean of -log pi of what was sampled.
        `nan` without a completion that counts."""
        assert batch.log_probs is not None
        assert batch.token_weights is not None
        log_probs = batch.log_probs[batch.token_weights > 0].double()
        if self._gradient_snr.num_batches == 1:
            self._nats, self._num_completions = 0.0, 0
        self._nats -= log_probs.sum().item()
        self._num_completions += log_probs.numel()
        return self._nats / self._num_completions if self._num_completions else math.nan

    def _begin_movement(self) -> None:
        """Let the scoring pass measure how far the policy has moved since the last generation batch, from the completions of this one."""
        assert self._score_pass is not None
        region = self._trust_region
        # A sketch says nothing under other projections, or of other parameters: some were frozen or unfrozen, maybe as many as before.
        shapes = self._score_pass.scoped_parameters().shapes
        key = f"parameters {zlib.crc32(repr(shapes).encode())}, {self.args.score_sketch_dim} numbers, seed {self.args.seed}"
        if key != self._sketched:
            self._sketched, region.parameters = key, None
        sketch = local_parameter_sketch(self._score_pass, self.accelerator.device)
        parameters = self.accelerator.reduce(sketch, "sum")
        update = region.update_since(parameters, step=self.state.global_step)
        # The difference does not need float64, and may be as long as an adapter.
        self._score_pass.update = None if update is None else update.float()

    def _take_in_movement(self, batch: GroupedBatch, advantages: Tensor, num_steps: float) -> dict[str, float]:
        """What the scoring pass has measured of the movement."""
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
        token_weights = batch.token_weights[weighted].unsqueeze(1)
        scores = batch.sketches[weighted] / token_weights
        if math.isnan(region.rate) and bool(scores.any()):
            num_trainable = self._score_pass.scoped_parameters().num_trainable
            region.start(scores.square().sum(dim=1).mean().item(), num_trainable, num_steps=num_steps)
        update, self._score_pass.update = self._score_pass.update, None
        movement = Movement()
        if update is not None and batch.products is not None:
            products = batch.products[weighted] / token_weights
            movement = region.observe(update, products, advantages[weighted], position=position)
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
                f"{line} gives shape and ratios; its size is found by moving the policy by KL = {args.trust_region_kl:g} x max(c^2, "
                "rho / 20) x the entropy of a completion per generation batch, c being how well its steps agree with the advantages, whatever "
                "`learning_rate` is; `learning_rate` is logged as applied."
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
        region = self._trust_region
        state = super()._algorithm_state() | {
            "gradient_snr": self._gradient_snr.averages.state_dict(),
            "trust_region": region.state_dict() if self.args.lr_adaptation == "trust_region" else None,
        }
        return state if region.parameters is None else state | {self._sketched: region.parameters.cpu()}

    def _load_algorithm_state(self, state: dict[str, Any]) -> None:
        super()._load_algorithm_state(state)
        self._gradient_snr.averages.load_state_dict(state["gradient_snr"])
        if self.args.lr_adaptation == "trust_region":
            self._trust_region.load_state_dict(state["trust_region"])
        self._sketched = next((name for name in state if name.startswith("parameters")), "")
        self._trust_region.parameters = state.get(self._sketched)
