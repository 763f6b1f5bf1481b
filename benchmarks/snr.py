"""Signal, noise and rho as the trainer estimates them, against exact ones from very many rollouts.

    python -m examples.tiny_qwen3
    python -m benchmarks.snr

Policies are the start model and snapshots of one real OBLR-PO run. The true signal (`benchmarks/snr_truth.py`) is
summed over all problems; the true noise is that of the rollouts which the estimates (`benchmarks/snr_estimates.py`)
are made from, by exact gradients. Prompts are drawn from the training distribution, with repetition.
"""

import itertools
import time
from dataclasses import asdict, dataclass, field
from typing import Any, cast

import torch
from tqdm import tqdm
from transformers import set_seed
from trl import TrlParser

from benchmarks.completion_pool import sample_completions
from benchmarks.record import machine, write_record
from benchmarks.sections.snr import markdown
from benchmarks.snr_estimates import (
    Rollouts,
    batch_moments,
    mean_moments,
    run_errors,
    stream_advantages,
    summarise_size,
)
from benchmarks.snr_run import load_policy, training_run
from benchmarks.snr_truth import Problems, count_problems, expected_gradient, squared_gradient_norms
from examples.tiny_qwen3.start_model import TASK, TASK_PARAMS
from oblr_trl.data.prompt_sets import DataArguments, load_prompts
from oblr_trl.data.rewards import task_reward
from oblr_trl.gradient_snr import GradientMoments, gradient_moments, rho
from oblr_trl.scores import score_sketches

# Far from the seeds of training, held-out and supervised problems.
_PROMPT_SEED = 3_000_000_000
# Batches on either side of a snapshot that its noise on the path is averaged over.
_NOISE_HALF_WIDTH = 5


@dataclass
class SNRArguments:
    """Settings of the study; fields are documented by their `help`."""

    model: str = field(default=".cache/tiny-Qwen3-chain_sum", metadata={"help": "Directory of the start model."})
    recipe: str = field(
        default="recipes/tiny-Qwen3/oblrpo/config_chain_sum.yaml", metadata={"help": "Recipe of the run."}
    )
    run_dir: str = field(
        default=".cache/snr-chain_sum", metadata={"help": "Directory of the run's snapshots; reused."}
    )
    snapshot_steps: list[int] = field(
        default_factory=lambda: [0, 10, 40, 100], metadata={"help": "Steps whose policies are studied."}
    )
    path_steps: list[int] = field(
        default_factory=lambda: [1, 2, 5, 20, 30, 50, 60, 70, 80, 90],
        metadata={"help": "Further steps whose signal alone is measured."},
    )
    num_seeds: int = field(
        default=3,
        metadata={"help": "Draws of prompts for every policy, and orders of all of them to cut batches from."},
    )
    num_prompts: int = field(default=768, metadata={"help": "Prompts of a draw."})
    population_size: int = field(
        default=40_000, metadata={"help": "Prompts that stand for the training distribution."}
    )
    num_generations: int = field(default=8, metadata={"help": "Completions per prompt, as in the recipe."})
    batch_sizes: list[int] = field(
        default_factory=lambda: [4, 8, 16, 32, 64, 128, 256], metadata={"help": "Prompts per batch."}
    )
    truth_batch_size: int = field(default=16, metadata={"help": "Prompts per batch of the truth, the recipe's."})
    decays: list[float] = field(
        default_factory=lambda: [0.0, 0.5, 0.8, 0.9, 0.95], metadata={"help": "Decays that are compared on the run."}
    )
    max_completion_length: int = field(default=6, metadata={"help": "Tokens sampled at most, as in the recipe."})
    sketch_dim: int = field(default=4096, metadata={"help": "Length of a sketch, the trainer's default."})
    output: str = field(default="benchmarks/results/snr.json", metadata={"help": "Where the numbers go."})

    def __post_init__(self) -> None:
        for size in {*self.batch_sizes, self.truth_batch_size}:
            if size < 2 or self.num_prompts % size:
                raise ValueError(
                    f"`num_prompts` is {self.num_prompts}, which batches of {size} prompts (`batch_sizes`, "
                    "`truth_batch_size`) do not divide, or they have fewer than the two prompts that a noise needs: "
                    "change one of them."
                )
        needed = len(self.snapshot_steps) * self.prompts_per_policy
        if self.population_size < needed:
            raise ValueError(
                f"`population_size` is {self.population_size}, but the draws of all policies need {needed} prompts: "
                "raise it, or lower `num_prompts` or `num_seeds`."
            )
        if 0 not in self.snapshot_steps or len(self.snapshot_steps) < 2:
            raise ValueError(
                f"`snapshot_steps` is {self.snapshot_steps}, which must hold 0, the start model, and a later step."
            )

    @property
    def prompts_per_policy(self) -> int:
        """Prompts of all draws."""
        return self.num_seeds * self.num_prompts


