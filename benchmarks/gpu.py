"""Time and peak memory of the scoring pass relative to training's on a GPU, at the shapes of Qwen3-4B and -8B.

    python -m benchmarks.gpu
    python -m benchmarks.gpu --device cpu --shape tiny --sequence_lengths 32 --output runs/gpu.json

The second command rehearses the first; its numbers mean nothing. Adapters have the precision of the model, without autocast;
attention is SDPA. Passes take turns; a peak is the allocator's, over the complete pass. A pass that does not fit is recorded as
such, and the next one is measured. Without a GPU the command says so and fails, unless it is told to use the CPU.
"""

import gc
import itertools
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from tqdm import tqdm
from transformers import Qwen3Config
from trl import TrlParser

from benchmarks.interleaving import rotating
from benchmarks.record import machine, write_record
from benchmarks.score_memory import Memory, measure_memory
from benchmarks.score_workload import Case, Workload, WorkloadArguments, qwen3_config, scopes
from oblr_trl.planning.models import PUBLISHED

SHAPES: dict[str, Qwen3Config] = {
    "Qwen3-4B": PUBLISHED["Qwen/Qwen3-4B-Base"],
    "Qwen3-8B": PUBLISHED["Qwen/Qwen3-8B-Base"],
    "tiny": qwen3_config(hidden_size=64, num_layers=3, vocab_size=512),
}
PASSES = {
    "train": "training: forward + backward of TRL's loss",
    "old_logps": "forward for the old log-probabilities",
    "all": "scope all",
    "last_k": "scope last_k = 2",
    "lm_head": "scope lm_head",
    "per_sequence": "one forward + backward per sequence",
}
# The pass in addition to the old-log-prob forward that it replaces.
REUSED = "lm_head_reusing_forward"
# Our upper goals for ratios to training; the peak's is for every scoring pass.
TIME_GOALS = {"all": 0.75, "last_k": 0.45, REUSED: 0.10}
PEAK_GOAL = 1.0
OUT_OF_MEMORY = "out of memory"


@dataclass
class GpuArguments(WorkloadArguments):
    """Settings of the benchmark; fields are documented by their `help`."""

    shape: list[str] = field(
        default_factory=lambda: ["Qwen3-4B", "Qwen3-8B"], metadata={"help": "Shapes.", "choices": list(SHAPES)}
    )
    sequence_lengths: list[int] = field(
        default_factory=lambda: [1024, 4096], metadata={"help": "Tokens per sequence."}
    )
    tuning: list[str] = field(
        default_factory=lambda: ["full", "lora"], metadata={"help": "Full or LoRA.", "choices": ["full", "lora"]}
    )
    checkpointing: list[str] = field(
        default_factory=lambda: ["on", "off"], metadata={"help": "Gradient checkpointing.", "choices": ["on", "off"]}
    )
    rounds: int = field(default=3, metadata={"help": "Measurements of every pass; one more warms up."})
    device: str = field(default="cuda", metadata={"help": "Where to measure.", "choices": ["cuda", "cpu"]})
    output: str = field(default="benchmarks/results/gpu.json", metadata={"help": "Where the numbers go."})


def measure(make_workload: Callable[[], Workload], rounds: int, device: torch.device) -> dict[str, dict[str, Any]]:
    """Median seconds and peak bytes of every pass, or why there are none."""
    measured: dict[str, list[Memory]] = {name: [] for name in PASSES}
    try:
        workload = make_workload()
    except torch.OutOfMemoryError:
        return {name: {"error": OUT_OF_MEMORY} for name in PASSES}
    for round_, name in rotating(list(PASSES), rounds):
        if name not in measured:
            continue
        try:
            memory = measure_memory(partial(workload.run, name), device)
        except torch.OutOfMemoryError:
            del measured[name]
        else:
            if round_ > 0:  # the first one draws projections and warms caches
                measured[name].append(memory)
        workload.model.zero_grad(set_to_none=True)
        if name not in measured:
            _free(device)
    return {name: _summary(measured[name]) if name in measured else {"error": OUT_OF_MEMORY} for name in PASSES}


def _summary(memories: list[Memory]) -> dict[str, float]:
    return {
        "seconds": median(memory.seconds for memory in memories),
        "peak": max(memory.peak for memory in memories),
        "increment": max(memory.peak - memory.before for memory in memories),
    }


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def ratios(passes: dict[str, dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Time and peak over training's for every pass that was measured, if training was."""
    measured = {name: result for name, result in passes.items() if "error" not in result}
    train = measured.pop("train", None)
    if train is None:
        return {}
    results: dict[str, dict[str, float]] = {
        name: {"time": result["seconds"] / train["seconds"], "peak": result["peak"] / train["peak"]}
        for name, result in measured.items()
    }
    if "lm_head" in measured and "old_logps" in measured:
        results[REUSED] = {**results["lm_head"], "time": results["lm_head"]["time"] - results["old_logps"]["time"]}
    return results


def table(record: dict[str, Any]) -> str:
    """Medians of seconds, peaks in GB (1e9 bytes), ratios to training's, and our goal for the ratio of times."""
    lines = ["| case | pass | s | GB | time ratio | goal, at most | peak ratio |", "|---|---|---|---|---|---|---|"]
    for case in record["cases"]:
        label = f"{case['shape']}, {case['batch_size']} x {case['sequence_length']} tokens"
        label += ", LoRA" if case["lora"] else ", all parameters"
        label += ", gradient checkpointing" if case["checkpointing"] else ""
        for name in (*PASSES, REUSED):
            description = PASSES.get(name, "scope lm_head beyond the forward that it replaces")
            result, ratio = case["passes"].get(name, {}), case["ratios"].get(name)
            seconds = f"{result['seconds']:.3f}" if "seconds" in result else result.get("error", "")
            peak = f"{result['peak'] / 1e9:.2f}" if "peak" in result else ""
            time_ratio, peak_ratio = (f"{ratio['time']:.2f}", f"{ratio['peak']:.2f}") if ratio else ("", "")
            cells = [label, description, seconds, peak, time_ratio, str(TIME_GOALS.get(name, "")), peak_ratio]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", f"Goal for the peak of every scope: at most {PEAK_GOAL:.2f} of training's.", ""])


def main(args: GpuArguments) -> int:
    """Measure, write, and print the table; the exit status."""
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.stderr.write("not measured: there is no GPU here. `--device cpu --shape tiny` rehearses the command.\n")
        return 1
    device, started = torch.device(args.device), machine()
    results: dict[str, Any] = {"passes": PASSES, "goals": TIME_GOALS, "cases": []}
    settings = list(itertools.product(args.shape, args.tuning, args.checkpointing, args.sequence_lengths))
    for shape, tuning, checkpointing, sequence_length in tqdm(settings, desc="cases"):
        case = Case(sequence_length, lora=tuning == "lora", checkpointing=checkpointing == "on")
        make_workload = partial(Workload, args, SHAPES[shape], case, scopes(last_k=2), device)
        passes = measure(make_workload, args.rounds, device)
        _free(device)
        described = {"shape": shape, **case._asdict(), "batch_size": args.batch_size}
        results["cases"].append({**described, "passes": passes, "ratios": ratios(passes)})
        # After every case: what has been measured outlives a machine that is taken back.
        write_record(args.output, args, started, results)
    where = started["gpu"] if args.device == "cuda" else f"{started['cpu']} (a rehearsal: the goals are for a GPU)"
    text = f"Measured on {where}.\n\n{table(results)}"
    sys.stdout.write(text)
    Path(args.output).with_suffix(".md").write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main(*TrlParser([GpuArguments]).parse_args_and_config()))
