"""Whole training steps of `OBLRPOTrainer` against TRL's `GRPOTrainer`, step by step in turn, and how their costs grow.

    python -m benchmarks.cost            # generation by transformers; writes benchmarks/results/cost.json
    python -m benchmarks.cost --vllm     # generation by vLLM, in an environment that has it; writes cost_vllm.json

Policies are random Qwen3 models (float32, CPU, one thread) whose completions all have full length, and the demo's model. All
trainers of a comparison are alive in one process and train for real; a ratio is taken between steps of one round. How the
scoring pass compares to training alone, without generation, is in `benchmarks.score_pass`.
"""

import importlib.util
import os
import sys
import tempfile
from collections.abc import Callable, Hashable
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from importlib.metadata import packages_distributions, version
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import torch
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from tqdm import tqdm
from transformers.utils import logging
from trl import TrlParser

from benchmarks.cost_trainers import DEMO_MODEL, METHODS, Case, demo_trainers, random_trainers
from benchmarks.interleaving import interleave, ratio_spread
from benchmarks.record import machine, write_record
from benchmarks.sections.cost import table

# The axes' names, as the section shows them, with the case's field.
AXES = {
    "completion length": "completion_length",
    "completions per prompt (G)": "num_generations",
    "hidden size": "hidden_size",
    "layers": "num_layers",
}
PROCESSES = "processes"
CONTROL, SCALED = "grpo", "all"
VLLM_METHODS = [name for name in METHODS if name not in ("baseline_only", "per_sequence")]


@dataclass(frozen=True)
class CostArguments(Case):
    """Settings of the study; fields are documented by their `help`. A list holds the values of one axis."""

    completion_lengths: list[int] = field(default_factory=lambda: [16, 32, 64, 128], metadata={"help": "Axis."})
    group_sizes: list[int] = field(default_factory=lambda: [2, 4, 8, 16], metadata={"help": "Axis."})
    hidden_sizes: list[int] = field(default_factory=lambda: [128, 256, 384, 512], metadata={"help": "Axis."})
    depths: list[int] = field(default_factory=lambda: [2, 4, 6, 8], metadata={"help": "Axis."})
    num_processes: list[int] = field(
        default_factory=lambda: [1, 2], metadata={"help": "Axis: DDP, one thread and one batch per process."}
    )
    rounds: int = field(default=7, metadata={"help": "Steps of every trainer in a comparison; one more warms up."})
    scaling_rounds: int = field(default=3, metadata={"help": "The same on the axes."})
    demo_model: str = field(default=DEMO_MODEL, metadata={"help": "The demo's model; empty leaves it out."})
    vllm: bool = field(default=False, metadata={"help": "Generate by vLLM; then there are no axes."})
    seed: int = field(default=0, metadata={"help": "Seed of weights, prompts and sampling."})
    output: str = field(
        default="", metadata={"help": "Where the numbers go; by default cost.json or, with vLLM, cost_vllm.json."}
    )

    def __post_init__(self) -> None:
        if self.rounds < 1 or self.scaling_rounds < 1:
            raise ValueError(
                f"`rounds` and `scaling_rounds` must be at least 1, got {self.rounds} and {self.scaling_rounds}: a ratio needs "
                "a step of each trainer."
            )
        if min([*self.group_sizes, self.num_generations]) < 2:
            raise ValueError(
                "`num_generations` and `group_sizes` must be at least 2: the control compares completions."
            )

    def axes(self) -> dict[str, list[int]]:
        """The values of every axis by its name."""
        values = (self.completion_lengths, self.group_sizes, self.hidden_sizes, self.depths)
        return dict(zip(AXES, values, strict=True))

    def case(self, **changes: int) -> Case:
        """The comparison's policy and batch, with other values of some fields."""
        settings = asdict(self) | changes
        return Case(**{field.name: settings[field.name] for field in fields(Case)})


def set_up_process() -> None:
    """One thread, and no progress bars of the models that are loaded."""
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    logging.set_verbosity_error()


def measure(args: CostArguments, case: Case, methods: list[str], rounds: int) -> dict[str, Any]:
    """One interleaved measurement in this process, on a random policy."""
    set_up_process()
    with tempfile.TemporaryDirectory() as folder:
        trainers = random_trainers(case, methods, Path(folder), rounds=rounds, seed=args.seed, use_vllm=args.vllm)
        measured = interleave(trainers, rounds)
    accelerator = trainers[CONTROL].accelerator
    accelerator.end_training()
    return {"case": asdict(case), "num_processes": accelerator.num_processes, **summarise(measured)}


def measure_demo(args: CostArguments) -> dict[str, Any]:
    """All methods on the demo's model, task and batch."""
    with tempfile.TemporaryDirectory() as folder:
        trainers = demo_trainers(args.demo_model, list(METHODS), Path(folder), rounds=args.rounds, seed=args.seed)
        return summarise(interleave(trainers, args.rounds))


