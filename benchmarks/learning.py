"""Learning study: OBLR-PO, each half of it, GRPO, RLOO and OPO, each at its own best learning rate of one grid.

    python -m benchmarks.learning

First every method runs at every rate of the grid; then, with other seeds, every method at its best one, and two controls: the
baseline of OBLR-PO at a constant rate, the average of OBLR-PO's own, and with OBLR-PO's factors in shuffled order. Finished runs
are kept in `runs/learning/` and not repeated, so a stopped study goes on where it was, and one that was stopped for good is
summarised by asking for fewer seeds. Seeds are the outermost loop of each stage: all methods are equally far at any time.
"""

import json
import multiprocessing
import os
import random
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

from tqdm import tqdm
from trl import TrlParser

from benchmarks import learning_runs
from benchmarks.learning_runs import METHODS, OPTIMIZERS, RunSpec, prepare_process
from benchmarks.learning_summary import OURS, Run, best_rate, of_method, summarise
from benchmarks.policies import POLICIES, policy_directory
from benchmarks.record import machine, write_record

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


@dataclass
class LearningArguments:
    """
    Settings of the study.

    Args:
        policies (`list[str]`, *optional*, defaults to `["chain_sum", "spell_backward", "decimal_chain_sum"]`): Start policies.
        sgd_policies (`list[str]`, *optional*, defaults to `["chain_sum"]`): Those that are trained with SGD too.
        adamw_rates (`list[float]`, *optional*): Learning rates of AdamW, the same for all methods.
        sgd_rates (`list[float]`, *optional*): Learning rates of SGD.
        tuning_seeds (`int`, *optional*, defaults to `1`): Runs at every rate.
        evaluation_seeds (`int`, *optional*, defaults to `5`): Runs at the best rate.
        num_steps (`int`, *optional*, defaults to `40`): Optimizer steps of a run.
        num_prompts (`int`, *optional*, defaults to `16`): Prompts per step.
        num_generations (`int`, *optional*, defaults to `4`): Completions per prompt.
        eval_steps (`int`, *optional*, defaults to `10`): Steps between evaluations.
        test_size (`int`, *optional*, defaults to `512`): Held-out prompts.
        num_workers (`int`, *optional*, defaults to `2`): Processes of one thread each; 0 runs in this one.
        runs (`str`, *optional*, defaults to `"runs/learning/runs.jsonl"`): Finished runs.
        output (`str`, *optional*, defaults to `"benchmarks/results/learning.json"`): Where the numbers go.
    """

    policies: list[str] = field(
        default_factory=lambda: ["chain_sum", "spell_backward", "decimal_chain_sum"],
        metadata={"help": "Start policies."},
    )
    sgd_policies: list[str] = field(
        default_factory=lambda: ["chain_sum"], metadata={"help": "Those that are trained with SGD too."}
    )
    adamw_rates: list[float] = field(
        default_factory=lambda: [6.5e-5, 1.3e-4, 2.6e-4, 5.2e-4, 1e-3, 2.1e-3],
        metadata={"help": "Learning rates of AdamW."},
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
    test_size: int = field(default=512, metadata={"help": "Held-out prompts."})
    num_workers: int = field(default=2, metadata={"help": "Processes of one thread each; 0 runs in this one."})
    runs: str = field(default="runs/learning/runs.jsonl", metadata={"help": "Finished runs."})
    output: str = field(default="benchmarks/results/learning.json", metadata={"help": "Where the numbers go."})

    def __post_init__(self) -> None:
        for name in ("policies", "sgd_policies"):
            unknown = [policy for policy in getattr(self, name) if policy not in POLICIES]
            if unknown:
                raise ValueError(f"`{name}` names {unknown}, which do not exist: choose of {', '.join(POLICIES)}.")
        for name in ("tuning_seeds", "evaluation_seeds", "num_steps", "eval_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` is {getattr(self, name)}, but it counts: set at least 1.")
        if self.num_steps % self.eval_steps:
            raise ValueError(
                f"`num_steps` is {self.num_steps}, not a multiple of `eval_steps` {self.eval_steps}: the curve would end "
                "before the run. Change one of them."
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
        return RunSpec(**{name: getattr(self, name) for name in common} | settings)


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
    return [
        args.spec(
            policy=policy,
            optimizer=optimizer,
            method=method,
            learning_rate=best_rate(of_method(tuning, policy, optimizer, method)),
            seed=seed,
        )
        for seed in range(args.evaluation_seeds)
        for optimizer, policy, methods, _ in args.cases()
        for method in methods
    ]


def control_specs(args: LearningArguments, evaluation: Sequence[Run]) -> list[RunSpec]:
    """OBLR-PO's baseline at the constant average of its runs' rates, and with a run's factors in shuffled order."""
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


def read_runs(path: Path) -> dict[str, Run]:
    """Finished runs by key. A last line that a kill cut short is left out."""
    runs: dict[str, Run] = {}
    if path.is_file():
        for line in path.read_text().splitlines(keepends=True):
            if line.endswith("\n"):
                run = json.loads(line)
                runs[run["key"]] = run
    return runs


def complete(specs: Sequence[RunSpec], path: Path, num_workers: int, stage: str) -> list[Run]:
    """Run what is missing of `specs`, append it to `path` run by run, and return the runs of `specs` in order."""
    runs = read_runs(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Whole lines only: what follows a cut one would be unreadable.
    path.write_text("".join(json.dumps(run) + "\n" for run in runs.values()))
    missing = [spec for spec in specs if spec.key not in runs]
    with path.open("a") as file, _workers(num_workers) as finish:
        for run in tqdm(finish(missing), total=len(missing), desc=f"{stage} runs"):
            file.write(json.dumps(run) + "\n")
            file.flush()
            runs[run["key"]] = run
    return [runs[spec.key] for spec in specs]


@contextmanager
def _workers(num_workers: int) -> Iterator[Any]:
    """A function that runs specifications, in processes whose environment says one thread before torch is imported."""
    if not num_workers:
        yield partial(map, learning_runs.run)
        return
    os.environ.update(ENVIRONMENT)
    with multiprocessing.get_context("spawn").Pool(num_workers, prepare_process) as pool:
        yield partial(_in_order_started, pool)


def _in_order_started(pool: Any, specs: Sequence[RunSpec]) -> Iterable[Run]:
    return pool.imap_unordered(learning_runs.run, specs)


def print_summary(summary: dict[str, dict[str, Any]]) -> None:
    """Print area, final accuracy and the differences of every part."""
    for optimizer, policies in summary.items():
        for policy, part in policies.items():
            print(
                f"\n{policy}, {optimizer}: start {part['start_accuracy']:.3f}; best rate at the edge of the grid: {part['at_edge']}"
            )
            for method, cell in part["evaluation"].items():
                difference = part["ours_minus"].get(method, {}).get("area")
                interval = (
                    ""
                    if difference is None
                    else "  ours minus it {mean:+.3f} [{low:+.3f}, {high:+.3f}]".format(**difference)
                )
                print(
                    f"  {method:<20} rate {cell['learning_rate']:<9.2g} factor {cell['mean_multiplier']:.2f}  "
                    f"area {cell['area']['mean']:.3f}  final {cell['final']['mean']:.3f}{interval}"
                )


def make_parser() -> TrlParser:
    """Parser of the command line; a misspelt key fails."""
    dataclass_types: list[Any] = [LearningArguments]
    return TrlParser(dataclass_types)


def main(args: LearningArguments) -> None:
    """Run both stages, print and write."""
    started = machine()
    for policy in {*args.policies, *args.sgd_policies}:  # before two workers would make the same one
        policy_directory(policy)
    path = Path(args.runs)
    tuning = complete(tuning_specs(args), path, args.num_workers, "tuning")
    evaluation = complete(evaluation_specs(args, tuning), path, args.num_workers, "evaluation")
    evaluation += complete(control_specs(args, evaluation), path, args.num_workers, "control")
    summary = summarise(tuning, evaluation)
    print_summary(summary)
    stages = {"tuning": tuning, "evaluation": evaluation}
    runs = [_published(run, stage) for stage, finished in stages.items() for run in finished]
    write_record(args.output, args, started, {"optimizers": OPTIMIZERS, "summary": summary, "runs": runs})


def _published(run: Run, stage: str) -> dict[str, Any]:
    """What the record says of a run: its curve on one line of text, beside what no setting says already."""
    settings = {name: run["spec"][name] for name in ("policy", "optimizer", "method", "learning_rate", "seed")}
    curves = {name: " ".join(f"{value:.4g}" for value in run[name]) for name in ("accuracies", "cpu_seconds")}
    multiplier = round(mean(run["multipliers"]), 4) if run["multipliers"] else None
    return {"stage": stage, **settings, **curves, "mean_multiplier": multiplier, "failure": run["failure"]}


if __name__ == "__main__":
    (arguments,) = make_parser().parse_args_and_config()
    main(arguments)
