"""Learning study: OBLR-PO, each half of it, GRPO, RLOO and OPO, each at its own best learning rate of one grid.

    python -m benchmarks.learning

First every method runs at every rate of the grid; then, with other seeds, every method at its best one, and two
controls: the baseline of OBLR-PO at a constant rate, the average of OBLR-PO's own, and with OBLR-PO's multipliers in
shuffled order. Finished runs are kept in `runs/learning/` and not repeated, so that a stopped study resumes, and one
that was stopped for good is summarised by asking for fewer seeds. Seeds are the outermost loop of each stage: all
methods are equally far at any time.
"""

import os
import random
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import get_context
from statistics import mean
from typing import Any

from tqdm import tqdm
from trl import TrlParser

from benchmarks import learning_runs
from benchmarks.learning_runs import METHODS, RunSpec
from benchmarks.learning_summary import OURS, Run, best_rate, held_out, of_method, summarise
from benchmarks.policies import check_policies, policy_directory
from benchmarks.record import machine, write_record
from benchmarks.sections.learning import markdown

SGD_METHODS = ("oblrpo", "baseline_only", "snr_only", "dr_grpo", "rloo")
# Far from the evaluation's seeds 0, 1, ...: rates are chosen on other prompts and rollouts.
FIRST_TUNING_SEED = 100
# A run has one thread (see `prepare_process`); a library that was told earlier would start more.
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
# What a row of the record says of a run.
RUN_COLUMNS = ("stage", "policy", "optimizer", "method", "learning_rate", "seed", "mean_multiplier", "failure")
CURVES = ("accuracies", "cpu_seconds")  # the former `held_out`


@dataclass
class LearningArguments:
    """Settings of the study; fields are documented by their `help`."""

    policies: list[str] = field(
        default_factory=lambda: ["chain_sum", "spell_backward", "decimal_chain_sum"],
        metadata={"help": "Start policies."},
    )
    sgd_policies: list[str] = field(
        default_factory=lambda: ["chain_sum"], metadata={"help": "Those that are trained with SGD too."}
    )
    adamw_rates: list[float] = field(
        default_factory=lambda: [6.5e-5, 1.3e-4, 2.6e-4, 5.2e-4, 1e-3, 2.1e-3],
        metadata={"help": "Learning rates of AdamW, the same for all methods."},
    )
    sgd_rates: list[float] = field(
        default_factory=lambda: [0.05, 0.15, 0.5, 1.5], metadata={"help": "Learning rates of SGD."}
    )
    tuning_seeds: int = field(default=1, metadata={"help": "Runs at every rate."})
    evaluation_seeds: int = field(default=5, metadata={"help": "Runs at the best rate."})
    num_steps: int = field(default=40, metadata={"help": "Optimizer steps of a run."})
    num_prompts: int = field(default=16, metadata={"help": "Prompts per step."})
    num_generations: int = field(default=4, metadata={"help": "Completions per prompt."})
    eval_steps: int = field(default=10, metadata={"help": "Steps between evaluations."})
    test_size: int = field(default=512, metadata={"help": "Held-out prompts, the same for all runs of a policy."})
    num_workers: int = field(default=2, metadata={"help": "Processes of one thread each; 0 runs in this one."})
    runs: str = field(default="runs/learning", metadata={"help": "Where finished runs are kept."})
    output: str = field(default="benchmarks/results/learning.json", metadata={"help": "Where the numbers go."})

    def __post_init__(self) -> None:
        check_policies("policies", self.policies)
        check_policies("sgd_policies", self.sgd_policies)
        if self.num_steps % self.eval_steps:
            raise ValueError(
                f"`num_steps` is {self.num_steps}, not a multiple of `eval_steps` {self.eval_steps}: the curve "
                "would end before the run. Change one of them."
            )

    def cases(self) -> Iterator[tuple[str, str, Sequence[str], list[float]]]:
        """Optimizer, policy, methods and rates of every part of the study."""
        for policy in self.policies:
            yield "adamw", policy, tuple(METHODS), self.adamw_rates
        for policy in self.sgd_policies:
            yield "sgd", policy, SGD_METHODS, self.sgd_rates

    def spec(self, **settings: Any) -> RunSpec:
        """A run of this study."""
        common = ("num_steps", "num_prompts", "num_generations", "eval_steps", "test_size")
        return RunSpec(**{name: vars(self)[name] for name in common} | settings)


