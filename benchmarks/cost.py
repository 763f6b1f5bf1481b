"""Whole training steps of `OBLRPOTrainer` against TRL's `GRPOTrainer`, step by step in turn.

    python -m benchmarks.cost            # generation by transformers; writes benchmarks/results/cost.json
    python -m benchmarks.cost --vllm     # generation by vLLM, in an environment that has it; writes cost_vllm.json
    python -m benchmarks.cost --model benchmarks/shapes/SmolLM2-135M --methods grpo all trust_region --demo_model '' --output smollm2.json

Policies are a random Qwen3 or any other model (float32, CPU, one thread) whose completions all have full length, and the demo's model. All
trainers of a comparison are alive in one process and train for real; a ratio is taken between steps of one round.
"""

import importlib.util
import os
import sys
import tempfile
from dataclasses import dataclass, field
from importlib.metadata import packages_distributions, version
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from transformers.utils import logging
from trl import TrlParser

from benchmarks.cost_trainers import DEMO_MODEL, METHODS, Case, demo_trainers, random_trainers
from benchmarks.interleaving import interleave, ratio_spread
from benchmarks.record import machine, write_record
from benchmarks.sections.cost import table

CONTROL = "grpo"
NOT_BY_VLLM = ("baseline_only", "per_sequence")


@dataclass(frozen=True)
class CostArguments(Case):
    """Settings of the study; fields are documented by their `help`."""

    rounds: int = field(default=7, metadata={"help": "Steps of every trainer in a comparison; one more warms up."})
    demo_model: str = field(default=DEMO_MODEL, metadata={"help": "The demo's model; empty leaves it out."})
    methods: list[str] = field(
        default_factory=list, metadata={"help": "Methods to compare, `grpo` among them; all if empty."}
    )
    vllm: bool = field(default=False, metadata={"help": "Generate by vLLM; then the demo's model is left out."})
    seed: int = field(default=0, metadata={"help": "Seed of weights, prompts and sampling."})
    output: str = field(
        default="", metadata={"help": "Where the numbers go; by default cost.json or, with vLLM, cost_vllm.json."}
    )


def measure_random(args: CostArguments) -> dict[str, Any]:
    """The methods on the random policy, or the model in its place."""
    methods = args.methods or [name for name in METHODS if not (args.vllm and name in NOT_BY_VLLM)]
    with tempfile.TemporaryDirectory() as folder:
        trainers = random_trainers(args, methods, Path(folder), rounds=args.rounds, seed=args.seed, use_vllm=args.vllm)
        measured = interleave(trainers, args.rounds)
    trainers[CONTROL].accelerator.end_training()
    return summarise(measured)


def measure_demo(args: CostArguments) -> dict[str, Any]:
    """The methods on the demo's model, task and batch."""
    methods = args.methods or list(METHODS)
    with tempfile.TemporaryDirectory() as folder:
        trainers = demo_trainers(args.demo_model, methods, Path(folder), rounds=args.rounds, seed=args.seed)
        return summarise(interleave(trainers, args.rounds))


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
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    started = machine()
    if args.vllm:
        started["versions"]["vllm"] = prepare_vllm()
        comparisons = {"vllm": measure_random(args)}
    else:
        comparisons = {"demo": measure_demo(args)} if args.demo_model else {}
        comparisons["transformers"] = measure_random(args)
    methods = {name: description for name, (description, _) in METHODS.items()}
    results = {"methods": methods, "comparisons": comparisons}
    write_record(args.output or f"benchmarks/results/cost{'_vllm' if args.vllm else ''}.json", args, started, results)
    sys.stdout.write(table(results) + "\n")


if __name__ == "__main__":
    main(*TrlParser([CostArguments]).parse_args_and_config())
