"""GRPOTrainer whose advantages come from a gradient-weighted baseline and whose learning rate follows the gradient's SNR."""

import logging
import math
import textwrap
from typing import Any

import torch
from torch import Tensor
from trl.trainer.utils import get_config_model_id, nanstd

from oblr_trl import metrics
from oblr_trl.adaptive_rate import AdaptiveRateGRPOTrainer
from oblr_trl.baselines import (
    SCALE_EPSILON,
    BaselineEstimator,
    GroupedBatch,
    normalized_rewards,
    prompt_key,
    scaled_advantages,
    summed_rewards,
)
from oblr_trl.baselines.weights_choice import ALL
from oblr_trl.checkpoints import add_method_settings, check_same_options
from oblr_trl.checks.batches import check_dataset, check_scores
from oblr_trl.checks.processes import raise_everywhere
from oblr_trl.checks.reward_functions import RewardFunctions
from oblr_trl.gradient_snr import MIN_PROMPTS
from oblr_trl.oblrpo_config import OBLRPOConfig
from oblr_trl.scores.completion_scorer import CompletionScorer

logger = logging.getLogger(__name__)

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


class OBLRPOTrainer(AdaptiveRateGRPOTrainer):
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
    - the constant of the learning rate is measured, and so is c^2, the SNR of the step that is made: it moves the policy by
      `trust_region_kl` x max(c^2, rho / 20) x its entropy (`lr_adaptation="snr"` multiplies `learning_rate` by rho instead);
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
    train_dataset: Any
    _logs: dict[str, Any]

    # Without the constructor, as tests of a plug-in may make one, it is a `GRPOTrainer`.
    _baseline_estimator: Any = None
    _errors_of_rewards: RewardFunctions | None = None
    _scorer: CompletionScorer | None = None  # while a batch is generated

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
            # The formula of the paper is what 0 asks for.
            chooses_weights=args.score_scope == "auto" and args.baseline_prior_strength != 0,
        )
        self._rewards_per_func: Tensor | None = None
        super().__init__(model, reward_funcs, args, *positional, **kwargs)
        self._errors_of_rewards = RewardFunctions(args.reward_timeout)
        self.reward_funcs = [self._errors_of_rewards.wrap(reward_func) for reward_func in self.reward_funcs]

    # Groups are intact here and nowhere later: `_prepare_inputs` shuffles the rows of what this returns.
    def _generate_and_score_completions(self, inputs):
        estimator = self._baseline_estimator
        as_parent = estimator is None or (estimator.baseline == "group_mean" and self._score_pass is None)
        if as_parent or not self.model.training:
            return super()._generate_and_score_completions(inputs)
        if self.args.lr_adaptation == "trust_region":
            self._begin_movement()
        if self._score_pass is not None:
            self._scorer = CompletionScorer(
                self.model,
                self._score_pass,
                self.args,
                self.accelerator,
                masks_later=bool(self.tools) or self.rollout_func is not None,  # by a tool mask
                num_rows=len(inputs),
                weights=ALL if self._is_vlm else estimator.weights,  # images do not come by rows
                head_pass=self._head_pass,
            )
        try:
            output = super()._generate_and_score_completions(inputs)
        finally:
            scorer, self._scorer = self._scorer, None

        batch, scored, prompts = self._grouped_batch(inputs, output, scorer)
        baselines = estimator(batch)
        advantages = self._advantages(output, batch.rewards, baselines)
        values = {
            metrics.PRIOR_STRENGTH: estimator.prior_strength,
            metrics.MEMORY_STRENGTH: estimator.memory_strength,
            metrics.REMEMBERED_FRACTION: estimator.remembered_fraction(batch),
            **metrics.baseline_metrics(batch, baselines),
        }
        if scorer is not None:
            share, tokens = len(scored.rewards) / len(batch.rewards), output["num_items_in_batch"]
            self._adapt_learning_rate(scored, baselines[prompts], advantages[prompts], tokens, share=share)
            values |= {metrics.PASS_TIME: scorer.seconds, metrics.SCORED_FRACTION: share}
            values |= metrics.score_metrics(scored, baselines[prompts])
            line = estimator.compare_weights(scored)
            if line is not None and len(batch.rewards) > self.args.score_min_prompts and self.is_world_process_zero():
                logger.warning(line)
            values |= metrics.weights_metrics(estimator.weights_choice.gains)
        self._log_train_metrics(values)
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
        if self._scorer is not None:
            replaced, model = model, self._scorer.in_place_of(model, attention_mask[:, -logits_to_keep:])
            if model is not replaced:
                kwargs["batch_size"] = self.args.score_batch_size
        return super()._get_per_token_logps_and_entropies(
            model, input_ids, attention_mask, logits_to_keep, *args, **kwargs
        )

    def _grouped_batch(
        self, inputs: list[dict[str, Any]], output: dict[str, Any], scorer: CompletionScorer | None
    ) -> tuple[GroupedBatch, GroupedBatch, Tensor | None]:
        """The batch of all processes, one row per prompt; those prompts of it that were scored, with their scores; and their indices."""
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
        if self._baseline_estimator.memory is not None:
            keys = torch.tensor([prompt_key(row.get("prompt")) for row in inputs], device=rewards.device)
            batch.prompt_keys = self.accelerator.gather(keys)[:: self.num_generations]
        if scorer is None:
            return batch, batch, None
        scored, prompts = scorer.score(batch, output, loss_mask, self._get_per_token_logps_and_entropies)
        assert batch.weights is not None
        assert scored.sketches is not None
        finite = batch.weights.isfinite()
        finite[prompts] &= scored.sketches.isfinite().all(dim=2)
        check_scores(finite.view(self.accelerator.num_processes, -1).all(dim=1).tolist(), self.state.global_step)
        return batch, scored, prompts

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

    def _get_train_sampler(self, dataset=None):
        check_dataset(self.args, len(self.train_dataset if dataset is None else dataset))
        return super()._get_train_sampler(dataset)

    def _algorithm_state(self) -> dict[str, Any]:
        estimator = self._baseline_estimator
        return super()._algorithm_state() | {
            **{name: getattr(self.args, name) for name in ("baseline", "lr_adaptation", *_AVERAGED_OPTIONS)},
            "prior_strength": estimator.state_dict(),
            "weights_choice": estimator.weights_choice.state_dict(),
            **({} if estimator.memory is None else estimator.memory.state_dict()),
        }

    def _load_algorithm_state(self, state: dict[str, Any]) -> None:
        args, estimator = self.args, self._baseline_estimator
        chooses_prior = args.baseline == "gradient_weighted" and estimator.automatic is not None
        averages = args.lr_adaptation != "none" or chooses_prior
        check_same_options(state, args, ("baseline", "lr_adaptation", *(_AVERAGED_OPTIONS if averages else ())))
        super()._load_algorithm_state(state)
        estimator.load_state_dict(state["prior_strength"])
        if "weights_choice" in state:
            estimator.weights_choice.load_state_dict(state["weights_choice"])
        if estimator.memory is not None and "keys" in state:
            estimator.memory.load_state_dict(state)

    def create_model_card(self, *args, **kwargs):
        super().create_model_card(*args, **kwargs)
        if self.is_world_process_zero():
            lrs = self._initial_lrs or [self.args.learning_rate]
            add_method_settings(self.args, self._baseline_estimator.prior_strength, lrs)
