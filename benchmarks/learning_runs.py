"""One training run of the learning study: TRL's or our trainer in memory, with a held-out curve and a clock.

Nothing is saved or logged by the trainer. Evaluation leaves torch's random state as it was, so that a run's rollouts do not depend
on how often it is evaluated, and its time is not the run's.
"""

import functools
import hashlib
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from datasets import Dataset, disable_progress_bars
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, TrainerCallback
from transformers.utils import logging as transformers_logging
from trl import GRPOConfig, GRPOTrainer

from benchmarks.completion_pool import answer_batch, kept, sample_completions, sequence_logps
from benchmarks.policies import POLICIES, policy_directory
from oblr_trl import OBLRPOConfig, OBLRPOTrainer, metrics
from oblr_trl.data.prompt_sets import DataArguments, load_prompts

OPTIMIZERS = {"adamw": "adamw_torch", "sgd": "sgd", "lion": "sgd"}  # lion is ours, below
# Prompt i of a task uses seed + i: training prompts of two seeds must not overlap.
SEED_DISTANCE = 1_000_000
# Sampled for each held-out prompt where rewards are graded.
NUM_GRADED = 2


class MeanPriorTrainer(OBLRPOTrainer):
    """Control for the gradient weights: the same baseline with equal ones, a mean that is shrunk towards that of the others."""

    def _grouped_batch(self, *args, **kwargs):
        batch, *scored = super()._grouped_batch(*args, **kwargs)
        batch.weights = torch.ones_like(batch.rewards)
        return batch, *scored


_TRAINERS = {
    "oblrpo": (OBLRPOConfig, OBLRPOTrainer),
    "mean_prior": (OBLRPOConfig, MeanPriorTrainer),
    "grpo": (GRPOConfig, GRPOTrainer),
}
# These studies compare learning rates and baselines of one batch: no memory of prompts, which come again in small tasks.
_FORGETFUL = {"baseline_memory_size": 0}
_BASELINE_ONLY = _FORGETFUL | {"baseline": "gradient_weighted", "lr_adaptation": "none"}
_FIXED_KL = _FORGETFUL | {"lr_adaptation": "trust_region", "snr_min_multiplier": 1.0}
# Trainer, and its options in addition to the study's common settings.
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "oblrpo": ("oblrpo", _FORGETFUL | {"lr_adaptation": "snr"}),
    "baseline_only": ("oblrpo", _BASELINE_ONLY),
    "snr_only": ("oblrpo", {"baseline": "leave_one_out", "lr_adaptation": "snr"}),
    "grpo": ("grpo", {}),
    "dr_grpo": ("grpo", {"loss_type": "dr_grpo", "scale_rewards": "none"}),
    "rloo": ("oblrpo", {"baseline": "leave_one_out", "lr_adaptation": "none"}),
    "opo": ("oblrpo", {"baseline": "length_weighted", "baseline_leave_one_out": False, "lr_adaptation": "none"}),
}
# Of the study of the trust region, with one baseline.
TRUST_REGION_METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "constant": ("oblrpo", _BASELINE_ONLY),
    "linear": ("oblrpo", _BASELINE_ONLY | {"lr_scheduler_type": "linear"}),
    "snr": ("oblrpo", _FORGETFUL | {"lr_adaptation": "snr"}),
    "trust_region": ("oblrpo", _FORGETFUL | {"lr_adaptation": "trust_region"}),
    # The same part of the entropy whatever steps gain: the least that the default takes, and others.
    "minimum": ("oblrpo", _FORGETFUL | {"lr_adaptation": "trust_region", "snr_max_multiplier": 0.05}),
    "fixed_kl_1e-3": ("oblrpo", _FIXED_KL | {"trust_region_kl": 1e-3}),
    "fixed_kl_3e-3": ("oblrpo", _FIXED_KL | {"trust_region_kl": 3e-3}),
    "fixed_kl_1e-2": ("oblrpo", _FIXED_KL | {"trust_region_kl": 1e-2}),
    # The rate falls to 0, and the KL as its square.
    "falling_kl_3e-3": ("oblrpo", _FIXED_KL | {"trust_region_kl": 3e-3, "lr_scheduler_type": "linear"}),
    "falling_kl_1e-2": ("oblrpo", _FIXED_KL | {"trust_region_kl": 1e-2, "lr_scheduler_type": "linear"}),
}
# The trust region with other deltas than its default.
DELTAS = {f"trust_region_{kl:g}": kl for kl in (0.125, 0.5, 1.0)}
TRUST_REGION_METHODS |= {
    name: ("oblrpo", _FORGETFUL | {"lr_adaptation": "trust_region", "trust_region_kl": kl})
    for name, kl in DELTAS.items()
}
# Of the study of small groups, all with the trust region, so that none of them is tuned.
_TRUST_REGION = {"lr_adaptation": "trust_region"}
SMALL_GROUP_METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "ours": ("oblrpo", _TRUST_REGION),
    "ours_all": ("oblrpo", _TRUST_REGION | {"score_scope": "all"}),
    "ours_scaled": ("oblrpo", _TRUST_REGION | {"scale_rewards": "group"}),
    "ours_no_memory": ("oblrpo", _TRUST_REGION | {"baseline_memory_size": 0}),
    "mean_prior": ("mean_prior", _TRUST_REGION),
    "rloo_quarter": ("oblrpo", _TRUST_REGION | {"baseline": "leave_one_out", "score_min_prompts": 2}),
    "rloo_all": ("oblrpo", _TRUST_REGION | {"baseline": "leave_one_out", "score_scope": "all"}),
    "rloo_kl": ("oblrpo", _TRUST_REGION | {"baseline": "leave_one_out"}),
    "grpo_kl": ("oblrpo", _TRUST_REGION | {"baseline": "group_mean", "scale_rewards": "group"}),
}
# The baseline of `oblrpo` under rates that do not follow the SNR.
CONTROLS = {"constant_average": ("oblrpo", _BASELINE_ONLY), "shuffled_multiplier": ("oblrpo", _BASELINE_ONLY)}
ALL_METHODS = METHODS | CONTROLS | TRUST_REGION_METHODS | SMALL_GROUP_METHODS