def tuning_specs(args: LearningArguments) -> list[RunSpec]:
    """Every method at every rate."""
    return [
        args.spec(policy=policy, optimizer=optimizer, method=method, learning_rate=rate, seed=FIRST_TUNING_SEED + seed)
        for seed in range(args.tuning_seeds)
        for optimizer, policy, methods, rates in args.cases()
        for rate in rates
        for method in methods
    ]


def evaluation_specs(args: LearningArguments, tuning: Sequence[Run]) -> list[RunSpec]:
    """Every method at its best rate, with other seeds."""
    specs = []
    for seed in range(args.evaluation_seeds):
        for optimizer, policy, methods, _ in args.cases():
            for method in methods:
                rate = best_rate(of_method(tuning, policy, optimizer, method))
                specs.append(
                    args.spec(policy=policy, optimizer=optimizer, method=method, learning_rate=rate, seed=seed)
                )
    return specs


def control_specs(args: LearningArguments, evaluation: Sequence[Run]) -> list[RunSpec]:
    """OBLR-PO's baseline at the constant average of its runs' rates, and with a run's shuffled multipliers."""
    specs = []
    for seed in range(args.evaluation_seeds):
        for optimizer, policy, _, _ in args.cases():
            runs = of_method(evaluation, policy, optimizer, OURS)
            rate = runs[0]["spec"]["learning_rate"]
            spec = partial(args.spec, policy=policy, optimizer=optimizer, seed=seed)
            average = rate * mean(mean(run["multipliers"]) for run in runs)
            specs.append(spec(method="constant_average", learning_rate=float(f"{average:.4g}")))
            multipliers = list(runs[seed]["multipliers"])
            multipliers += multipliers[-1:] * (args.num_steps - len(multipliers))  # of a run that broke off
            random.Random(seed).shuffle(multipliers)
            specs.append(spec(method="shuffled_multiplier", learning_rate=rate, multipliers=tuple(multipliers)))
    return specs


def complete(
    specs: Sequence[Any],
    directory: str,
    num_workers: int,
    stage: str,
    finished_run: Callable[[str, Any], Run] = learning_runs.finished_run,
    runs_per_process: int | None = None,
) -> list[Run]:
    """The runs of `specs` in order: each is read from `directory`, or made in one of the processes and kept there; a process is
    replaced after so many runs."""
    finish = partial(finished_run, directory)
    progress = partial(tqdm, total=len(specs), desc=f"{stage} runs")
    if not num_workers:
        return list(progress(map(finish, specs)))
    os.environ.update(ENVIRONMENT)  # says one thread before torch is imported
    with ProcessPoolExecutor(
        num_workers, mp_context=get_context("spawn"), max_tasks_per_child=runs_per_process
    ) as pool:
        return list(progress(pool.map(finish, specs)))


def main(args: LearningArguments) -> None:
    """Run both stages, print and write."""
    started = machine()
    for policy in {*args.policies, *args.sgd_policies}:  # before two workers would make the same one
        policy_directory(policy)
    tuning = complete(tuning_specs(args), args.runs, args.num_workers, "tuning")
    evaluation = complete(evaluation_specs(args, tuning), args.runs, args.num_workers, "evaluation")
    evaluation += complete(control_specs(args, evaluation), args.runs, args.num_workers, "control")
    record = {"summary": summarise(tuning, evaluation), "run_columns": (*RUN_COLUMNS, *CURVES)}
    record["runs"] = [
        published(run, stage) for stage, runs in (("tuning", tuning), ("evaluation", evaluation)) for run in runs
    ]
    print(markdown(record | {"settings": vars(args)}))
    write_record(args.output, args, started, record)


def published(run: Run, stage: str) -> list[Any]:
    """A run's row in the record: `RUN_COLUMNS`, and its curves on one line of text each."""
    multiplier = round(mean(run["multipliers"]), 4) if run["multipliers"] else None
    known = run["spec"] | {"stage": stage, "mean_multiplier": multiplier, "failure": run["failure"]}
    curves = [" ".join(f"{value:.4g}" for value in values) for values in (held_out(run), run["cpu_seconds"])]
    return [*(known[name] for name in RUN_COLUMNS), *curves]


if __name__ == "__main__":
    (arguments,) = TrlParser([LearningArguments]).parse_args_and_config()
    main(arguments)
