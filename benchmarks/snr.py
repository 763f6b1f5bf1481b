"""Is rho right? Signal, noise and rho as the trainer estimates them, against exact ones from very many rollouts.

    python -m examples.tiny_qwen3
    python -m benchmarks.snr

Policies are the start model and snapshots of one real OBLR-PO run. The true signal
(`benchmarks/snr_truth.py`) is summed over all problems; the true noise is that of the rollouts which the estimates
(`benchmarks/snr_estimates.py`) are made from, by exact gradients. Prompts are drawn from the training distribution, with
repetition.
"""

import itertools
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch
from tqdm import tqdm
from transformers import set_seed
from trl import TrlParser

from benchmarks.record import machine, write_record
from benchmarks.snr_drift import lag_summary, noise_around, run_errors
from benchmarks.snr_estimates import batch_estimates, stream_advantages
from benchmarks.snr_policies import Policy, RunSettings, TrainingRun, load_policy, training_run
from benchmarks.snr_population import Population, population, rewarded_chunks, sketched_gradient
from benchmarks.snr_rollouts import Rollouts, draw_rollouts, merged
from benchmarks.snr_summary import BatchStreams, summarise_batches, verdict
from benchmarks.snr_truth import Truth, exact_batch_gradients, expected_gradient, gradient_truth
from examples.tiny_qwen3.start_model import TASK, TASK_PARAMS
from oblr_trl.data.prompt_sets import DataArguments, load_prompts
from oblr_trl.data.tasks import decode_entry, make_task
from oblr_trl.gradient_snr import GradientMoments

# Far from the seeds of training, held-out and supervised problems.
_PROMPT_SEED = 3_000_000_000
# Batches on either side of a snapshot that its noise on the path is averaged over.
_NOISE_HALF_WIDTH = 5


@dataclass
class SNRArguments:
    """
    Settings of the study.

    Args:
        model (`str`, *optional*, defaults to `".cache/tiny-Qwen3-chain_sum"`): Directory of the start model.
        recipe (`str`, *optional*, defaults to `"recipes/tiny-Qwen3/oblrpo/config_chain_sum.yaml"`): Recipe of the run.
        run_dir (`str`, *optional*, defaults to `".cache/snr-chain_sum"`): Directory of the run's snapshots; reused.
        snapshot_steps (`list[int]`, *optional*, defaults to `[0, 10, 40, 100]`): Steps whose policies are studied.
        path_steps (`list[int]`, *optional*, defaults to `[1, 2, 5, 20, 30, 50, 60, 70, 80, 90]`): Further steps whose signal
            alone is measured.
        num_seeds (`int`, *optional*, defaults to `3`): Independent draws of prompts and completions, and orders of them.
        num_prompts (`int`, *optional*, defaults to `768`): Prompts of a draw.
        population_size (`int`, *optional*, defaults to `40000`): Prompts that stand for the training distribution; the draws
            are its beginning.
        num_projections (`int`, *optional*, defaults to `20`): Seeds of projections for the sketch's error.
        num_generations (`int`, *optional*, defaults to `8`): Completions per prompt, as in the recipe.
        batch_sizes (`list[int]`, *optional*, defaults to `[4, 8, 16, 32, 64, 128, 256]`): Prompts per batch.
        truth_batch_size (`int`, *optional*, defaults to `16`): Prompts per batch of the truth, the recipe's.
        decays (`list[float]`, *optional*, defaults to `[0.0, 0.5, 0.8, 0.9, 0.95]`): Decays of the moving averages.
        max_completion_length (`int`, *optional*, defaults to `6`): Tokens sampled at most, as in the recipe.
        sketch_dim (`int`, *optional*, defaults to `4096`): Length of a sketch, the trainer's default.
        output (`str`, *optional*, defaults to `"benchmarks/results/snr.json"`): Where the numbers go.
    """

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
    num_seeds: int = field(default=3, metadata={"help": "Independent draws of prompts and completions."})
    num_prompts: int = field(default=768, metadata={"help": "Prompts of a draw."})
    population_size: int = field(
        default=40_000, metadata={"help": "Prompts that stand for the training distribution."}
    )
    num_projections: int = field(default=20, metadata={"help": "Seeds of projections for the sketch's error."})
    num_generations: int = field(default=8, metadata={"help": "Completions per prompt."})
    batch_sizes: list[int] = field(
        default_factory=lambda: [4, 8, 16, 32, 64, 128, 256], metadata={"help": "Prompts per batch."}
    )
    truth_batch_size: int = field(default=16, metadata={"help": "Prompts per batch of the truth."})
    decays: list[float] = field(
        default_factory=lambda: [0.0, 0.5, 0.8, 0.9, 0.95], metadata={"help": "Decays of the moving averages."}
    )
    max_completion_length: int = field(default=6, metadata={"help": "Tokens sampled at most."})
    sketch_dim: int = field(default=4096, metadata={"help": "Length of a sketch."})
    output: str = field(default="benchmarks/results/snr.json", metadata={"help": "Where the numbers go."})

    def __post_init__(self) -> None:
        for size in {*self.batch_sizes, self.truth_batch_size}:
            if size < 3 or self.num_prompts % size:
                raise ValueError(
                    f"`num_prompts` is {self.num_prompts}, which batches of {size} prompts (`batch_sizes`, "
                    "`truth_batch_size`) do not divide, or they have fewer than three prompts, as an interval needs: change "
                    "one of them."
                )
        if self.num_seeds * self.num_prompts < 3 * self.truth_batch_size:
            raise ValueError(
                "The truth needs at least three batches: `num_seeds` x `num_prompts` must be at least three times "
                f"`truth_batch_size`, got {self.num_seeds} x {self.num_prompts} and {self.truth_batch_size}."
            )
        needed = len(self.snapshot_steps) * self.num_seeds * self.num_prompts
        if self.population_size < needed:
            raise ValueError(
                f"`population_size` is {self.population_size}, but the draws of all seeds and policies need {needed} prompts: "
                "raise it, or lower `num_prompts` or `num_seeds`."
            )
        if (
            0 not in self.snapshot_steps
            or len(self.snapshot_steps) < 2
            or min(self.snapshot_steps + self.path_steps) < 0
        ):
            raise ValueError(
                f"`snapshot_steps` is {self.snapshot_steps}, which must hold 0, the start model, and a later step; no step of "
                "it or of `path_steps` may be negative."
            )


