"""One training run on SmolLM2-135M-Instruct: TRL's or our trainer in memory, with a held-out curve and a clock.

All parameters are trained, in bfloat16 autocast if not told otherwise. Held-out prompts are answered at temperature 1 and with random
numbers of their own, in one batch.
"""

import hashlib
import math
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from benchmarks.completion_pool import kept
from benchmarks.learning_runs import SEED_DISTANCE, divergence, prepare_process
from benchmarks.record import machine
from examples.smollm2.__main__ import ARITHMETIC, DIRECTORY, LISTS
from examples.smollm2.rewards import answer_reward, list_reward
from oblr_trl import OBLRPOConfig, OBLRPOTrainer, metrics
from oblr_trl.checks.attention import avoid_nan_attention
from oblr_trl.data.prompt_sets import DataArguments, load_prompts


@dataclass(frozen=True)
class Task:
    """Prompts with a verifiable reward."""

    data: dict[str, Any]  # of `DataArguments`
    reward: Callable[..., list[float]]
    max_completion_length: int = 16


TASKS = {
    "arithmetic": Task(
        {"dataset_name": str(ARITHMETIC), "conversational": True}, answer_reward, max_completion_length=24
    ),
    "lists": Task({"dataset_name": str(LISTS), "conversational": True}, list_reward, max_completion_length=48),
}
METHODS: dict[str, tuple[type[GRPOConfig], type[GRPOTrainer], dict[str, Any]]] = {
    "ours": (OBLRPOConfig, OBLRPOTrainer, {}),
    "rloo": (OBLRPOConfig, OBLRPOTrainer, {"baseline": "leave_one_out", "lr_adaptation": "none"}),
    "grpo": (GRPOConfig, GRPOTrainer, {}),
    # Controls: OBLR-PO's baseline at a constant rate, and GRPO's advantages with its trust region.
    "constant": (OBLRPOConfig, OBLRPOTrainer, {"lr_adaptation": "none"}),
    "grpo_kl": (OBLRPOConfig, OBLRPOTrainer, {"baseline": "group_mean", "scale_rewards": "group"}),
}
# A probability that is none is sampled as 0 instead of failing an assertion on the GPU, which ends every process that shares it by MPS.
_GENERATION = {"remove_invalid_values": True}
_GRAD_NORM = "grad_norm"
# What is kept of every step's log.
_LOGGED = (
    "reward",
    "learning_rate",
    _GRAD_NORM,
    "entropy",
    metrics.RHO,
    metrics.KL,
    metrics.KL_TARGET,
    metrics.PRIOR_STRENGTH,
)


@dataclass(frozen=True)
class PretrainedSpec:
    """Everything that decides a run's outcome on a machine; runs of equal specifications are not repeated."""

    task: str
    method: str
    num_prompts: int
    num_generations: int
    seed: int
    learning_rate: float = 1e-6  # TRL's default, without a meaning under the trust region
    num_steps: int = 60
    eval_steps: int = 10
    test_size: int = 128
    num_completions: int = 4  # of each held-out prompt
    trust_region_kl: float | None = None  # that of OBLRPOConfig
    lora_rank: int = 0  # 0 trains all parameters
    bf16: bool = True


