"""What `score_scope="auto"` chooses for the baseline's weights, on every policy of the studies and on the pretrained model.

    python -m benchmarks.policies
    python -m benchmarks.weights_choice

First goes over the pools of `benchmarks.variance` and `benchmarks.pretrained_variance` (drawn where they are not kept) as a training run goes over
its batches, with the trainer's own estimator, and says beside the choice what it leaves of the variance, by the pool's exact gradients. Then trains some of the policies
with it and with `score_scope="all"`, at one completion per prompt and 64 prompts a step, of which 32 are scored where cheaper weights are chosen; and
one by RLOO, which has no weights, with a quarter of the prompts scored and with all.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from trl import TrlParser

from benchmarks.gradient_variance import Method, Pool, measure_methods
from benchmarks.learning import complete
from benchmarks.learning_runs import RunSpec
from benchmarks.learning_summary import held_out, step_area
from benchmarks.policies import POLICIES
from benchmarks.pretrained_runs import TASKS
from benchmarks.pretrained_variance import PretrainedVarianceArguments, kept_pool
from benchmarks.record import machine, write_record
from benchmarks.sections.weights_choice import markdown
from benchmarks.variance import VarianceArguments, kept_policy_pool
from examples.smollm2.__main__ import DIRECTORY
from oblr_trl import metrics
from oblr_trl.baselines import BaselineEstimator, GroupedBatch
from oblr_trl.baselines.weights_choice import ALL, WEIGHTS

# Methods of `benchmarks.learning_runs` that score a sample and all, and completions per prompt.
_TRAINED = {"OBLR-PO": ("ours", "ours_all", 1), "RLOO": ("rloo_quarter", "rloo_all", 2)}
_METHODS = {weights: Method(weights, "gradient_weighted", weights, None) for weights in WEIGHTS}


@dataclass
class WeightsChoiceArguments:
    """Settings of the study; fields are documented by their `help`."""

    policies: list[str] = field(
        default_factory=lambda: [*POLICIES, *TASKS], metadata={"help": "Policies, and tasks of SmolLM2, by name."}
    )
    num_generations: list[int] = field(default_factory=lambda: [2, 4, 8], metadata={"help": "Group sizes G."})
    num_batches: int = field(default=60, metadata={"help": "Batches of 16 prompts before the choice is read."})
    trained: list[str] = field(
        default_factory=lambda: ["chain_sum", "decimal_chain_sum", "products-mixed", "spell_backward"],
        metadata={"help": "Policies that are trained."},
    )
    trained_by_rloo: list[str] = field(
        default_factory=lambda: ["products"], metadata={"help": "Policies that are trained by RLOO."}
    )
    num_seeds: int = field(default=3, metadata={"help": "Runs of every policy and scope."})
    num_steps: int = field(default=120, metadata={"help": "Optimizer steps of a run."})
    num_workers: int = field(default=2, metadata={"help": "Processes of one thread each; 0 runs in this one."})
    runs: str = field(default="runs/weights_choice", metadata={"help": "Where finished runs are kept."})
    seed: int = field(default=0, metadata={"help": "Seed of the pool, and of its division into groups."})
    output: str = field(default="benchmarks/results/weights_choice.json", metadata={"help": "Where the numbers go."})


def batches(pool: Pool, num_generations: int, num_prompts: int, generator: torch.Generator) -> Iterator[GroupedBatch]:
    """Batches of a pool without end: all of it, then all of it in another order."""
    while True:
        prompts = torch.randperm(len(pool.rewards), generator=generator)
        order = torch.rand(pool.rewards.shape, generator=generator).argsort(dim=1)
        shuffled = pool.take(prompts, order)
        columns = [shuffled.rewards, shuffled.lengths, shuffled.weights["all"], shuffled.weights["lm_head"]]
        rewards, lengths, weights, head = (column.unflatten(1, (-1, num_generations)) for column in columns)
        for group in range(rewards.size(1)):
            for rows in torch.arange(len(rewards)).split(num_prompts):
                yield GroupedBatch(
                    rewards[rows, group], lengths[rows, group], weights[rows, group], head_weights=head[rows, group]
                )


def choose(pool: Pool, num_generations: int, num_prompts: int, *, num_batches: int, seed: int) -> dict[str, Any]:
    """The choice after so many batches, what it goes by, and what each kind of weights leaves of the variance that those of all leave."""
    generator = torch.Generator().manual_seed(seed)
    estimator = BaselineEstimator("gradient_weighted", leave_one_out=True, prior_strength=None, chooses_weights=True)
    seen = []
    for batch, _ in zip(batches(pool, num_generations, num_prompts, generator), range(num_batches), strict=False):
        estimator(batch)
        estimator.compare_weights(batch)
        estimator.update(batch)
        seen.append(estimator.weights)
    measured = measure_methods(
        pool,
        list(_METHODS.values()),
        num_generations=num_generations,
        num_prompts=num_prompts,
        num_partitions=8,
        generator=generator,
    )
    variances = {name: measured[name].mean().item() for name in _METHODS}
    after_warm_up = seen[estimator.weights_choice.warm_up :]
    return {
        "choice": estimator.weights,
        "share_of_batches": {name: after_warm_up.count(name) / len(after_warm_up) for name in WEIGHTS},
        "predicted": {name: 1 / gain for name, gain in estimator.weights_choice.gains.items()},
        "variance": {name: value / variances[ALL] for name, value in variances.items()},
    }


def pool_of(name: str, seed: int) -> Pool:
    """The pool of a policy or of a task of SmolLM2."""
    if name in TASKS:
        return kept_pool(PretrainedVarianceArguments(), name, seed)
    return kept_policy_pool(VarianceArguments(), name, seed)


def train(args: WeightsChoiceArguments) -> dict[str, dict[str, list[dict[str, float]]]]:
    """Final value (accuracy, or mean reward where it is graded), area, time and scored prompts of every run, by case and of `"sample"` and
    `"all"`."""
    cases = [(name, "OBLR-PO") for name in args.trained] + [(name, "RLOO") for name in args.trained_by_rloo]
    keys = [(seed, case, index) for seed in range(args.num_seeds) for case in cases for index in (0, 1)]
    specs = [
        RunSpec(
            policy=name,
            optimizer="adamw",
            method=str(_TRAINED[method][index]),
            learning_rate=1e-6,  # without a meaning under the trust region
            seed=seed,
            num_steps=args.num_steps,
            num_prompts=64,
            num_generations=_TRAINED[method][2],
        )
        for seed, (name, method), index in keys
    ]
    trained: dict[str, dict[str, list[dict[str, float]]]] = {}
    for (_, (name, method), index), run in zip(
        keys, complete(specs, args.runs, args.num_workers, "training"), strict=True
    ):
        values = held_out(run)
        figures = {"start": values[0], "final": values[-1], "gain": step_area(run) - values[0]}
        figures |= {"cpu_seconds": run["cpu_seconds"][-1], "scored": run["logged"][metrics.SCORED_FRACTION]}
        case = f"{name}, {method}, 64 x {_TRAINED[method][2]}"
        trained.setdefault(case, {}).setdefault(("sample", "all")[index], []).append(figures)
    return trained


def main(args: WeightsChoiceArguments) -> None:
    """Measure, print and write."""
    if not DIRECTORY.is_dir() and set(args.policies) & set(TASKS):
        raise SystemExit(f"not measured: there is no {DIRECTORY}. Run `make pretrained` first.")
    started = machine()
    policies: dict[str, dict[str, Any]] = {}
    for name in tqdm(args.policies, desc="policies"):
        pool = pool_of(name, args.seed)
        policies[name] = {
            str(size): choose(pool, size, 16, num_batches=args.num_batches, seed=args.seed)
            for size in args.num_generations
        }
    record = {"policies": policies, "trained": train(args)}
    print(markdown(record | {"settings": asdict(args)}))
    write_record(args.output, args, started, record)


if __name__ == "__main__":
    torch.set_num_threads(1)
    (arguments,) = TrlParser([WeightsChoiceArguments]).parse_args_and_config()
    Path(arguments.output).parent.mkdir(parents=True, exist_ok=True)
    main(arguments)
