"""Variance of the policy gradient under every baseline on SmolLM2-135M-Instruct, relative to RLOO's, and how far cheaper scores agree with
exact ones.

    make pretrained
    python -m benchmarks.pretrained_variance

As `benchmarks.variance`, of all parameters in float32. Full gradients of one prompt's completions are held at a time: 0.54 GB for each
of them. Finished pools are kept below `runs/pretrained_variance`, from where an interrupted study resumes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from trl import TrlParser

from benchmarks.completion_pool import build_pool, kept, sample_completions, sequence_logps
from benchmarks.gradient_variance import RLOO, Pool, right_over_wrong
from benchmarks.pretrained_runs import TASKS
from benchmarks.record import machine, write_record
from benchmarks.sections.pretrained_variance import markdown
from benchmarks.variance import DEFAULT, METHODS, measure_pool, summarise_policy
from examples.smollm2.__main__ import DIRECTORY
from oblr_trl.data.prompt_sets import DataArguments, load_prompts

# Columns of gradients that are multiplied at a time, in double precision.
_CHUNK = 2**22


@dataclass
class PretrainedVarianceArguments:
    """Settings of the study; fields are documented by their `help`."""

    tasks: list[str] = field(default_factory=lambda: list(TASKS), metadata={"help": "Tasks, by name."})
    num_seeds: int = field(default=3, metadata={"help": "Independent draws of prompts, completions and projections."})
    num_prompts: int = field(default=16, metadata={"help": "Prompts of a pool, which are one batch."})
    num_completions: int = field(default=16, metadata={"help": "Completions of every prompt."})
    num_generations: list[int] = field(default_factory=lambda: [2, 4, 8], metadata={"help": "Group sizes G."})
    groups_per_prompt: int = field(default=64, metadata={"help": "Groups of every prompt, over all partitions."})
    sketch_dim: int = field(default=4096, metadata={"help": "Length of a sketch, the trainer's default."})
    kept: str = field(default="runs/pretrained_variance", metadata={"help": "Where pools are kept."})
    output: str = field(
        default="benchmarks/results/pretrained_variance.json", metadata={"help": "Where the numbers go."}
    )

    @property
    def prompts_per_batch(self) -> int:
        """Prompts that a prior is made of."""
        return self.num_prompts


def gradient_gram(model: Any, inputs: Sequence[Tensor]) -> Tensor:
    """Inner products (M, M), in float64, of the full gradients of M completions' log-probabilities."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gradients = []
    for row in range(len(inputs[0])):
        logp = sequence_logps(model, *(tensor[row : row + 1] for tensor in inputs)).sum()
        gradients.append([gradient.flatten() for gradient in torch.autograd.grad(logp, parameters)])
    gram = torch.zeros(len(gradients), len(gradients), dtype=torch.float64)
    for of_parameter in zip(*gradients, strict=True):
        for columns in torch.stack(of_parameter).split(_CHUNK, dim=1):
            gram += columns.double() @ columns.double().T
    return gram


def draw_pool(args: PretrainedVarianceArguments, task: str, seed: int) -> Pool:
    """Completions of held-out prompts, scored exactly and by sketches."""
    model: Any = AutoModelForCausalLM.from_pretrained(DIRECTORY, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(DIRECTORY)
    size = args.num_prompts * (seed + 1)
    rows: list[Any] = list(load_prompts(DataArguments(**TASKS[task].data, test_size=size))["test"])[
        -args.num_prompts :
    ]
    prompts = [tokenizer.apply_chat_template(r["prompt"], add_generation_prompt=True, tokenize=False) for r in rows]
    set_seed(seed)
    completions = sample_completions(
        model,
        tokenizer,
        prompts,
        num_completions=args.num_completions,
        max_completion_length=TASKS[task].max_completion_length,
    )
    repeated = [row for row in rows for _ in range(args.num_completions)]
    columns = {name: [row[name] for row in repeated] for name in rows[0] if name != "prompt"}
    rewards = torch.tensor(TASKS[task].reward(completions=completions.texts, **columns), dtype=torch.float64)
    rewards = rewards.view(args.num_prompts, args.num_completions)
    return build_pool(model, completions, rewards, sketch_dim=args.sketch_dim, seed=seed, gram=gradient_gram)


def kept_pool(args: PretrainedVarianceArguments, task: str, seed: int) -> Pool:
    """A pool, drawn or read."""
    settings = {"task": task, "seed": seed, "num_prompts": args.num_prompts, "num_completions": args.num_completions}
    settings |= {"sketch_dim": args.sketch_dim, "task_data": TASKS[task].data}
    return kept(Path(args.kept) / f"{task}-{seed}.pool.pt", settings, lambda: draw_pool(args, task, seed))


def measure_task(args: PretrainedVarianceArguments, task: str, seed: int) -> dict[str, Any]:
    """Draw one pool or read the one that is kept, and measure every method on it."""
    pool = kept_pool(args, task, seed)
    return {
        "num_parameters": sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(DIRECTORY).parameters()),
        "mean_reward": pool.rewards.mean().item(),
        "mean_length": pool.lengths.mean().item(),
        "right_over_wrong": right_over_wrong(pool),
        "agreement": agreement(pool),
        "measured": measure_pool(args, pool, seed),
    }


def agreement(pool: Pool) -> dict[str, float]:
    """Correlation of the logarithms of every scope's weights with those of the exact ones."""
    exact = pool.weights["exact"].log().flatten()
    return {
        name: float(np.corrcoef(exact, weights.log().flatten())[0, 1])
        for name, weights in pool.weights.items()
        if name != "exact"
    }


def main(args: PretrainedVarianceArguments) -> None:
    """Measure, print and write, seed by seed."""
    if not DIRECTORY.is_dir():
        raise SystemExit(f"not measured: there is no {DIRECTORY}. Run `make pretrained` first.")
    started = machine()
    pools: dict[str, list[dict[str, Any]]] = {task: [] for task in args.tasks}
    for seed, task in tqdm(list(product(range(args.num_seeds), args.tasks)), desc="pools measured"):
        pools[task].append(measure_task(args, task, seed))
    tasks = {task: summarise_policy("", of_task) for task, of_task in pools.items()}
    for task, of_task in pools.items():
        scopes = of_task[0]["agreement"]
        tasks[task]["agreement"] = {scope: mean(pool["agreement"][scope] for pool in of_task) for scope in scopes}
    record = {"default": DEFAULT, "reference": RLOO.label, "policies": tasks}
    record["biased"] = [method.label for method in METHODS if not method.unbiased]
    print(markdown(record | {"settings": vars(args)}))
    write_record(args.output, args, started, record)


if __name__ == "__main__":
    (arguments,) = TrlParser([PretrainedVarianceArguments]).parse_args_and_config()
    main(arguments)