class HeldOutCallback(TrainerCallback):
    """Mean reward of held-out prompts at the evaluated steps, and the seconds of every step."""

    def __init__(self, spec: PretrainedSpec, tokenizer: Any, rows: list[dict[str, Any]]) -> None:
        self.spec = spec
        self.tokenizer = tokenizer
        self.rewards: list[float] = []
        self.seconds: list[float] = []
        rows = [row for row in rows for _ in range(spec.num_completions)]
        self._columns = {name: [row[name] for row in rows] for name in rows[0] if name != "prompt"}
        prompts = [row["prompt"] for row in rows]
        texts = [tokenizer.apply_chat_template(p, add_generation_prompt=True, tokenize=False) for p in prompts]
        self._batch = tokenizer(
            texts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False
        )
        self._started = 0.0

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self._evaluate(model)

    def on_step_begin(self, args, state, control, **kwargs):
        self._started = time.perf_counter()

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.seconds.append(round(time.perf_counter() - self._started, 3))
        if state.global_step % self.spec.eval_steps == 0:
            self._evaluate(model)

    def fill(self) -> None:
        """Give the evaluations that a broken run did not reach a reward of 0."""
        self.rewards += [0.0] * (self.spec.num_steps // self.spec.eval_steps + 1 - len(self.rewards))

    @torch.no_grad()
    def _evaluate(self, model: Any) -> None:
        batch = self._batch.to(model.device)
        devices = [model.device] if model.device.type == "cuda" else []
        training = model.training
        model.eval()
        with torch.random.fork_rng(devices):
            torch.manual_seed(0)
            ids = model.generate(
                **batch,
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                max_new_tokens=TASKS[self.spec.task].max_completion_length,
                pad_token_id=self.tokenizer.pad_token_id,
                eos_token_id=self.tokenizer.eos_token_id,
                **_GENERATION,
            )[:, batch["input_ids"].size(1) :]
        model.train(training)
        texts = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
        self.rewards.append(round(mean(TASKS[self.spec.task].reward(completions=texts, **self._columns)), 4))


def prepared_trainer(spec: PretrainedSpec, output_dir: str) -> tuple[GRPOTrainer, HeldOutCallback]:
    """The trainer of a run, and the callback that records its curve."""
    task = TASKS[spec.task]
    sizes: dict[str, Any] = {"test_size": spec.test_size, "train_seed": spec.seed * SEED_DISTANCE}
    if "task" in task.data:
        sizes["train_size"] = spec.num_steps * spec.num_prompts
    prompts = load_prompts(DataArguments(**task.data, **sizes))
    tokenizer = AutoTokenizer.from_pretrained(DIRECTORY)
    callback = HeldOutCallback(spec, tokenizer, list(prompts["test"]))
    config_class, trainer_class, options = METHODS[spec.method]
    if spec.trust_region_kl is not None:
        options = options | {"trust_region_kl": spec.trust_region_kl}
    args = config_class(
        output_dir=output_dir,
        max_steps=spec.num_steps,
        per_device_train_batch_size=spec.num_prompts * spec.num_generations,
        num_generations=spec.num_generations,
        max_completion_length=task.max_completion_length,
        generation_kwargs=_GENERATION,
        learning_rate=spec.learning_rate,
        lr_scheduler_type="constant",
        use_cpu=not torch.cuda.is_available(),
        bf16=spec.bf16,
        gradient_checkpointing=False,
        seed=spec.seed,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
        logging_steps=1,
        **options,
    )
    lora = LoraConfig(r=spec.lora_rank, lora_alpha=2 * spec.lora_rank, target_modules="all-linear")
    trainer = trainer_class(
        model=AutoModelForCausalLM.from_pretrained(DIRECTORY, dtype=torch.float32),
        reward_funcs=task.reward,
        args=args,
        train_dataset=prompts["train"],
        processing_class=tokenizer,
        callbacks=[callback],
        peft_config=lora if spec.lora_rank else None,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer, callback


def _settings(spec: PretrainedSpec) -> dict[str, Any]:
    return asdict(spec) | {"task_data": TASKS[spec.task].data, "options": METHODS[spec.method][2]}


def run_file(directory: str, spec: PretrainedSpec) -> Path:
    """Where the run of a specification is kept."""
    digest = hashlib.sha256(repr(_settings(spec)).encode()).hexdigest()[:16]
    return Path(directory) / f"{spec.task}-{spec.method}-{digest}.pt"


def finished_run(directory: str, spec: PretrainedSpec) -> dict[str, Any]:
    """The run of a specification, read from `directory` if it has been made before."""
    return kept(run_file(directory, spec), _settings(spec), lambda: run(spec))


def first_not_finite(grad_norms: list[float | None]) -> int | None:
    """The step, from 1, whose gradient is the first that is not finite."""
    return next((i for i, norm in enumerate(grad_norms, 1) if norm is not None and not math.isfinite(norm)), None)


def run(spec: PretrainedSpec) -> dict[str, Any]:
    """
    Train as `spec` says and return the curve. A run whose gradient becomes infinite or no number says so in `failure`; where it is
    stopped by an error about that, its reward counts as 0 from there on.
    """
    prepare_process()
    failure = None
    with tempfile.TemporaryDirectory() as output_dir:
        trainer, callback = prepared_trainer(spec, output_dir)
        avoid_nan_attention(trainer.model, trainer.accelerator.device)  # of GRPO too
        try:
            trainer.train()
        except (RuntimeError, ValueError) as error:
            failure = divergence(error)
            callback.fill()
    steps = [row for row in trainer.state.log_history if "reward" in row]
    logged = {name: [row.get(name) for row in steps] for name in _LOGGED if any(name in row for row in steps)}
    if failure is None and (step := first_not_finite(logged.get(_GRAD_NORM, []))) is not None:
        failure = f"the gradient of step {step} is not finite"
    return {
        "spec": asdict(spec),
        "machine": machine(),
        "rewards": callback.rewards,
        "seconds": callback.seconds,
        "failure": failure,
        "logged": logged,
    }
