"""One training run of the learning study: TRL's or our trainer from a start policy, in memory, with a held-out curve and a clock.

Nothing is saved or logged by the trainer. Evaluation draws no random numbers, so that a run's rollouts do not depend on how often
it is evaluated, and its time is not the run's.
"""

import functools
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from datasets import Dataset, disable_progress_bars
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, TrainerCallback
from transformers.utils import logging as transformers_logging
from trl import GRPOConfig, GRPOTrainer

from benchmarks.policies import POLICIES, policy_directory
from oblr_trl import OBLRPOConfig, OBLRPOTrainer
from oblr_trl.data.prompt_sets import DataArguments, load_prompts
from oblr_trl.data.rewards import task_reward

OPTIMIZERS = {"adamw": "adamw_torch", "sgd": "sgd"}
# Prompt i of a task uses seed + i: training prompts of two seeds must not overlap.
SEED_DISTANCE = 1_000_000
# A step's averages that are kept of TRL's log, where a method logs them.
LOGGED = ("reward", "grad_norm", "entropy", "gradient_snr/rho", "variance_ratio/leave_one_out")


@dataclass(frozen=True)
class Method:
    """A trainer (`"oblrpo"` or `"grpo"`) and what it is told beside the study's common settings."""

    trainer: str
    options: dict[str, Any] = field(default_factory=dict)


_BASELINE_ONLY = {"baseline": "gradient_weighted", "lr_adaptation": "none"}
METHODS = {
    "oblrpo": Method("oblrpo"),
    "baseline_only": Method("oblrpo", _BASELINE_ONLY),
    "snr_only": Method("oblrpo", {"baseline": "leave_one_out", "lr_adaptation": "snr"}),
    "grpo": Method("grpo"),
    "dr_grpo": Method("grpo", {"loss_type": "dr_grpo", "scale_rewards": "none"}),
    "rloo": Method("oblrpo", {"baseline": "leave_one_out", "lr_adaptation": "none"}),
    "opo": Method("oblrpo", {"baseline": "length_weighted", "baseline_leave_one_out": False, "lr_adaptation": "none"}),
}
# The baseline of `oblrpo` under rates that do not follow the SNR.
CONTROLS = {
    "constant_average": Method("oblrpo", _BASELINE_ONLY),
    "shuffled_multiplier": Method("oblrpo", _BASELINE_ONLY),
}


@dataclass(frozen=True)
class RunSpec:
    """
    Everything that decides a run's outcome; runs of equal specifications are not repeated.

    Args:
        policy (`str`): Name of the start policy in `benchmarks.policies`.
        optimizer (`str`): A key of `OPTIMIZERS`.
        method (`str`): A key of `METHODS` or `CONTROLS`.
        learning_rate (`float`): Rate before any multiplier; constant otherwise.
        seed (`int`): Seed of the training prompts, of their order and of the rollouts.
        num_steps (`int`, *optional*, defaults to `40`): Optimizer steps.
        num_prompts (`int`, *optional*, defaults to `16`): Prompts per step.
        num_generations (`int`, *optional*, defaults to `4`): Completions per prompt.
        eval_steps (`int`, *optional*, defaults to `10`): Steps between evaluations.
        test_size (`int`, *optional*, defaults to `512`): Held-out prompts, the same for all runs of a policy.
        multipliers (`tuple[float]`, *optional*): Factors on the learning rate, one per step, in place of a constant.
    """

    policy: str
    optimizer: str
    method: str
    learning_rate: float
    seed: int
    num_steps: int = 40
    num_prompts: int = 16
    num_generations: int = 4
    eval_steps: int = 10
    test_size: int = 512
    multipliers: tuple[float, ...] | None = None

    @property
    def key(self) -> str:
        """The specification as text, with what the names in it stand for."""
        settings = asdict(self)
        settings["definitions"] = [asdict(POLICIES[self.policy]), asdict((METHODS | CONTROLS)[self.method])]
        return json.dumps(settings, sort_keys=True)


@functools.cache
def _prompts(policy: str, seed: int, train_size: int, test_size: int) -> dict[str, Dataset]:
    data = DataArguments(
        task=POLICIES[policy].task,
        task_params=POLICIES[policy].task_params,
        train_size=train_size,
        train_seed=seed * SEED_DISTANCE,
        test_size=test_size,
    )
    return dict(load_prompts(data))


def reward_of(policy: str) -> Callable[..., list[float | None]]:
    """The task's scorer, or for a policy of binary rewards 1 where it gives its full score and 0 elsewhere."""
    score = task_reward(POLICIES[policy].task, POLICIES[policy].task_params)
    if POLICIES[policy].reward == "graded":
        return score

    def reward(**kwargs: Any) -> list[float | None]:
        return [float(value is not None and value >= 1) for value in score(**kwargs)]

    return reward


class HeldOut:
    """
    Accuracy that sampling has in expectation: the mean probability of the right answer, given each held-out prompt.

    Sampled accuracy is an estimate of it with a standard deviation of 0.03 on 256 prompts, more than what methods differ by. Texts
    other than the reference that the scorer accepts too are not counted.
    """

    def __init__(self, prompts: Dataset, tokenizer: Any) -> None:
        eos = tokenizer.eos_token
        questions = tokenizer(list(prompts["prompt"]), return_token_type_ids=False)["input_ids"]
        texts = [
            question + answer + eos for question, answer in zip(prompts["prompt"], prompts["solution"], strict=True)
        ]
        self._batch = tokenizer(texts, return_tensors="pt", padding=True, return_token_type_ids=False)
        ids = self._batch["input_ids"]
        # Padding is on the left: the answer and its end are what exceeds the question's own tokens.
        lengths = self._batch["attention_mask"].sum(dim=1) - torch.tensor([len(question) for question in questions])
        self._longest = int(lengths.max())
        self._mask = torch.arange(self._longest) >= self._longest - lengths.unsqueeze(1)
        self._targets = ids[:, -self._longest :]

    @torch.no_grad()
    def __call__(self, model: Any) -> float:
        training = model.training
        model.eval()
        logits = model(**self._batch, logits_to_keep=self._longest + 1).logits[:, :-1]
        model.train(training)
        if not logits.isfinite().all():
            raise ValueError("The policy's logits are not finite.")
        logps = logits.log_softmax(dim=-1).gather(2, self._targets.unsqueeze(2)).squeeze(2)
        return (logps * self._mask).sum(dim=1).exp().mean().item()


