"""Whole training steps of `OBLRPOTrainer` against TRL's `GRPOTrainer`, step by step in turn, and how their costs grow.

    python -m benchmarks.cost            # generation by transformers; writes benchmarks/results/cost.json
    python -m benchmarks.cost --vllm     # generation by vLLM, in an environment that has it; writes cost_vllm.json

Policies are random Qwen3 models (float32, CPU, one thread) whose completions all have full length, and the demo's model. All
trainers of a comparison are alive in one process and train for real; a ratio is taken between steps of one round. What is
compared to training alone, without generation, is in `benchmarks.score_pass`.
"""

import os
import sys
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from tqdm import tqdm
from transformers.utils import logging
from trl import TrlParser

from benchmarks.cost_steps import interleave
from benchmarks.cost_summary import CONTROL, slopes, summarise
from benchmarks.cost_trainers import (
    DEMO_MODEL,
    METHODS,
    Case,
    case_record,
    demo_trainers,
    random_trainers,
    save_policy,
)
from benchmarks.cost_worker import run_processes
from benchmarks.record import machine, write_record

# What grows with cost: the axes' names, as the section shows them, with the case's field.
AXES = {
    "completion length": "completion_length",
    "completions per prompt (G)": "num_generations",
    "hidden size": "hidden_size",
    "layers": "num_layers",
}
PROCESSES = "processes"
SCALED = "all"
VLLM_METHODS = [name for name in METHODS if name not in ("baseline_only", "per_sequence")]
_OUTPUTS = {False: "benchmarks/results/cost.json", True: "benchmarks/results/cost_vllm.json"}


@dataclass
class CostArguments:
    """
    Settings of the study. The lists hold the values of one axis; other axes stay at the comparison's.

    Args:
        hidden_size (`int`, *optional*, defaults to `256`): Hidden features; the MLP has 3 times as many.
        num_layers (`int`, *optional*, defaults to `4`): Decoder blocks.
        vocab_size (`int`, *optional*, defaults to `2048`): Vocabulary.
        prompt_length (`int`, *optional*, defaults to `16`): Tokens per prompt.
        completion_length (`int`, *optional*, defaults to `64`): Tokens per completion.
        num_prompts (`int`, *optional*, defaults to `4`): Prompts per step and process.
        num_generations (`int`, *optional*, defaults to `8`): Completions per prompt.
        completion_lengths (`list[int]`, *optional*): Axis.
        group_sizes (`list[int]`, *optional*): Axis.
        hidden_sizes (`list[int]`, *optional*): Axis.
        depths (`list[int]`, *optional*): Axis.
        num_processes (`list[int]`, *optional*): Axis, DDP with one thread per process and one batch per process.
        rounds (`int`, *optional*, defaults to `7`): Steps of every trainer in a comparison; one more warms up.
        scaling_rounds (`int`, *optional*, defaults to `3`): The same for the axes.
        demo_model (`str`, *optional*): The demo's model; empty leaves its comparison out.
        vllm (`bool`, *optional*, defaults to `False`): Generate by vLLM; then there are no axes.
        seed (`int`, *optional*, defaults to `0`): Seed of weights, prompts and sampling.
        output (`str`, *optional*): Where the numbers go; by default `cost.json`, with vLLM `cost_vllm.json`.
    """

    hidden_size: int = field(default=256, metadata={"help": "Hidden features; the MLP has 3 times as many."})
    num_layers: int = field(default=4, metadata={"help": "Decoder blocks."})
    vocab_size: int = field(default=2048, metadata={"help": "Vocabulary."})
    prompt_length: int = field(default=16, metadata={"help": "Tokens per prompt."})
    completion_length: int = field(default=64, metadata={"help": "Tokens per completion."})
    num_prompts: int = field(default=4, metadata={"help": "Prompts per step and process."})
    num_generations: int = field(default=8, metadata={"help": "Completions per prompt."})
    completion_lengths: list[int] = field(default_factory=lambda: [16, 32, 64, 128], metadata={"help": "Axis."})
    group_sizes: list[int] = field(default_factory=lambda: [2, 4, 8, 16], metadata={"help": "Axis."})
    hidden_sizes: list[int] = field(default_factory=lambda: [128, 256, 384, 512], metadata={"help": "Axis."})
    depths: list[int] = field(default_factory=lambda: [2, 4, 6, 8], metadata={"help": "Axis."})
    num_processes: list[int] = field(default_factory=lambda: [1, 2], metadata={"help": "Axis, under DDP."})
    rounds: int = field(default=7, metadata={"help": "Steps of every trainer in a comparison."})
    scaling_rounds: int = field(default=3, metadata={"help": "Steps of every trainer on the axes."})
    demo_model: str = field(default=DEMO_MODEL, metadata={"help": "The demo's model; empty leaves it out."})
    vllm: bool = field(default=False, metadata={"help": "Generate by vLLM."})
    seed: int = field(default=0, metadata={"help": "Seed of weights, prompts and sampling."})
    output: str | None = field(default=None, metadata={"help": "Where the numbers go."})

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
        if self.output is None:
            self.output = _OUTPUTS[self.vllm]

    def axes(self) -> dict[str, list[int]]:
        """The values of every axis by its name."""
        return dict(
            zip(AXES, (self.completion_lengths, self.group_sizes, self.hidden_sizes, self.depths), strict=True)
        )

    def case(self) -> Case:
        """The comparison's policy and batch."""
        return Case(
            self.hidden_size,
            self.num_layers,
            self.vocab_size,
            self.prompt_length,
            self.completion_length,
            self.num_prompts,
            self.num_generations,
        )


