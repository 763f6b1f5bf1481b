"""GRPOConfig with the options of OBLR-PO, and the refusal of inherited options that OBLR-PO cannot honour."""

import warnings
from dataclasses import dataclass, field

from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames
from trl import GRPOConfig

from oblr_trl.advantages import BASELINES, differentiates_sequences
from oblr_trl.gradient_snr import MIN_PROMPTS
from oblr_trl.scores.scopes import SCOPES
from oblr_trl.scores.score_pass import METHODS

# Losses whose gradient is advantage x a token weight that is known before training, and those for which it is not.
LINEAR_LOSS_TYPES = ("dr_grpo", "dapo", "grpo", "bnpo", "cispo", "luspo")
# Of `lr_adaptation="snr"`, whose multiplier averages about 0.2 in the demo (`make demo` prints it): TRL's rate in effect.
_SNR_LEARNING_RATE = 5e-6


@dataclass
class OBLRPOConfig(GRPOConfig):
    r"""
    Configuration class for the [`OBLRPOTrainer`].

    This class includes only the parameters that are specific to OBLR-PO, and those whose defaults differ from
    [`~trl.GRPOConfig`]. Which inherited parameters are honoured and which are refused is listed in
    `docs/inherited_options.md`.

    Parameters:
        baseline (`str`, *optional*, defaults to `"gradient_weighted"`):
            What is subtracted from a reward. `"gradient_weighted"`: mean of rewards weighted by squared score norms
            ([OBLR-PO](https://huggingface.co/papers/2511.23310), Theorem 7). `"group_mean"`: GRPO; TRL's advantages are left
            untouched. `"leave_one_out"`: RLOO. `"length_weighted"`: OPO.
        baseline_leave_one_out (`bool`, *optional*, defaults to `True`):
            Whether the weighted baselines keep a completion out of its own baseline, as the paper's Assumption 1 asks.
            `False` biases the gradient. `"leave_one_out"` is always, `"group_mean"` never leave-one-out.
        baseline_prior_strength (`float`, *optional*):
            Prior strength of `"gradient_weighted"`, in pseudo-completions drawn from the other prompts of the batch: 0 is the
            paper's formula, `inf` one baseline for the batch. If `None` (default), it is chosen from earlier batches.
        score_scope (`str`, *optional*, defaults to `"all"`):
            Parameters whose gradient makes up a score: `"all"` trainable ones, those of the `"last_k"` blocks, or `"lm_head"`
            (the output projection: forward pass only, the cheapest).
        score_last_k (`int`, *optional*):
            Number of blocks for `score_scope="last_k"`.
        score_method (`str`, *optional*, defaults to `"sketch"`):
            Where the baseline's weights come from: `"sketch"` (norms of the score sketches) or `"exact"` (exact norms). The
            SNR always comes from sketches.
        score_sketch_dim (`int`, *optional*, defaults to `4096`):
            Length of a sketch. A scope of one wide layer (`"lm_head"`) wants 16384 or more.
        lr_adaptation (`str`, *optional*, defaults to `"snr"`):
            `"snr"`: learning rate = schedule x clamp(rho), rho = N SNR / (1 + N SNR)
            ([OBLR-PO](https://huggingface.co/papers/2511.23310), Theorem 4). `"none"`: the schedule alone. With an optimizer
            that decouples weight decay (AdamW), the decay of a step is rate x `weight_decay` and is multiplied too.
        snr_ema_decay (`float`, *optional*, defaults to `0.9`):
            Decay of the moving averages of signal and noise, in [0, 1). 0 is the paper: the current batch alone, whose
            estimated signal is often negative when it is weak. 0.9 remembers about ten batches, and as long holds the
            multiplier back at the start (see [`~gradient_snr.GradientSNR`]).
        snr_min_multiplier (`float`, *optional*, defaults to `0.05`):
            Minimum multiplier of the learning rate, in [0, `snr_max_multiplier`], and its value while rho is unknown. Above 0, a
            run whose signal drowns in noise goes on slowly instead of standing still. 0 is the paper.
        snr_max_multiplier (`float`, *optional*, defaults to `1.0`):
            Maximum multiplier of the learning rate.
        reward_timeout (`float`, *optional*):
            Longest time in seconds that a reward function may take for one batch; when it is up, training stops with an error
            on all processes. If `None` (default), it may take indefinitely long, as in TRL. Reward models are not limited.

    > [!NOTE]
    > These parameters have default values different from [`~trl.GRPOConfig`]:
    > - `loss_type`: Defaults to `"dr_grpo"` instead of `"dapo"`: the paper's objective sums over tokens and divides by a
    >   constant.
    > - `scale_rewards`: Defaults to `"none"` instead of `"group"`: the paper's advantage is r - b.
    > - `learning_rate`: Defaults to `5e-6` with `lr_adaptation="snr"`: the multiplier averages about 0.2 in the demo (`make
    >   demo` prints it), which brings the average step back to GRPO's. With `"none"` it is [`~trl.GRPOConfig`]'s own.
    """

    learning_rate: float = field(  # type: ignore[assignment]
        default=None,
        metadata={
            "help": "The initial learning rate, before the SNR multiplier. None: 5e-6 with lr_adaptation='snr', TRL's default "
            "with 'none'."
        },
    )
    loss_type: str = field(
        default="dr_grpo",
        metadata={
            "help": "Loss aggregation. OBLR-PO supports the types whose gradient is linear in the advantage: 'dr_grpo', "
            "'dapo', 'grpo', 'bnpo', 'cispo' and 'luspo'."
        },
    )
    scale_rewards: str = field(
        default="none",
        metadata={"help": "Whether r - b is divided by a standard deviation of rewards: 'none', 'group' or 'batch'."},
    )
    baseline: str = field(
        default="gradient_weighted",
        metadata={
            "help": "Baseline: 'gradient_weighted' (OBLR-PO), 'group_mean' (GRPO), 'leave_one_out' (RLOO) or "
            "'length_weighted' (OPO).",
            "choices": BASELINES,
        },
    )
    baseline_leave_one_out: bool = field(
        default=True,
        metadata={
            "help": "Whether weighted baselines keep a completion out of its own baseline. False biases the gradient."
        },
    )
    baseline_prior_strength: float | None = field(
        default=None,
        metadata={
            "help": "Prior strength of the gradient-weighted baseline in pseudo-completions; 0 is the paper's formula. None "
            "chooses it from earlier batches."
        },
    )
    score_scope: str = field(
        default="all",
        metadata={
            "help": "Parameters whose gradient makes up a score: 'all', 'last_k' or 'lm_head'.",
            "choices": SCOPES,
        },
    )
    score_last_k: int | None = field(default=None, metadata={"help": "Number of blocks for score_scope='last_k'."})
    score_method: str = field(
        default="sketch",
        metadata={"help": "Source of the baseline's weights: 'sketch' or 'exact' norms.", "choices": METHODS},
    )
    score_sketch_dim: int = field(default=4096, metadata={"help": "Length of a score sketch."})
    lr_adaptation: str = field(
        default="snr",
        metadata={
            "help": "'snr': learning rate = schedule x clamp(N SNR / (1 + N SNR)). 'none': the schedule alone.",
            "choices": ("snr", "none"),
        },
    )
    snr_ema_decay: float = field(
        default=0.9, metadata={"help": "Decay of the moving averages of signal and noise, in [0, 1). 0 is the paper."}
    )
    snr_min_multiplier: float = field(
        default=0.05,
        metadata={
            "help": "Minimum multiplier of the learning rate, and its value while rho is unknown. 0 is the paper."
        },
    )
    snr_max_multiplier: float = field(default=1.0, metadata={"help": "Maximum multiplier of the learning rate."})
    reward_timeout: float | None = field(
        default=None,
        metadata={"help": "Longest time in seconds that a reward function may take for one batch. None: no limit."},
    )

    def __post_init__(self) -> None:
        if self.learning_rate is None:
            self.learning_rate = _SNR_LEARNING_RATE if self.lr_adaptation == "snr" else GRPOConfig.learning_rate
        super().__post_init__()
        self._check_own_fields()
        if self.needs_scores:
            self._refuse_unknown_token_weights()
        if self.baseline != "group_mean" and self.multi_objective_aggregation != "sum_then_normalize":
            _refuse(
                "multi_objective_aggregation",
                self.multi_objective_aggregation,
                "it normalises every reward function by its own group mean, which leaves no reward to take a baseline of",
                "use 'sum_then_normalize', or baseline='group_mean'",
            )
        if self.lr_adaptation == "snr":
            self._refuse_unsteerable_schedules()
        self._check_prompts()

    @property
    def needs_scores(self) -> bool:
        """Whether training runs the scoring pass."""
        return self.baseline == "gradient_weighted" or self.lr_adaptation == "snr"

    @property
    def prompts_per_step(self) -> float:
        """N: different prompts that one optimizer step averages, over all processes."""
        assert self.steps_per_generation is not None  # set by the parent
        assert self.num_generations is not None  # set by the parent
        rows = self.per_device_train_batch_size * self.world_size * self.gradient_accumulation_steps
        # A step that accumulates over several iterations on a batch sees its rows as often.
        repeats = min(self.num_iterations, max(self.gradient_accumulation_steps / self.steps_per_generation, 1))
        return rows / self.num_generations / repeats

    @property
    def corrects_tokens(self) -> bool:
        """Whether vLLM's importance ratio weights the gradients of single tokens."""
        corrected = self.use_vllm and self.vllm_importance_sampling_correction
        by_token = self.vllm_importance_sampling_mode.startswith("token")
        return corrected and by_token and not differentiates_sequences(self.loss_type, self.importance_sampling_level)

    @property
    def scores_ride(self) -> bool:
        """Whether the scoring pass takes the place of the parent's forward pass for the old log-probabilities, where there is
        one. The importance ratio follows from them: one per sequence can be multiplied on afterwards."""
        assert self.steps_per_generation is not None  # set by the parent
        on_policy = self.gradient_accumulation_steps % (self.steps_per_generation * self.num_iterations) == 0
        if on_policy and not (self.use_vllm and self.vllm_importance_sampling_correction):
            return False
        return not self.corrects_tokens

    def _check_own_fields(self) -> None:
        for name, choices in (
            ("baseline", BASELINES),
            ("score_scope", SCOPES),
            ("score_method", METHODS),
            ("lr_adaptation", ("snr", "none")),
        ):
            if getattr(self, name) not in choices:
                _refuse(name, getattr(self, name), "it is not known", f"use one of {list(choices)}")
        if self.baseline == "leave_one_out" and not self.baseline_leave_one_out:
            _refuse("baseline_leave_one_out", False, "it contradicts baseline='leave_one_out'", "use 'group_mean'")
        strength = self.baseline_prior_strength
        if strength is not None and self.baseline != "gradient_weighted":
            _refuse("baseline_prior_strength", strength, "only 'gradient_weighted' has a prior", "leave it unset")
        if strength is not None and not strength >= 0:
            _refuse("baseline_prior_strength", strength, "it counts completions", "use a number of at least 0")
        if self.baseline == "gradient_weighted" and strength != 0 and self.scale_rewards == "group":
            _refuse(
                "scale_rewards",
                "group",
                "with a prior b is not the mean of a group of equal rewards, whose deviation of 0 would divide the difference",
                "use 'none' (the default) or 'batch', or baseline_prior_strength=0",
            )
        if (self.score_scope == "last_k") != (self.score_last_k is not None):
            _refuse(
                "score_last_k",
                self.score_last_k,
                f"score_scope is {self.score_scope!r}",
                "set it together with score_scope='last_k', and only then",
            )
        if self.score_last_k is not None and self.score_last_k < 1:
            _refuse("score_last_k", self.score_last_k, "it counts blocks", "use at least 1")
        if self.score_sketch_dim < 1:
            _refuse("score_sketch_dim", self.score_sketch_dim, "it is a length", "use at least 1")
        if not 0 <= self.snr_ema_decay < 1:
            _refuse("snr_ema_decay", self.snr_ema_decay, "it is a decay", "use a number in [0, 1)")
        if not 0 <= self.snr_min_multiplier <= self.snr_max_multiplier:
            _refuse(
                "snr_min_multiplier",
                self.snr_min_multiplier,
                f"it must lie between 0 and snr_max_multiplier ({self.snr_max_multiplier})",
                "lower it, or raise snr_max_multiplier",
            )
        if self.reward_timeout is not None and not self.reward_timeout > 0:
            _refuse("reward_timeout", self.reward_timeout, "it is a time in seconds", "use a positive number, or None")

    def _check_prompts(self) -> None:
        """The SNR compares the prompts of a step, and the prior the prompts of a generation batch."""
        assert self.generation_batch_size is not None  # set by the parent
        assert self.num_generations is not None
        per_step, per_batch = self.prompts_per_step, self.generation_batch_size / self.num_generations
        adapts = self.lr_adaptation == "snr"
        has_prior = self.baseline == "gradient_weighted" and self.baseline_prior_strength != 0
        batch = (
            f"an optimizer step has {per_step:g} prompt{'' if per_step == 1 else 's'} x {self.num_generations} completions "
            f"(per_device_train_batch_size={self.per_device_train_batch_size} x {self.world_size} process(es) x "
            f"gradient_accumulation_steps={self.gradient_accumulation_steps}, num_iterations={self.num_iterations})"
        )
        remedy = f"raise gradient_accumulation_steps, with {MIN_PROMPTS} prompts or more per step as the aim, or lower num_generations"
        if adapts and max(per_step, per_batch) < 2:
            _refuse(
                "lr_adaptation",
                "snr",
                f"{batch}, and the noise of a gradient shows only between prompts",
                f"{remedy}, or set lr_adaptation='none'",
            )
        if has_prior and per_batch < 2:
            if self.baseline_prior_strength is not None:
                _refuse(
                    "baseline_prior_strength",
                    self.baseline_prior_strength,
                    f"a generation batch has {per_batch:g} prompt, and a prior comes from the other ones",
                    "raise per_device_train_batch_size or steps_per_generation, or set it to 0",
                )
            warnings.warn(
                f"The baseline has no prior: a generation batch has {per_batch:g} prompt, and {batch}. Remedy: {remedy}."
            )
        if adapts and max(per_step, per_batch) < MIN_PROMPTS:
            warnings.warn(f"rho will be mostly noise: {batch}. Remedy: {remedy}, or set lr_adaptation='none'.")

    def _refuse_unknown_token_weights(self) -> None:
        """The scoring pass must know, before training, what the loss will multiply each token's gradient by."""
        assert self.steps_per_generation is not None  # set by the parent
        if self.loss_type not in LINEAR_LOSS_TYPES:
            _refuse(
                "loss_type",
                self.loss_type,
                "its gradient is not linear in the advantage (or it is unknown), so no baseline minimises its variance",
                f"use one of {list(LINEAR_LOSS_TYPES)}",
            )
        if self.loss_type == "bnpo" and self.steps_per_generation > 1:
            _refuse(
                "loss_type",
                self.loss_type,
                "it divides by the token count of micro-batches that are drawn only after scoring",
                "use 'dapo', which divides by the whole batch's count, or steps_per_generation=1",
            )
        if self.top_entropy_quantile < 1.0:
            _refuse(
                "top_entropy_quantile",
                self.top_entropy_quantile,
                "it drops tokens by a quantile of micro-batches that are drawn only after scoring",
                "set it to 1.0",
            )
        if self.off_policy_mask_threshold is not None:
            _refuse(
                "off_policy_mask_threshold",
                self.off_policy_mask_threshold,
                "it drops completions by the sign of their advantage, which biases any baseline",
                "leave it unset",
            )
        if self.use_liger_kernel:
            _refuse(
                "use_liger_kernel",
                True,
                "its fused layers hide inputs and output gradients from the scoring pass",
                "set it to False; model_init_kwargs={'use_kernels': True} keeps the layers",
            )

    def _refuse_unsteerable_schedules(self) -> None:
        if self.lr_scheduler_type in ("reduce_lr_on_plateau", "greedy"):
            _refuse(
                "lr_scheduler_type",
                SchedulerType(self.lr_scheduler_type).value,
                "it sets the learning rate from an evaluation metric, which the SNR multiplier would overwrite",
                "use a schedule of steps, or lr_adaptation='none'",
            )
        optimizer = OptimizerNames(self.optim).value
        if "layerwise" in optimizer or "lomo" in optimizer:
            _refuse(
                "optim",
                optimizer,
                "it steps inside the backward pass without parameter groups whose learning rate could be set",
                "use another optimizer, or lr_adaptation='none'",
            )
        assert self.steps_per_generation is not None  # set by the parent
        steps, accumulation = self.steps_per_generation, self.gradient_accumulation_steps
        passes = steps * self.num_iterations
        if not (steps % accumulation and accumulation % steps) and passes % accumulation and accumulation % passes:
            _refuse(
                "num_iterations",
                self.num_iterations,
                f"a batch lasts for {passes} micro-batches, so that optimizer steps of {accumulation} would straddle two of them",
                "make one of steps_per_generation x num_iterations and gradient_accumulation_steps a multiple of the other",
            )
        if steps % accumulation and accumulation % steps:
            _refuse(
                "steps_per_generation",
                steps,
                f"optimizer steps of {accumulation} micro-batches would straddle generation batches, so that no batch's SNR "
                "would be that of the step",
                "make one of steps_per_generation and gradient_accumulation_steps a multiple of the other",
            )


def _refuse(name: str, value: object, reason: str, remedy: str) -> None:
    raise ValueError(f"OBLR-PO cannot honour {name}={value!r}: {reason}. Remedy: {remedy}.")
