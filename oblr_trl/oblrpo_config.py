"""GRPOConfig with the options of OBLR-PO. What it cannot honour is in [`~checks.options`]."""

import math
from dataclasses import dataclass, field

from trl import GRPOConfig

from oblr_trl.baselines import BASELINES
from oblr_trl.checks.batches import check_prompts
from oblr_trl.checks.options import LR_ADAPTATIONS, TRUST_REGION_SCOPES, check_options
from oblr_trl.scores.loss_weights import differentiates_sequences
from oblr_trl.scores.scopes import SCOPES
from oblr_trl.scores.score_pass import METHODS

_MEMORY_SIZE = 65536  # prompts: less than 20 MiB on every process, 1.5 MiB in a checkpoint
# Of `lr_adaptation="snr"`, whose multiplier averaged 0.05 to 0.19 in the learning study: TRL's rate or less in effect.
_SNR_LEARNING_RATE = 5e-6


class _SingleGeneration(int):
    """1 that is not below 2: the parent asks for two completions per prompt, and nothing else of what it checks needs them."""

    def __lt__(self, other: object) -> bool:
        return False


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
            paper's formula, `inf` one baseline for the batch. If `None` (default), it is chosen from earlier batches. With
            `num_generations=1`, which TRL refuses, the prior is the whole baseline at any strength above 0.
        baseline_memory_size (`int`, *optional*):
            Number of prompts of which `"gradient_weighted"` remembers the rewards and score norms of earlier visits, as a second
            prior whose strength is chosen from earlier batches (see [`~baselines.PromptMemory`]). The least recently visited
            leave first. Takes effect when a prompt comes back, in the second epoch. Defaults to 65536; to 0, no memory, with
            `baseline_prior_strength=0` (the paper) or `inf`, with other baselines, and where rewards are scaled by a deviation of the batch.
        score_scope (`str`, *optional*, defaults to `"auto"`):
            Parameters whose gradient makes up a score: all trainable ones that the pass can score (`"auto"`; a line at the start
            says which it cannot, and if it can none the output projection stands in for them), `"all"` trainable ones, one that
            cannot be scored being an error, those of the `"last_k"` blocks, or `"lm_head"` (the output projection: forward pass
            only, the cheapest). The baseline is unbiased whatever the scores leave out. `"auto"` also finds out, from earlier
            batches, whether the baseline needs such weights: where those of the output projection, or equal ones, leave about as
            little variance, it takes these, and rho and the movement come from a sample of the prompts (see
            [`~baselines.WeightsChoice`]); so they do from the start with a baseline that has no use for scores.
        score_min_prompts (`int`, *optional*, defaults to `32`):
            Prompts of a generation batch that `score_scope="auto"` scores at least; a quarter of them where that is more.
        score_last_k (`int`, *optional*):
            Number of blocks for `score_scope="last_k"`.
        score_method (`str`, *optional*, defaults to `"sketch"`):
            Where the baseline's weights come from: `"sketch"` (norms of the score sketches) or `"exact"` (exact norms). The
            SNR always comes from sketches.
        score_sketch_dim (`int`, *optional*, defaults to `4096`):
            Length of a sketch. A scope of one wide layer (`"lm_head"`) wants 16384 or more.
        per_device_score_batch_size (`int`, *optional*):
            Completions that the scoring pass takes at once on each process; `per_device_train_batch_size` if `None` (default). It
            changes no number, but time and memory (`oblr-trl plan`): a larger one is meant for models that keep a GPU waiting for its
            host.
        lr_adaptation (`str`, *optional*):
            Defaults to `"trust_region"`; to `"snr"` where scores cover less than 0.9 of the trainable entries, which includes the
            scopes `"last_k"` and `"lm_head"`; and with a warning to `"none"` where the rate cannot be adapted
            (`docs/inherited_options.md`). `"trust_region"`: the rate that moves the policy by KL = `trust_region_kl` x
            max(c^2, rho / 20) x the entropy of a completion per generation batch, c being the correlation of advantages with what the last
            steps did to log-probabilities, found while training; `learning_rate` then only gives parameter groups their ratios, and the schedule its shape (see
            [`~trust_region.TrustRegion`]). `"snr"`: learning rate = schedule x clamp(rho), rho = N SNR / (1 + N SNR)
            ([OBLR-PO](https://huggingface.co/papers/2511.23310), Theorem 4). `"none"`: the schedule alone. With an optimizer
            that decouples weight decay (AdamW), the decay of a step is rate x `weight_decay` and is multiplied too.
        trust_region_kl (`float`, *optional*, defaults to `0.25`):
            delta: movement of the policy per generation batch at c = 1, as a part of the entropy of a completion, for a schedule at
            its initial rate. rho counts for a twentieth of c^2.
        snr_ema_decay (`float`, *optional*, defaults to `0.9`):
            Decay of the moving averages of signal and noise, in [0, 1). 0 is the paper: the current batch alone, whose
            estimated signal is often negative when it is weak. 0.9 remembers about ten batches, and as long holds rho back at the
            start (see [`~gradient_snr.GradientSNR`]).
        snr_min_multiplier (`float`, *optional*, defaults to `0.05`):
            Minimum, in [0, `snr_max_multiplier`], of rho as multiplier with `lr_adaptation="snr"`, and of the root of max(c^2, rho / 20)
            with `"trust_region"`; with `"snr"` also the multiplier while rho is unknown. Above 0, a run whose signal drowns in noise continues slowly instead of
            stopping. 0 is the paper.
        snr_max_multiplier (`float`, *optional*, defaults to `1.0`):
            Maximum of the same.
        reward_timeout (`float`, *optional*):
            Longest time in seconds that a reward function may take for one batch; when it is up, training stops with an error
            on all processes. If `None` (default), it may take indefinitely long, as in TRL. Reward models are not limited.

    > [!NOTE]
    > These parameters have default values different from [`~trl.GRPOConfig`]:
    > - `loss_type`: Defaults to `"dr_grpo"` instead of `"dapo"`: the paper's objective sums over tokens and divides by a
    >   constant.
    > - `scale_rewards`: Defaults to `"none"` instead of `"group"`: the paper's advantage is r - b.
    > - `learning_rate`: Without effect on the size of the steps by default. Defaults to `5e-6` with `lr_adaptation="snr"`: the
    >   multiplier averaged 0.05 to 0.19 in the learning study, which brings the average step back towards GRPO's.
    """

    learning_rate: float = field(  # type: ignore[assignment]
        default=None,
        metadata={
            "help": "The initial learning rate; with lr_adaptation='trust_region' only its ratio between parameter groups counts. "
            "None: 5e-6 with lr_adaptation='snr', TRL's default otherwise."
        },
    )
    loss_type: str = field(
        default="dr_grpo",
        metadata={"help": "Loss type: 'dr_grpo', 'dapo', 'grpo', 'bnpo', 'cispo', 'luspo', 'sapo' or 'vespo'."},
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
    baseline_memory_size: int = field(  # type: ignore[assignment]
        default=None,
        metadata={
            "help": "Number of prompts whose earlier visits the gradient-weighted baseline remembers; 0: none. None: 65536, without "
            "prior 0."
        },
    )
    score_scope: str = field(
        default="auto",
        metadata={
            "help": "Parameters whose gradient makes up a score: 'auto' (all trainable ones that can be scored), 'all', 'last_k' or "
            "'lm_head'.",
            "choices": SCOPES,
        },
    )
    score_min_prompts: int = field(
        default=32,
        metadata={
            "help": "Prompts of a generation batch that score_scope='auto' scores at least where the baseline has cheaper weights; a quarter "
            "of them where that is more."
        },
    )
    score_last_k: int | None = field(default=None, metadata={"help": "Number of blocks for score_scope='last_k'."})
    score_method: str = field(
        default="sketch",
        metadata={"help": "Source of the baseline's weights: 'sketch' or 'exact' norms.", "choices": METHODS},
    )
    score_sketch_dim: int = field(default=4096, metadata={"help": "Length of a score sketch."})
    per_device_score_batch_size: int | None = field(
        default=None,
        metadata={
            "help": "Completions that the scoring pass takes at once. None: per_device_train_batch_size. Changes time and memory alone."
        },
    )
    lr_adaptation: str = field(  # type: ignore[assignment]
        default=None,
        metadata={
            "help": "'trust_region': the rate that moves the policy by KL = trust_region_kl x max(c^2, rho / 20) x entropy per generation batch, c being the "
            "correlation of its steps with the advantages. 'snr': schedule x clamp(rho). 'none': the schedule alone. rho = N SNR / (1 + N SNR). None: 'trust_region', or 'snr' where "
            "scores cover less than 0.9 of the trainable entries, where neither is possible 'none'.",
            "choices": LR_ADAPTATIONS,
        },
    )
    trust_region_kl: float = field(
        default=0.25,
        metadata={
            "help": "Movement of the policy per generation batch at c = 1, as a part of the entropy of a completion."
        },
    )
    snr_ema_decay: float = field(
        default=0.9, metadata={"help": "Decay of the moving averages of signal and noise, in [0, 1). 0 is the paper."}
    )
    snr_min_multiplier: float = field(
        default=0.05,
        metadata={
            "help": "Minimum of rho as multiplier of the learning rate, and of the root of max(c^2, rho / 20). 0 is the paper."
        },
    )
    snr_max_multiplier: float = field(default=1.0, metadata={"help": "Maximum of the same."})
    reward_timeout: float | None = field(
        default=None,
        metadata={"help": "Longest time in seconds that a reward function may take for one batch. None: no limit."},
    )

    def __post_init__(self) -> None:
        self._defaulted = {name for name in ("lr_adaptation", "learning_rate") if getattr(self, name) is None}
        self.default_to("trust_region" if self.score_scope in TRUST_REGION_SCOPES else "snr")
        # The default of another configuration, as `dataclasses.replace` hands it on, counts as unset.
        if self.baseline_memory_size in (None, _MEMORY_SIZE):
            self.baseline_memory_size = _MEMORY_SIZE if self._has_use_for_memory else 0
        single = self.num_generations == 1
        if single:
            self.num_generations = _SingleGeneration(1)
        super().__post_init__()
        if single:
            self.num_generations = 1
        check_options(self)
        check_prompts(self)

    def default_to(self, lr_adaptation: str) -> bool:
        """Let `lr_adaptation` be the default, and `learning_rate` the one that belongs to it, where they were not given; `False` if
        another `lr_adaptation` was."""
        if "lr_adaptation" in self._defaulted:
            self.lr_adaptation = lr_adaptation
        if "learning_rate" in self._defaulted:
            self.learning_rate = _SNR_LEARNING_RATE if self.lr_adaptation == "snr" else GRPOConfig.learning_rate
        return self.lr_adaptation == lr_adaptation

    @property
    def _has_use_for_memory(self) -> bool:
        """Whether a prior of this batch can be mixed with one of earlier ones: finite, and of rewards in their own unit."""
        has_prior = self.baseline == "gradient_weighted" and self.baseline_prior_strength not in (0, math.inf)
        return has_prior and not self.scales_rewards

    @property
    def scales_rewards(self) -> bool:
        """Whether rewards or advantages are divided by a deviation of the batch."""
        return (
            str(self.scale_rewards).lower() not in ("none", "false")
            or self.multi_objective_aggregation != "sum_then_normalize"
        )

    @property
    def needs_scores(self) -> bool:
        """Whether training runs the scoring pass."""
        return self.baseline == "gradient_weighted" or self.lr_adaptation != "none"

    @property
    def score_batch_size(self) -> int:
        """Completions that the scoring pass takes at once on each process."""
        return self.per_device_score_batch_size or self.per_device_train_batch_size

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
    def reuses_old_logps_forward(self) -> bool:
        """Whether the scoring pass takes the place of the parent's forward pass for the old log-probabilities, where there is
        one. vLLM's importance ratio follows from them: one per sequence can be multiplied on afterwards, one per token cannot."""
        assert self.steps_per_generation is not None  # set by the parent
        corrected = self.use_vllm and self.vllm_importance_sampling_correction
        on_policy = self.gradient_accumulation_steps % (self.steps_per_generation * self.num_iterations) == 0
        if on_policy and not corrected:
            return False
        by_token = self.vllm_importance_sampling_mode.startswith("token")
        return (
            not corrected or not by_token or differentiates_sequences(self.loss_type, self.importance_sampling_level)
        )