def measure(case: Case, methods: list[str], rounds: int, args: CostArguments, progress: tqdm) -> dict[str, Any]:
    """One interleaved measurement in this process, on a random policy."""
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        save_policy(case, directory / "policy", args.seed)
        trainers = random_trainers(case, methods, directory, rounds=rounds, seed=args.seed, use_vllm=args.vllm)
        return {"case": case_record(case), **summarise(interleave(trainers, rounds, progress))}


def measure_demo(args: CostArguments, methods: list[str], progress: tqdm) -> dict[str, Any]:
    """The same on the demo's model, task and batch."""
    with tempfile.TemporaryDirectory() as folder:
        trainers = demo_trainers(args.demo_model, methods, Path(folder), rounds=args.rounds, seed=args.seed)
        return summarise(interleave(trainers, args.rounds, progress))


def measure_axes(args: CostArguments, progress: tqdm) -> dict[str, Any]:
    """How control and default grow along every axis; what several axes share is measured once."""
    pair = [CONTROL, SCALED]
    measured: dict[Case, dict[str, Any]] = {}
    axes = {}
    for axis, values in args.axes().items():
        cases = [replace(args.case(), **{AXES[axis]: value}) for value in values]
        for case in cases:
            if case not in measured:
                measured[case] = measure(case, pair, args.scaling_rounds, args, progress)
        axes[axis] = _axis(values, [measured[case] for case in cases])
    cases_by_processes = []
    for number in args.num_processes:
        with tempfile.TemporaryDirectory() as folder:
            seconds = run_processes(
                number, args.case(), pair, Path(folder), rounds=args.scaling_rounds, seed=args.seed
            )
        progress.update(len(pair) * (args.scaling_rounds + 1))
        cases_by_processes.append({"case": case_record(args.case()), **summarise(seconds)})
    axes[PROCESSES] = _axis(args.num_processes, cases_by_processes)
    return axes


def _axis(values: list[int], cases: list[dict[str, Any]]) -> dict[str, Any]:
    sizes = [float(value) for value in values]
    fitted = slopes(sizes, cases, SCALED) if len(set(values)) > 1 else {}
    return {"values": values, "cases": cases, "slopes": fitted}


def num_steps(args: CostArguments) -> int:
    """Steps of all trainers together."""
    if args.vllm:
        return len(VLLM_METHODS) * (args.rounds + 1)
    comparisons = len(METHODS) * (args.rounds + 1) * (2 if args.demo_model else 1)
    cases = {replace(args.case(), **{AXES[axis]: value}) for axis, values in args.axes().items() for value in values}
    return comparisons + 2 * (args.scaling_rounds + 1) * (len(cases) + len(args.num_processes))


def make_parser() -> TrlParser:
    """Parser of the command line; a misspelt key fails."""
    return TrlParser([CostArguments])


def main(args: CostArguments) -> None:
    """Measure and write."""
    torch.set_num_threads(1)
    logging.disable_progress_bar()  # of the models that are loaded; the steps have their own
    logging.set_verbosity_error()
    started = machine()
    comparisons: dict[str, Any] = {}
    results: dict[str, Any] = {"methods": METHODS, "comparisons": comparisons}
    with tqdm(total=num_steps(args), desc="training steps") as progress:
        if args.vllm:
            from benchmarks.cost_vllm import prepare

            started["versions"]["vllm"] = prepare()
            comparisons["vllm"] = measure(args.case(), VLLM_METHODS, args.rounds, args, progress)
        else:
            if args.demo_model:
                comparisons["demo"] = measure_demo(args, list(METHODS), progress)
            comparisons["transformers"] = measure(args.case(), list(METHODS), args.rounds, args, progress)
            results["scaling"] = measure_axes(args, progress)
    assert args.output is not None  # set by the arguments themselves
    write_record(args.output, args, started, results)
    for name, comparison in comparisons.items():
        for method, ratio in comparison["ratios"].items():
            numbers = f"{ratio['median']:.2f} [{ratio['lower']:.2f}, {ratio['upper']:.2f}]"
            sys.stdout.write(f"{name:<14}{METHODS[method]:<55}{numbers} of a GRPO step\n")


if __name__ == "__main__":
    (arguments,) = make_parser().parse_args_and_config()
    main(arguments)