class CurveCallback(TrainerCallback):
    """Records accuracy and training time at the evaluated steps, and the learning rate that every step was taken with."""

    def __init__(self, spec: RunSpec, held_out: HeldOut) -> None:
        self.spec = spec
        self.held_out = held_out
        self.steps: list[int] = []
        self.accuracies: list[float] = []
        self.wall_seconds: list[float] = []
        self.cpu_seconds: list[float] = []
        self.learning_rates: list[float] = []
        self._wall = self._cpu = 0.0
        self._started = (0.0, 0.0)

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self._evaluate(0, model)

    def on_step_begin(self, args, state, control, **kwargs):
        self._started = (time.perf_counter(), time.process_time())

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        if self.spec.multipliers is not None:
            for group in optimizer.param_groups:
                group["lr"] = self.spec.learning_rate * self.spec.multipliers[state.global_step]
        self.learning_rates.append(float(optimizer.param_groups[0]["lr"]))

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self._wall += time.perf_counter() - self._started[0]
        self._cpu += time.process_time() - self._started[1]
        if state.global_step % self.spec.eval_steps == 0:
            self._evaluate(state.global_step, model)

    def _evaluate(self, step: int, model: Any) -> None:
        accuracy = self.held_out(model)  # may raise, where weights are infinite: before anything is appended
        self.steps.append(step)
        self.accuracies.append(accuracy)
        self.wall_seconds.append(self._wall)
        self.cpu_seconds.append(self._cpu)

    def fill(self) -> None:
        """Give the evaluations that a run did not live to see the accuracy 0 and the last known time."""
        for step in range(len(self.steps) * self.spec.eval_steps, self.spec.num_steps + 1, self.spec.eval_steps):
            self.steps.append(step)
            self.accuracies.append(0.0)
            self.wall_seconds.append(self._wall)
            self.cpu_seconds.append(self._cpu)


def prepare_process() -> None:
    """Settings of a process that trains: one thread (a second one only contends in models of this size), silence."""
    torch.set_num_threads(1)
    disable_progress_bars()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def _make_trainer(spec: RunSpec, output_dir: str, callback: CurveCallback, model: Any, tokenizer: Any) -> GRPOTrainer:
    method = (METHODS | CONTROLS)[spec.method]
    config_class, trainer_class = {"oblrpo": (OBLRPOConfig, OBLRPOTrainer), "grpo": (GRPOConfig, GRPOTrainer)}[
        method.trainer
    ]
    train_size = spec.num_steps * spec.num_prompts
    args = config_class(
        output_dir=output_dir,
        max_steps=spec.num_steps,
        per_device_train_batch_size=spec.num_prompts * spec.num_generations,
        num_generations=spec.num_generations,
        max_completion_length=POLICIES[spec.policy].max_completion_length,
        optim=OPTIMIZERS[spec.optimizer],
        learning_rate=spec.learning_rate,
        lr_scheduler_type="constant",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        seed=spec.seed,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
        logging_steps=spec.num_steps,
        **method.options,
    )
    trainer = trainer_class(
        model=model,
        reward_funcs=reward_of(spec.policy),
        args=args,
        train_dataset=_prompts(spec.policy, spec.seed, train_size, spec.test_size)["train"],
        processing_class=tokenizer,
        callbacks=[callback],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def run(spec: RunSpec) -> dict[str, Any]:
    """
    Train as `spec` says and return the curve. A run whose weights or activations become infinite counts as wrong on every
    held-out prompt from there on, with the message as `failure`.
    """
    prepare_process()
    directory = policy_directory(spec.policy)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    held_out = _prompts(spec.policy, spec.seed, spec.num_steps * spec.num_prompts, spec.test_size)["test"]
    callback = CurveCallback(spec, HeldOut(held_out, tokenizer))
    failure = None
    with tempfile.TemporaryDirectory() as output_dir:
        trainer = _make_trainer(spec, output_dir, callback, model, tokenizer)
        try:
            trainer.train()
        except (ValueError, RuntimeError) as error:
            # torch says "contains either `inf`, `nan`" where it samples, our trainer "not finite" where it scores.
            if not any(sign in str(error) for sign in ("`inf`, `nan`", "not finite")):
                raise
            failure = str(error)
            callback.fill()
    logged = next((row for row in reversed(trainer.state.log_history) if "reward" in row), {})
    return {
        "key": spec.key,
        "spec": asdict(spec),
        "steps": callback.steps,
        "accuracies": callback.accuracies,
        "wall_seconds": [round(seconds, 3) for seconds in callback.wall_seconds],
        "cpu_seconds": [round(seconds, 3) for seconds in callback.cpu_seconds],
        "multipliers": [round(rate / spec.learning_rate, 4) for rate in callback.learning_rates],
        "logged": {name: logged[name] for name in LOGGED if name in logged},
        "failure": failure,
    }
