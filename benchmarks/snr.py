"""Signal, noise and rho as the trainer estimates them, against exact ones from very many rollouts.

    python -m examples.tiny_qwen3
    python -m benchmarks.snr

Policies are the start model and snapshots of one real OBLR-PO run. The true signal (`benchmarks/snr_truth.py`) is
summed over all problems; the true noise is that of the rollouts which the estimates (`benchmarks/snr_estimates.py`)
are made from, by exact gradients. Prompts are drawn from the training distribution, with repetition.
"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from trl import TrlParser

from benchmarks.completion_pool import kept, sample_completions
from benchmarks.record import machine, write_record
from benchmarks.sections.snr import markdown
from benchmarks.snr_estimates import Rollouts, batch_moments, mean_moments, stream_advantages, summarise_size
from benchmarks.snr_truth import Problems, count_problems, expected_gradient, squared_gradient_norms
from examples.tiny_qwen3.start_model import TASK, TASK_PARAMS
from oblr_trl.data.prompt_sets import DataArguments, load_prompts
from oblr_trl.data.rewards import task_reward
from oblr_trl.gradient_snr import rho
from oblr_trl.scores import score_sketches
from oblr_trl.scripts import train

RECIPE = "recipes/tiny-Qwen3/oblrpo/config_chain_sum.yaml"
_MAX_COMPLETION_LENGTH = 6  # the recipe's
# Far from the seeds of training, held-out and supervised problems.
_PROMPT_SEED = 3_000_000_000


@dataclass
class SNRArguments:
    """Settings of the study; fields are documented by their `help`."""

    model: str = field(default=".cache/tiny-Qwen3-chain_sum", metadata={"help": "Directory of the start model."})
    run_dir: str = field(
        default=".cache/snr-chain_sum", metadata={"help": "Directory of the run's snapshots; reused."}
    )
    steps: list[int] = field(
        default_factory=lambda: [0, 10, 40, 100], metadata={"help": "Steps whose policies are studied."}
    )
    num_seeds: int = field(
        default=3,
        metadata={"help": "Draws of prompts for every policy, and orders of all of them to cut batches from."},
    )
    num_prompts: int = field(default=768, metadata={"help": "Prompts of a draw."})
    population_size: int = field(
        default=40_000,
        metadata={
            "help": "Prompts that stand for the training distribution, or as many as are drawn if those are more."
        },
    )
    num_generations: int = field(default=8, metadata={"help": "Completions per prompt, as in the recipe."})
    batch_sizes: list[int] = field(
        default_factory=lambda: [4, 8, 16, 32, 64, 128, 256], metadata={"help": "Prompts per batch."}
    )
    truth_batch_size: int = field(default=16, metadata={"help": "Prompts per batch of the truth, the recipe's."})
    output: str = field(default="benchmarks/results/snr.json", metadata={"help": "Where the numbers go."})

    def __post_init__(self) -> None:
        for size in {*self.batch_sizes, self.truth_batch_size}:
            if size < 2 or self.num_prompts % size:
                raise ValueError(
                    f"`num_prompts` is {self.num_prompts}, which batches of {size} prompts (`batch_sizes`, "
                    "`truth_batch_size`) do not divide, or they have fewer than the two prompts that a noise needs: "
                    "change one of them."
                )


def snapshots(model: str, steps: list[int], directory: str) -> dict[int, str]:
    """The directory of the policy after each of `steps`, 0 being the start model; trains unless `directory` has the run."""
    # The start model's own record tells one start model from another at the same place.
    start = Path(model) / "start_model.json"
    settings = {"recipe": RECIPE, "model": model, "last_step": max(steps)}
    settings["start_model"] = json.loads(start.read_text())["settings"] if start.is_file() else None
    kept(Path(directory) / "settings.pt", settings, lambda: _train(model, max(steps), directory))
    return {step: f"{directory}/checkpoint-{step}" if step else model for step in sorted(steps)}


def _train(model: str, num_steps: int, directory: str) -> None:
    options = {"config": RECIPE, "model_name_or_path": model, "output_dir": directory, "max_steps": num_steps}
    options |= {"save_strategy": "steps", "save_steps": 1, "save_only_model": "true", "disable_tqdm": "true"}
    options |= {"eval_strategy": "no", "eval_on_start": "false", "report_to": "none"}
    train.main(*train.parse([token for name, value in options.items() for token in (f"--{name}", str(value))]))


def draw(args: SNRArguments, model: Any, tokenizer: Any, rows: list[dict[str, str]], step: int) -> Rollouts:
    """Rollouts of the policy after `step` steps. All prompts share their projections, as in training."""
    set_seed(step)
    completions = sample_completions(
        model,
        tokenizer,
        [row["prompt"] for row in rows],
        num_completions=args.num_generations,
        max_completion_length=_MAX_COMPLETION_LENGTH,
    )
    entries = [row["entry"] for row in rows for _ in range(args.num_generations)]
    rewards = task_reward(TASK, TASK_PARAMS)(completions=completions.texts, entry=entries)
    sketches = score_sketches(model, *completions.inputs(), seed=step, micro_batch_size=128)
    return Rollouts(
        completions,
        torch.tensor(rewards).view(len(rows), args.num_generations),
        sketches.unflatten(0, (len(rows), args.num_generations)),
    )


def measure_policy(
    args: SNRArguments, directory: str, rows: list[dict[str, str]], problems: Problems, step: int
) -> dict[str, Any]:
    """Truth and estimates of one policy."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    rollouts = draw(args, model, tokenizer, rows, step)
    generator = torch.Generator().manual_seed(step)
    orders = [torch.arange(len(rows))]
    orders += [torch.randperm(len(rows), generator=generator) for _ in range(args.num_seeds - 1)]
    signal = expected_gradient(model, tokenizer, problems).square().sum().item()
    advantages = [advantages for _, advantages in stream_advantages(rollouts, orders[0], args.truth_batch_size)]
    noise = squared_gradient_norms(model, rollouts.completions, torch.cat(advantages)).mean().item() - signal
    sizes = sorted({*args.batch_sizes, args.truth_batch_size})
    streams = {size: [batch_moments(rollouts, order, size) for order in orders] for size in sizes}
    noises = {size: mean_moments([batch for stream in streams[size] for batch in stream]).noise for size in sizes}
    # The prior of the baseline has more prompts to come from in a larger batch, so the noise of a prompt depends on N
    # a little; the truth, measured in batches of one size, is corrected by the ratio of the estimated noises.
    factors = {size: noises[size] / noises[args.truth_batch_size] for size in sizes}
    return {
        "step": step,
        "signal": signal,
        "noise": noise,
        "batches": [
            summarise_size(streams[size], rho(signal, noise * factors[size], size), size) for size in args.batch_sizes
        ],
    }


def main(args: SNRArguments) -> None:
    """Train or read the policies, measure, print and write."""
    started = machine()
    policies = snapshots(args.model, args.steps, args.run_dir)
    per_policy = args.num_seeds * args.num_prompts
    num_rows = max(args.population_size, len(policies) * per_policy)
    data = DataArguments(task=TASK, task_params=TASK_PARAMS, train_size=num_rows, train_seed=_PROMPT_SEED)
    rows = cast(list[dict[str, str]], list(load_prompts(data)["train"]))
    problems = count_problems([row["prompt"] for row in rows], [row["solution"] for row in rows])
    results = []
    for number, (step, directory) in enumerate(tqdm(policies.items(), desc="policies")):
        drawn = rows[number * per_policy : (number + 1) * per_policy]
        results.append(measure_policy(args, directory, drawn, problems, step))
    print(markdown({"policies": results, "settings": asdict(args)}))
    write_record(args.output, args, started, {"policies": results})


if __name__ == "__main__":
    torch.set_num_threads(1)  # tiny batches: more threads only contend
    (arguments,) = TrlParser([SNRArguments]).parse_args_and_config()
    main(arguments)