class _Scorer:
    """Rewards texts, and keeps how much of the reward went to texts other than the answer itself."""

    def __init__(self, rows: list[dict[str, str]]) -> None:
        self._task = make_task(TASK, TASK_PARAMS, size=1, seed=0)
        self._rows = rows
        self._entries = [decode_entry(row["entry"]) for row in rows]
        self.total = self.other = 0.0

    def __call__(self, text: str, prompt: int) -> float:
        reward = float(self._task.score_answer(text, self._entries[prompt]))
        self.total += reward
        self.other += reward if text != self._rows[prompt]["solution"] else 0.0
        return reward


def draw(args: SNRArguments, policy: Policy, rows: list[dict[str, str]], step: int) -> tuple[Rollouts, float]:
    """Rollouts of all seeds, and the share of the reward that no answer itself has earned. The projections are the policy's
    own, the same for all seeds, as in a training run."""
    model, tokenizer = policy
    draws, other = [], 0.0
    for seed, part in enumerate(_split(rows, args.num_seeds)):
        set_seed(1000 * step + seed)
        score = _Scorer(part)
        draws.append(
            draw_rollouts(
                model,
                tokenizer,
                [row["prompt"] for row in part],
                score,
                num_generations=args.num_generations,
                max_completion_length=args.max_completion_length,
                sketch_dim=args.sketch_dim,
                projection_seed=step,
            )
        )
        other += score.other / max(score.total, 1e-12) / args.num_seeds
    return merged(draws), other


def _split(rows: list[dict[str, str]], parts: int) -> list[list[dict[str, str]]]:
    size = len(rows) // parts
    return [rows[part * size :][:size] for part in range(parts)]


def measure_truth(
    args: SNRArguments, policy: Policy, problems: Population, rollouts: Rollouts, progress: tqdm
) -> tuple[Truth, float]:
    """The truth of one policy, with the advantages of the trainer's batches for its noise; and the expected reward."""
    model, tokenizer = policy
    expected, reward = expected_gradient(model, *rewarded_chunks(tokenizer, problems))
    stream = stream_advantages(rollouts, torch.arange(rollouts.rewards.size(0)), args.truth_batch_size)
    advantages = torch.cat([advantages for _, advantages in stream])
    gradients = exact_batch_gradients(
        model, rollouts, advantages, num_prompts=args.truth_batch_size, on_prompt=progress.update
    )
    return gradient_truth(gradients, expected, num_prompts=args.truth_batch_size), reward


def sketch_errors(args: SNRArguments, model: Any, truth: Truth) -> list[float]:
    """Relative error of the true signal by the projections alone, for many seeds of them."""
    sketches = (
        sketched_gradient(model, truth.gradient, sketch_dim=args.sketch_dim, seed=seed)
        for seed in range(args.num_projections)
    )
    return [sketch.double().square().sum().item() / truth.signal - 1 for sketch in sketches]