@dataclass(frozen=True)
class RunSpec:
    """Everything that decides a run's outcome; runs of equal specifications are not repeated."""

    policy: str
    optimizer: str
    method: str
    learning_rate: float  # before any multiplier; constant otherwise
    seed: int  # of the training prompts, of their order and of the rollouts
    num_steps: int = 40
    num_prompts: int = 16
    num_generations: int = 4
    eval_steps: int = 10
    test_size: int = 512
    multipliers: tuple[float, ...] | None = None  # of the learning rate, one per step
    lora_rank: int = 0  # 0 trains all parameters
    temperature: float = 1.0
    precision: str = "float32"  # or "bfloat16 autocast", "bfloat16 weights"
    train_size: int = 0  # prompts that are visited again and again; 0 for as many as the run takes

    @property
    def settings(self) -> dict[str, Any]:
        """The specification as plain values, with the definitions of the names in it."""
        settings = asdict(self) | {"definitions": [asdict(POLICIES[self.policy]), ALL_METHODS[self.method]]}
        return settings | ({"graded": NUM_GRADED} if POLICIES[self.policy].reward == "graded" else {})


@functools.cache
def _prompts(policy: str, seed: int, train_size: int, test_size: int) -> dict[str, Dataset]:
    task, params = POLICIES[policy].task_name, POLICIES[policy].task_params
    sizes = {"train_size": train_size, "test_size": test_size}
    return dict(load_prompts(DataArguments(task=task, task_params=params, train_seed=seed * SEED_DISTANCE, **sizes)))