def measure_processes(args: CostArguments, num_processes: int) -> dict[str, Any]:
    """Control and default on so many processes under DDP, as the first process measures them."""
    rendezvous = {"run_id": "cost", "rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0"}
    launch = LaunchConfig(min_nodes=1, max_nodes=1, nproc_per_node=num_processes, max_restarts=0, **rendezvous)
    measured = elastic_launch(launch, measure)(args, args.case(), [CONTROL, SCALED], args.scaling_rounds)[0]
    assert measured["num_processes"] == num_processes  # some ways of launching start a single process and say nothing
    return measured


def summarise(measured: dict[str, dict[str, list[float]]]) -> dict[str, Any]:
    """The record of one interleaved measurement: raw seconds, and ratios to the control's step of the same round."""
    control = measured["seconds"][CONTROL]
    steps = {name: seconds for name, seconds in measured["seconds"].items() if name != CONTROL}
    return {
        **measured,
        "ratios": {name: ratio_spread(seconds, control) for name, seconds in steps.items()},
        "pass_over_control": {
            name: ratio_spread(seconds, control) for name, seconds in measured["pass_seconds"].items()
        },
    }


def log_log_slope(sizes: list[int], costs: list[float]) -> dict[str, float | None]:
    r"""
    Least-squares slope s of \\( \log c = a + s \log x \\) (1: the cost doubles with the size), and its standard error for
    independent residuals; `None` where two sizes leave no residual.
    """
    x, y = np.log(sizes), np.log(costs)
    if len(x) < 3:
        return {"slope": float(np.polyfit(x, y, 1)[0]), "standard_error": None}
    coefficients, covariance = np.polyfit(x, y, 1, cov=True)
    return {"slope": float(coefficients[0]), "standard_error": float(covariance[0, 0]) ** 0.5}


def axis(values: list[int], cases: list[dict[str, Any]]) -> dict[str, Any]:
    """One axis of the record, with the growth of costs by medians over rounds where there is more than one size."""
    costs = {
        "control_step": [median(case["seconds"][CONTROL]) for case in cases],
        "step": [median(case["seconds"][SCALED]) for case in cases],
        "pass": [median(case["pass_seconds"][SCALED]) for case in cases],
        "ratio": [case["ratios"][SCALED]["median"] for case in cases],
        "pass_over_control": [case["pass_over_control"][SCALED]["median"] for case in cases],
    }
    several = len(set(values)) > 1
    slopes = {name: log_log_slope(values, numbers) for name, numbers in costs.items()} if several else {}
    return {"values": values, "cases": cases, "slopes": slopes}


def planned(args: CostArguments) -> dict[Hashable, Callable[[], dict[str, Any]]]:
    """Every measurement once, by the name of the comparison, the case of an axis, or the number of processes."""
    if args.vllm:
        return {"vllm": partial(measure, args, args.case(), VLLM_METHODS, args.rounds)}
    jobs: dict[Hashable, Callable[[], dict[str, Any]]] = (
        {"demo": partial(measure_demo, args)} if args.demo_model else {}
    )
    jobs["transformers"] = partial(measure, args, args.case(), list(METHODS), args.rounds)
    for name, values in args.axes().items():
        for case in (args.case(**{AXES[name]: value}) for value in values):
            jobs[case] = partial(measure, args, case, [CONTROL, SCALED], args.scaling_rounds)
    return jobs | {number: partial(measure_processes, args, number) for number in args.num_processes}


def prepare_vllm() -> str:
    """Let vLLM's CPU backend load new weights, and keep one engine that all trainers take turns with; returns its version."""
    if importlib.util.find_spec("vllm") is None:
        raise ValueError(
            "`vllm` needs vLLM, which is not installed in this environment. Run `make bench-vllm`, or leave the option out."
        )
    os.environ |= {"VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1"}
    from tests.vllm import cures
    from tests.vllm.launch import keep_engine

    cures.cure_weight_sync()
    cures.cure_precision()
    keep_engine()
    return version(packages_distributions()["vllm"][0])


def main(args: CostArguments) -> None:
    """Measure, write, and print the table."""
    set_up_process()
    started = machine()
    if args.vllm:
        started["versions"]["vllm"] = prepare_vllm()
    measured = {key: job() for key, job in tqdm(planned(args).items(), desc="measurements")}
    comparisons = {name: result for name, result in measured.items() if isinstance(name, str)}
    methods = {name: description for name, (description, _) in METHODS.items()}
    results: dict[str, Any] = {"methods": methods, "comparisons": comparisons}
    if not args.vllm:
        results["scaling"] = {
            name: axis(values, [measured[args.case(**{AXES[name]: value})] for value in values])
            for name, values in args.axes().items()
        }
        results["scaling"][PROCESSES] = axis(args.num_processes, [measured[number] for number in args.num_processes])
    write_record(args.output or f"benchmarks/results/cost{'_vllm' if args.vllm else ''}.json", args, started, results)
    sys.stdout.write(table(results) + "\n")


if __name__ == "__main__":
    main(*TrlParser([CostArguments]).parse_args_and_config())