def measure_policy(
    args: SNRArguments, directory: str, rows: list[dict[str, str]], problems: Population, step: int, progress: tqdm
) -> tuple[dict[str, Any], Truth]:
    """Truth and estimates of one policy."""
    policy = load_policy(directory)
    rollouts, other_reward = draw(args, policy, rows, step)
    truth, expected_reward = measure_truth(args, policy, problems, rollouts, progress)
    total = rollouts.rewards.size(0)
    # The first order keeps each seed's draw together; the others mix all of them.
    generator = torch.Generator().manual_seed(step)
    orders = [torch.arange(total), *(torch.randperm(total, generator=generator) for _ in range(args.num_seeds - 1))]
    streams: BatchStreams = {}
    for size in sorted({*args.batch_sizes, args.truth_batch_size}):
        streams[size] = [batch_estimates(rollouts, order, size) for order in orders]
        progress.update(total)
    result = {
        "step": step,
        "mean_reward": rollouts.rewards.mean().item(),
        "expected_reward": expected_reward,
        "reward_of_other_texts": other_reward,
        "different_sequences": rollouts.sketches.size(0) / rollouts.rewards.numel(),
        "signal": truth.signal,
        "noise": vars(truth.noise),
        "rollout_signal": vars(truth.rollout_signal),
        "rollout_projection": vars(truth.rollout_projection),
        "batch_noise_ratio": vars(truth.batch_noise_ratio),
        "sketch_error_of_signal": sketch_errors(args, policy[0], truth),
        "batches": summarise_batches(
            streams, truth, args.batch_sizes, args.decays, reference=args.truth_batch_size, num_seeds=args.num_seeds
        ),
    }
    return result, truth


def measure_drift(
    args: SNRArguments, run: TrainingRun, problems: Population, truths: dict[int, Truth]
) -> dict[str, Any]:
    """Lag of the moving averages on the run, and how fast the gradient turns."""
    gradients = {step: truth.gradient.double() for step, truth in truths.items()}
    for step in tqdm(sorted(set(run.policies) - set(truths)), desc="policies on the path"):
        model, tokenizer = load_policy(run.policies[step])
        gradients[step], _ = expected_gradient(model, *rewarded_chunks(tokenizer, problems))
    path = {
        step: GradientMoments(
            gradients[step].square().sum().item(), noise_around(run.gradients, step, half_width=_NOISE_HALF_WIDTH)
        )
        for step in sorted(gradients)
    }
    positive = all(moments.signal > 0 and moments.noise > 0 for moments in path.values())
    cosines = [
        torch.nn.functional.cosine_similarity(gradients[first], gradients[second], dim=0).item()
        for first, second in itertools.pairwise(path)
    ]
    return {
        "path": [{"step": step, **moments._asdict()} for step, moments in path.items()],
        "cosine_to_next": cosines,
        "lag": {str(size): lag_summary(path, args.decays, size) for size in args.batch_sizes} if positive else None,
        "run": run_errors(run.gradients, path, args.decays) if positive else None,
    }


def make_parser() -> TrlParser:
    """Parser of the command line; a misspelt key fails."""
    return TrlParser(cast(Any, [SNRArguments]))


def main(args: SNRArguments) -> None:
    """Train or read the policies, measure, write."""
    started, start = machine(), time.perf_counter()
    load_policy(args.model)  # fails before the training if there is no model
    steps = tuple(sorted({*args.snapshot_steps, *args.path_steps}))
    run = training_run(RunSettings(args.recipe, args.model, steps), args.run_dir)
    per_policy = args.num_seeds * args.num_prompts
    num_policies = len(args.snapshot_steps)
    data = DataArguments(task=TASK, task_params=TASK_PARAMS, train_size=args.population_size, train_seed=_PROMPT_SEED)
    rows = cast(list[dict[str, str]], list(load_prompts(data)["train"]))
    problems = population([row["prompt"] for row in rows], [row["solution"] for row in rows])
    results, truths = [], {}
    rounds = 1 + len({*args.batch_sizes, args.truth_batch_size})
    with tqdm(total=num_policies * per_policy * rounds, desc="prompts", mininterval=5) as progress:
        for number, step in enumerate(sorted(args.snapshot_steps)):
            drawn = rows[number * per_policy :][:per_policy]
            result, truths[step] = measure_policy(args, run.policies[step], drawn, problems, step, progress)
            results.append(result)
    record = {
        "seconds": time.perf_counter() - start,
        "verdict": verdict(results),
        "policies": results,
        "drift": measure_drift(args, run, problems, truths),
    }
    # Of the run's directory, as of the model's, only the last part is recorded.
    recorded = replace(args, run_dir=Path(args.run_dir).name)
    write_record(args.output, recorded, started, record)
    sys.stdout.write(f"Wrote {args.output} after {record['seconds']:.0f} s.\n")


if __name__ == "__main__":
    torch.set_num_threads(1)  # tiny batches: more threads only contend
    (arguments,) = make_parser().parse_args_and_config()
    main(arguments)