def draw(args: SNRArguments, model: Any, tokenizer: Any, rows: list[dict[str, str]], step: int) -> Rollouts:
    """Rollouts of the policy after `step` steps. All prompts share their projections, as in training."""
    set_seed(step)
    completions = sample_completions(
        model,
        tokenizer,
        [row["prompt"] for row in rows],
        num_completions=args.num_generations,
        max_completion_length=args.max_completion_length,
    )
    entries = [row["entry"] for row in rows for _ in range(args.num_generations)]
    rewards = task_reward(TASK, TASK_PARAMS)(completions=completions.texts, entry=entries)
    sketches = score_sketches(
        model, *completions.inputs(), sketch_dim=args.sketch_dim, seed=step, micro_batch_size=128
    )
    return Rollouts(
        completions,
        torch.tensor(rewards).view(len(rows), args.num_generations),
        sketches.unflatten(0, (len(rows), args.num_generations)),
    )


def measure_policy(
    args: SNRArguments, directory: str, rows: list[dict[str, str]], problems: Problems, step: int
) -> tuple[dict[str, Any], torch.Tensor]:
    """Truth and estimates of one policy, and its expected gradient."""
    model, tokenizer = load_policy(directory)
    rollouts = draw(args, model, tokenizer, rows, step)
    generator = torch.Generator().manual_seed(step)
    orders = [torch.arange(len(rows))]
    orders += [torch.randperm(len(rows), generator=generator) for _ in range(args.num_seeds - 1)]
    gradient = expected_gradient(model, tokenizer, problems)
    signal = gradient.square().sum().item()
    advantages = [advantages for _, advantages in stream_advantages(rollouts, orders[0], args.truth_batch_size)]
    noise = squared_gradient_norms(model, rollouts.completions, torch.cat(advantages)).mean().item() - signal
    sizes = sorted({*args.batch_sizes, args.truth_batch_size})
    streams = {size: [batch_moments(rollouts, order, size) for order in orders] for size in sizes}
    noises = {size: mean_moments([batch for stream in streams[size] for batch in stream]).noise for size in sizes}
    # The prior of the baseline has more prompts to come from in a larger batch, so the noise of a prompt depends on N
    # a little; the truth, measured in batches of one size, is corrected by the ratio of the estimated noises.
    factors = {size: noises[size] / noises[args.truth_batch_size] for size in sizes}
    result = {
        "step": step,
        "mean_reward": rollouts.rewards.mean().item(),
        "signal": signal,
        "noise": noise,
        "batches": [
            summarise_size(streams[size], rho(signal, noise * factors[size], size), size) for size in args.batch_sizes
        ],
    }
    return result, gradient


def measure_drift(
    args: SNRArguments,
    policies: dict[int, str],
    step_gradients: torch.Tensor,
    problems: Problems,
    gradients: dict[int, torch.Tensor],
) -> dict[str, Any]:
    """Error of the moving averages along the run, and how fast the gradient turns."""
    gradients = dict(gradients)
    for step in tqdm(sorted(set(policies) - set(gradients)), desc="policies on the path"):
        gradients[step] = expected_gradient(*load_policy(policies[step]), problems)
    path = {
        step: GradientMoments(gradients[step].square().sum().item(), noise_around(step_gradients, step))
        for step in sorted(gradients)
    }
    cosines = [
        torch.nn.functional.cosine_similarity(gradients[first], gradients[second], dim=0).item()
        for first, second in itertools.pairwise(path)
    ]
    return {
        "path": [{"step": step, **moments._asdict()} for step, moments in path.items()],
        "cosine_to_next": cosines,
        "run": run_errors(step_gradients, path, args.decays),
    }


def noise_around(step_gradients: torch.Tensor, step: int, half_width: int = _NOISE_HALF_WIDTH) -> float:
    """Mean noise of the run's batches at most `half_width` steps from the policy after `step` steps."""
    around = step_gradients[max(step - half_width, 0) : step + half_width + 1]
    return sum(gradient_moments(gradients).noise for gradients in around) / len(around)


def main(args: SNRArguments) -> None:
    """Train or read the policies, measure, print and write."""
    started, start = machine(), time.perf_counter()
    load_policy(args.model)  # fails before the training if there is no model
    steps = sorted({*args.snapshot_steps, *args.path_steps})
    policies, step_gradients = training_run(args.recipe, args.model, steps, args.run_dir)
    data = DataArguments(task=TASK, task_params=TASK_PARAMS, train_size=args.population_size, train_seed=_PROMPT_SEED)
    rows = cast(list[dict[str, str]], list(load_prompts(data)["train"]))
    problems = count_problems([row["prompt"] for row in rows], [row["solution"] for row in rows])
    results, gradients = [], {}
    for number, step in enumerate(sorted(args.snapshot_steps)):
        drawn = rows[number * args.prompts_per_policy :][: args.prompts_per_policy]
        result, gradients[step] = measure_policy(args, policies[step], drawn, problems, step)
        results.append(result)
    drift = measure_drift(args, policies, step_gradients, problems, gradients)
    record = {"policies": results, "drift": drift, "seconds": time.perf_counter() - start}
    print(markdown(record | {"settings": asdict(args)}))
    write_record(args.output, args, started, record)


if __name__ == "__main__":
    torch.set_num_threads(1)  # tiny batches: more threads only contend
    (arguments,) = TrlParser([SNRArguments]).parse_args_and_config()
    main(arguments)