@torch.no_grad()
def held_out_accuracies(model: Any, batch: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """
    Accuracy of sampling in expectation: the probability of the right answer, given each held-out prompt.

    Sampled accuracy is an estimate of its mean with a standard deviation of 0.03 on 256 prompts, more than the differences
    between methods. Texts other than the reference that the scorer accepts too are not counted.
    """
    training = model.training
    model.eval()
    logps = sequence_logps(model, *batch)
    model.train(training)
    if not logps.isfinite().all():
        raise ValueError("The policy's log-probabilities are not finite.")
    return logps.exp()


@torch.no_grad()
def held_out_reward(model: Any, tokenizer: Any, policy: str, rows: list[dict[str, Any]], *, seed: int) -> float:
    """Mean reward of completions that are sampled for held-out prompts: what a run with graded rewards maximises. Accuracy counts
    completely right answers only, and a policy may give up some of them for a larger mean."""
    settings, training = POLICIES[policy], model.training
    model.eval()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        completions = sample_completions(
            model,
            tokenizer,
            [row["prompt"] for row in rows],
            num_completions=NUM_GRADED,
            max_completion_length=settings.start_model().max_completion_length,
        )
    model.train(training)
    entries = [row["entry"] for row in rows for _ in range(NUM_GRADED)]
    return mean(reward or 0.0 for reward in settings.reward_function()(completions=completions.texts, entry=entries))


class CurveCallback(TrainerCallback):
    """Records accuracy (with graded rewards also the mean reward) and processor seconds at the evaluated steps, and the learning rate of
    every step."""

    def __init__(self, spec: RunSpec, tokenizer: Any, rows: list[dict[str, Any]]) -> None:
        self.spec = spec
        self.tokenizer = tokenizer
        self.rows = rows
        self.held_out = answer_batch(tokenizer, [row["prompt"] for row in rows], [row["solution"] for row in rows])
        self.accuracies: list[float] = []
        self.rewards: list[float] = []  # empty where rewards are right or wrong
        self.pass_at_8: list[float] = []
        self.cpu_seconds: list[float] = []
        self.learning_rates: list[float] = []
        self._seconds = self._started = 0.0

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self._evaluate(model, 0)

    def on_step_begin(self, args, state, control, **kwargs):
        self._started = time.process_time()

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        if self.spec.multipliers is not None:
            for group in optimizer.param_groups:
                group["lr"] = self.spec.learning_rate * self.spec.multipliers[state.global_step]
        self.learning_rates.append(float(optimizer.param_groups[0]["lr"]))

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self._seconds += time.process_time() - self._started
        if state.global_step % self.spec.eval_steps == 0:
            self._evaluate(model, state.global_step)

    def _evaluate(self, model: Any, step: int) -> None:
        self._record(held_out_accuracies(model, self.held_out))
        if POLICIES[self.spec.policy].reward == "graded":
            self.rewards.append(held_out_reward(model, self.tokenizer, self.spec.policy, self.rows, seed=step))

    def _record(self, accuracies: torch.Tensor) -> None:
        self.accuracies.append(accuracies.mean().item())
        self.pass_at_8.append(1 - (1 - accuracies).pow(8).mean().item())
        self.cpu_seconds.append(round(self._seconds, 3))

    def fill(self) -> None:
        """Give the evaluations that a broken run did not reach the accuracy 0 and the last known time."""
        while len(self.accuracies) <= self.spec.num_steps // self.spec.eval_steps:
            self._record(torch.zeros(1))
        self.rewards += [0.0] * (len(self.accuracies) - len(self.rewards)) * bool(self.rewards)


class Lion(torch.optim.Optimizer):
    """Sign of an interpolated momentum ([Lion](https://huggingface.co/papers/2302.06675), Algorithm 2), which transformers has
    for GPUs only."""

    def __init__(self, parameters: Any, lr: float, betas: tuple[float, float] = (0.9, 0.99)) -> None:
        super().__init__(parameters, {"lr": lr, "betas": betas})

    @torch.no_grad()
    def step(self, closure=None):  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                momentum = self.state[parameter].setdefault("momentum", torch.zeros_like(parameter))
                first, second = group["betas"]
                parameter.add_(momentum.lerp(parameter.grad, 1 - first).sign(), alpha=-group["lr"])
                momentum.lerp_(parameter.grad, 1 - second)


def prepare_process() -> None:
    """Settings of a process that trains: one thread (a second one only contends in models of this size), silence."""
    torch.set_num_threads(1)
    disable_progress_bars()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def load_model(spec: RunSpec, dtype: torch.dtype) -> Any:
    """The policy that a run starts from."""
    model: Any = AutoModelForCausalLM.from_pretrained(policy_directory(spec.policy), dtype=dtype)
    if not spec.lora_rank:
        return model
    lora = LoraConfig(r=spec.lora_rank, lora_alpha=2 * spec.lora_rank, target_modules="all-linear")
    return get_peft_model(model, lora)


def _make_trainer(spec: RunSpec, output_dir: str, callback: CurveCallback, train_dataset: Dataset) -> GRPOTrainer:
    policy, directory = POLICIES[spec.policy], policy_directory(spec.policy)
    trainer_name, options = ALL_METHODS[spec.method]
    config_class, trainer_class = _TRAINERS[trainer_name]
    args = config_class(
        output_dir=output_dir,
        max_steps=spec.num_steps,
        per_device_train_batch_size=spec.num_prompts * spec.num_generations,
        num_generations=spec.num_generations,
        max_completion_length=policy.start_model().max_completion_length,
        optim=OPTIMIZERS[spec.optimizer],
        learning_rate=spec.learning_rate,
        temperature=spec.temperature,
        use_cpu=True,
        bf16=spec.precision == "bfloat16 autocast",
        gradient_checkpointing=False,
        seed=spec.seed,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
        logging_steps=spec.num_steps,
        **({"lr_scheduler_type": "constant"} | options),
    )
    model = load_model(spec, torch.bfloat16 if spec.precision == "bfloat16 weights" else torch.float32)
    trainer = trainer_class(
        model=model,
        reward_funcs=policy.reward_function(),
        args=args,
        train_dataset=train_dataset,
        processing_class=AutoTokenizer.from_pretrained(directory),
        callbacks=[callback],
        optimizers=(Lion(model.parameters(), spec.learning_rate) if spec.optimizer == "lion" else None, None),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def prepared_trainer(spec: RunSpec, output_dir: str) -> tuple[GRPOTrainer, CurveCallback]:
    """The trainer of a run, and the callback that records its curve."""
    train_size = spec.train_size or spec.num_steps * spec.num_prompts
    prompts = _prompts(spec.policy, spec.seed, train_size, spec.test_size)
    tokenizer = AutoTokenizer.from_pretrained(policy_directory(spec.policy))
    callback = CurveCallback(spec, tokenizer, list(prompts["test"]))
    return _make_trainer(spec, output_dir, callback, prompts["train"]), callback


def finished_run(directory: str, spec: RunSpec) -> dict[str, Any]:
    """The run of a specification, read from `directory` if it has been made before."""
    digest = hashlib.sha256(repr(spec.settings).encode()).hexdigest()[:16]
    return kept(Path(directory) / f"{spec.policy}-{spec.method}-{digest}.pt", spec.settings, lambda: run(spec))


def divergence(error: Exception) -> str:
    """What a run says whose weights or activations became infinite; any other error is raised again."""
    # torch says "contains either `inf`, `nan`" where it samples, CUDA that an assertion failed, our trainer "not finite" where it scores.
    if not any(sign in str(error) for sign in ("`inf`, `nan`", "device-side assert", "not finite")):
        raise error
    return str(error).splitlines()[0]


def run(spec: RunSpec) -> dict[str, Any]:
    """
    Train as `spec` says and return the curve. A run whose weights or activations become infinite counts as wrong
    on every held-out prompt from there on, with the message as `failure`.
    """
    prepare_process()
    failure = None
    with tempfile.TemporaryDirectory() as output_dir:
        trainer, callback = prepared_trainer(spec, output_dir)
        try:
            trainer.train()
        except (ValueError, RuntimeError) as error:
            failure = divergence(error)
            callback.fill()
    return {
        "spec": asdict(spec),
        "accuracies": callback.accuracies,
        "rewards": callback.rewards,
        "pass_at_8": callback.pass_at_8,
        "cpu_seconds": callback.cpu_seconds,
        "multipliers": [round(rate / spec.learning_rate, 4) for rate in callback.learning_rates],
        # Means over the run, of what our trainer logs.
        "logged": {name: row[name] for row in trainer.state.log_history for name in metrics.METRICS if name in row},
        "failure": failure,
    }
