"""Study of the group size: the same rollouts per step, spread over more or fewer prompts.

    python -m benchmarks.small_groups

OBLR-PO, the same without memory of prompts (they come again in these small tasks) and without gradient weights (a mean with the same
priors), with graded rewards also divided by the group's deviation as TRL's default has it, RLOO and GRPO, at every group size, all with
the trust region, so that no rate is tuned. RLOO and GRPO run again at the best constant rate of a grid with a factor of 2, at the group
size that was best for them. What is compared is the number of rollouts until a method has the accuracy that the strongest of RLOO and
GRPO ends with.

Finished runs are kept in `runs/small_groups/` and not repeated, so that a stopped study resumes. Seeds are the outermost loop: ask
for fewer seeds or tasks to see what there is.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import mean
from typing import Any

from trl import TrlParser

from benchmarks.learning import FIRST_TUNING_SEED, complete
from benchmarks.learning_runs import RunSpec
from benchmarks.learning_summary import Run, step_area
from benchmarks.policies import policy_directory
from benchmarks.rate_grids import around, best, extended
from benchmarks.record import machine, write_record
from benchmarks.sections.small_groups import markdown
from benchmarks.small_groups_summary import final, summarise

ROLLOUTS = 64  # per step
_LEARNING_RATE = 1e-6  # TRL's default, without a meaning under the trust region
_CONSTANT_RATE = 2.6e-4  # to begin a grid with
# What differs from a new prompt in every group.
TASKS: dict[str, dict[str, Any]] = {
    "chain_sum": {"policy": "chain_sum"},
    "decimal_chain_sum": {"policy": "decimal_chain_sum"},
    "products": {"policy": "products"},
    "products, easy to hard": {"policy": "products-mixed"},
    "products, easy to hard, 256 prompts": {"policy": "products-mixed", "train_size": 256},
    "spell_backward, graded": {"policy": "spell_backward"},
}
GROUP_SIZES = {
    "ours": (1, 2, 4, 8),
    "ours_scaled": (1, 2, 4),
    "ours_no_memory": (1,),
    "mean_prior": (1,),
    "rloo_kl": (2, 4, 8),
    "grpo_kl": (2, 4, 8),
}
# Where rewards are right or wrong, dividing them by their deviation is another matter than the group size.
GRADED_ONLY = ("ours_scaled",)
# By the method whose group size they take.
TUNED = {"rloo_kl": "rloo", "grpo_kl": "grpo"}


@dataclass
class SmallGroupsArguments:
    """Settings of the study; fields are documented by their `help`."""

    tasks: list[str] = field(default_factory=lambda: list(TASKS), metadata={"help": "Tasks, by name."})
    methods: list[str] = field(
        default_factory=lambda: list(GROUP_SIZES), metadata={"help": "Methods with the trust region."}
    )
    tuning_seeds: int = field(default=1, metadata={"help": "Runs at every constant rate."})
    evaluation_seeds: int = field(default=5, metadata={"help": "Runs of every method and group size."})
    num_steps: int = field(default=120, metadata={"help": "Optimizer steps of a run."})
    test_size: int = field(default=512, metadata={"help": "Held-out prompts."})
    num_workers: int = field(default=2, metadata={"help": "Processes of one thread each; 0 runs in this one."})
    runs: str = field(default="runs/small_groups", metadata={"help": "Where finished runs are kept."})
    output: str = field(default="benchmarks/results/small_groups.json", metadata={"help": "Where the numbers go."})

    def __post_init__(self) -> None:
        for name, chosen, known in (("tasks", self.tasks, TASKS), ("methods", self.methods, GROUP_SIZES)):
            if unknown := set(chosen) - set(known):
                raise ValueError(f"`{name}` has {sorted(unknown)}. Choose from: {'; '.join(known)}.")

    def spec(
        self, task: str, method: str, group_size: int, seed: int, learning_rate: float = _LEARNING_RATE
    ) -> RunSpec:
        """A run of this study."""
        return RunSpec(
            optimizer="adamw",
            method=method,
            learning_rate=learning_rate,
            seed=seed,
            num_steps=self.num_steps,
            num_prompts=ROLLOUTS // group_size,
            num_generations=group_size,
            test_size=self.test_size,
            **TASKS[task],
        )

    def complete(self, specs: Sequence[RunSpec], stage: str) -> list[Run]:
        """The runs of `specs`, made or read."""
        return complete(specs, self.runs, self.num_workers, stage)


# Task and method.
Case = tuple[str, str]
# Runs by seed, of every method and group size.
Cells = dict[tuple[str, int], list[Run]]


def untuned(args: SmallGroupsArguments) -> dict[str, Cells]:
    """Every method at every group size, by task."""
    keys = [
        (seed, task, method, group_size)
        for seed in range(args.evaluation_seeds)
        for task in args.tasks
        for method in args.methods
        if method not in GRADED_ONLY or "graded" in task
        for group_size in GROUP_SIZES[method]
    ]
    specs = [args.spec(task, method, group_size, seed) for seed, task, method, group_size in keys]
    cells: dict[str, Cells] = {task: {} for task in args.tasks}
    for (_, task, method, group_size), run in zip(keys, args.complete(specs, "trust region"), strict=True):
        cells[task].setdefault((method, group_size), []).append(run)
    return cells


def tuned(args: SmallGroupsArguments, cells: dict[str, Cells]) -> dict[str, Cells]:
    """The controls at the best constant rate, at the group size that the trust region found best for them."""
    cases: dict[Case, int] = {}
    for task in args.tasks:
        for source, method in TUNED.items():
            finals = {size: mean(map(final, runs)) for (name, size), runs in cells[task].items() if name == source}
            cases[task, method] = max(finals, key=finals.__getitem__)

    def areas(rates: dict[Case, list[float]]) -> dict[Case, dict[float, float]]:
        keys = [(case, rate, seed) for seed in range(args.tuning_seeds) for case in rates for rate in rates[case]]
        specs = [
            args.spec(*case, cases[case], FIRST_TUNING_SEED + seed, float(f"{rate:.3g}")) for case, rate, seed in keys
        ]
        runs = dict(zip(keys, args.complete(specs, "tuning"), strict=True))
        return {
            case: {
                rate: mean(step_area(runs[case, rate, seed]) for seed in range(args.tuning_seeds))
                for rate in rates[case]
            }
            for case in rates
        }

    rates = extended({case: around(_CONSTANT_RATE) for case in cases}, areas)
    keys_of_runs = [(case, seed) for seed in range(args.evaluation_seeds) for case in cases]
    specs = [args.spec(*case, cases[case], seed, float(f"{best(rates[case]):.3g}")) for case, seed in keys_of_runs]
    found: dict[str, Cells] = {task: {} for task in args.tasks}
    for ((task, method), _), run in zip(keys_of_runs, args.complete(specs, "best rate"), strict=True):
        found[task].setdefault((method, cases[task, method]), []).append(run)
    return found


def main(args: SmallGroupsArguments) -> None:
    """Run, print and write."""
    started = machine()
    for task in args.tasks:  # before two workers would make the same one
        policy_directory(TASKS[task]["policy"])
    cells = untuned(args)
    controls = tuned(args, cells)
    summary = {task: summarise(cells[task] | controls[task]) for task in args.tasks}
    print(markdown({"summary": summary, "settings": vars(args)}))
    write_record(args.output, args, started, {"summary": summary})


if __name__ == "__main__":
    (arguments,) = TrlParser([SmallGroupsArguments]).parse_args_and_config()
    main(arguments)
