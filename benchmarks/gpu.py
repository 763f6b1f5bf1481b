"""What the scoring pass costs on a GPU at the shapes of Qwen3-4B and -8B: time and peak memory beside training's.

    python -m benchmarks.gpu
    python -m benchmarks.gpu --device cpu --shape tiny --sequence_lengths 32 --output runs/gpu.json

Weights are random, bfloat16 on a GPU (float32 on a CPU, where the numbers mean nothing and only the command is tried);
adapters are in the same precision, as under ZeRO-3, without autocast. Attention is SDPA, the micro-batch has no padding and its
last three quarters are the completion. Passes are timed in rounds
whose order rotates; a peak is the allocator's, over the whole pass. What does not fit is recorded as such, and the next
measurement goes on. Without a GPU the command says so and fails, unless it is told to use the CPU.
"""

import gc
import itertools
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from tqdm import tqdm
from trl import TrlParser

from benchmarks.gpu_workload import SCOPES, SHAPES, Case, Workload
from benchmarks.record import machine, write_record
from benchmarks.score_memory import Memory, measure_memory

PASSES = {
    "train": "training: forward + backward of TRL's loss",
    "old_logps": "forward for the old log-probabilities",
    "all": "scope all",
    "last_k": "scope last_k = 2",
    "lm_head": "scope lm_head",
    "per_sequence": "one forward + backward per sequence",
}
# Ratios to training that the project aims to stay below.
TIME_GOALS = {"all": 0.75, "last_k": 0.45, "lm_head_riding": 0.10}
PEAK_GOAL = 1.0
_GB = 1e9
OUT_OF_MEMORY = "out of memory"


@dataclass
class GpuArguments:
    """
    Settings of the benchmark.

    Args:
        shape (`list[str]`, *optional*, defaults to `["Qwen3-4B", "Qwen3-8B"]`): Any of [`SHAPES`].
        sequence_lengths (`list[int]`, *optional*, defaults to `[1024, 4096]`): Tokens per sequence.
        batch_size (`int`, *optional*, defaults to `8`): Sequences of the micro-batch.
        tuning (`list[str]`, *optional*, defaults to `["full", "lora"]`): What is trained.
        checkpointing (`list[str]`, *optional*, defaults to `["on", "off"]`): Gradient checkpointing.
        lora_r (`int`, *optional*, defaults to `16`): Rank of the adapter on all linear layers.
        sketch_dim (`int`, *optional*, defaults to `4096`): Length of a sketch.
        rounds (`int`, *optional*, defaults to `3`): Measurements of every pass; one more warms up.
        zero3 (`bool`, *optional*, defaults to `False`): Whether the model is in a ZeRO-3 engine of one process.
        device (`str`, *optional*, defaults to `"cuda"`): `"cuda"` or `"cpu"`.
        seed (`int`, *optional*, defaults to `0`): Seed of weights, tokens and projections.
        output (`str`, *optional*, defaults to `"benchmarks/results/gpu.json"`): Where the numbers go.
    """

    shape: list[str] = field(
        default_factory=lambda: ["Qwen3-4B", "Qwen3-8B"], metadata={"help": "Shapes.", "choices": list(SHAPES)}
    )
    sequence_lengths: list[int] = field(
        default_factory=lambda: [1024, 4096], metadata={"help": "Tokens per sequence."}
    )
    batch_size: int = field(default=8, metadata={"help": "Sequences of the micro-batch."})
    tuning: list[str] = field(
        default_factory=lambda: ["full", "lora"], metadata={"help": "What is trained.", "choices": ["full", "lora"]}
    )
    checkpointing: list[str] = field(
        default_factory=lambda: ["on", "off"], metadata={"help": "Gradient checkpointing.", "choices": ["on", "off"]}
    )
    lora_r: int = field(default=16, metadata={"help": "Rank of the adapter on all linear layers."})
    sketch_dim: int = field(default=4096, metadata={"help": "Length of a sketch."})
    rounds: int = field(default=3, metadata={"help": "Measurements of every pass."})
    zero3: bool = field(default=False, metadata={"help": "Put the model into a ZeRO-3 engine of one process."})
    device: str = field(default="cuda", metadata={"help": "Where to measure.", "choices": ["cuda", "cpu"]})
    seed: int = field(default=0, metadata={"help": "Seed of weights, tokens and projections."})
    output: str = field(default="benchmarks/results/gpu.json", metadata={"help": "Where the numbers go."})


def measure(
    make_workload: Callable[[], Any], names: list[str], rounds: int, device: torch.device, progress: tqdm
) -> dict[str, dict[str, Any]]:
    """Median seconds and peak bytes of every pass, or why there are none."""
    results: dict[str, dict[str, Any]] = {name: {"seconds": [], "peak": [], "increment": []} for name in names}
    try:
        workload = make_workload()
    except torch.OutOfMemoryError:
        progress.update(len(names) * (rounds + 1))
        return {name: {"error": OUT_OF_MEMORY} for name in names}
    for round_ in range(rounds + 1):
        shift = round_ % len(names)
        for name in names[shift:] + names[:shift]:
            progress.update()
            if "error" in results[name]:
                continue
            try:
                seconds, memory = _measure_once(workload, name, device)
            except torch.OutOfMemoryError:
                results[name] = {"error": OUT_OF_MEMORY}
            else:
                if round_ > 0:  # the first one draws projections and warms caches
                    results[name]["seconds"].append(seconds)
                    results[name]["peak"].append(memory.peak)
                    results[name]["increment"].append(memory.peak - memory.before)
            workload.clear()
            if "error" in results[name]:
                _free(device)
    workload.close()
    return {
        name: result
        if "error" in result
        else {"seconds": median(result["seconds"]), "peak": max(result["peak"]), "increment": max(result["increment"])}
        for name, result in results.items()
    }


def _measure_once(workload: Any, name: str, device: torch.device) -> tuple[float, Memory]:
    seconds = 0.0

    def timed() -> object:
        nonlocal seconds
        start = time.perf_counter()
        result = workload.run(name)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        return result

    memory = measure_memory(timed, device)
    return seconds, memory


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def ratios(passes: dict[str, dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Time and peak over training's for every pass that was measured, if training was."""
    measured = {name: result for name, result in passes.items() if "error" not in result}
    train = measured.get("train")
    if train is None:
        return {}
    results: dict[str, dict[str, float]] = {
        name: {"time": result["seconds"] / train["seconds"], "peak": result["peak"] / train["peak"]}
        for name, result in measured.items()
        if name != "train"
    }
    if "lm_head" in measured and "old_logps" in measured:
        extra = measured["lm_head"]["seconds"] - measured["old_logps"]["seconds"]
        results["lm_head_riding"] = {"time": extra / train["seconds"], "peak": results["lm_head"]["peak"]}
    return results


def format_table(cases: list[dict[str, Any]], started: dict[str, Any], device: str) -> str:
    """Every case as text, with verdicts on the goals."""
    where = started["gpu"] if device == "cuda" else f"{started['cpu']} (a trial of the command: no goal applies)"
    lines = [f"{where}; seconds are medians, GB (1e9 bytes) are peaks, ratios are to training"]
    for case in cases:
        lines.append(
            f"\n{case['shape']}, {case['batch_size']} x {case['sequence_length']} tokens, "
            f"{'LoRA' if case['lora'] else 'all parameters'}, gradient checkpointing "
            f"{'on' if case['checkpointing'] else 'off'}{', ZeRO-3' if case['zero3'] else ''}"
        )
        for name, result in case["passes"].items():
            line = f"  {PASSES[name]:<48}"
            if "error" in result:
                lines.append(line + result["error"])
                continue
            line += f"{result['seconds']:>9.3f} s{result['peak'] / _GB:>9.2f} GB"
            if name in case["ratios"]:
                line += _verdicts(name, case["ratios"][name], device)
            lines.append(line)
        if "lm_head_riding" in case["ratios"]:
            ratio = case["ratios"]["lm_head_riding"]
            lines.append(
                f"  {'scope lm_head riding: beyond that forward':<48}{'':>23}"
                + _verdicts("lm_head_riding", ratio, device)
            )
    return "\n".join(lines) + "\n"


def _verdicts(name: str, ratio: dict[str, float], device: str) -> str:
    line = f"   time {ratio['time']:.2f}, peak {ratio['peak']:.2f}"
    if device != "cuda" or name not in (*SCOPES, *TIME_GOALS):
        return line
    goal = TIME_GOALS.get(name)
    met = ratio["peak"] <= PEAK_GOAL and (goal is None or ratio["time"] <= goal)
    limit = f"time {goal:.2f}, " if goal is not None else ""
    return f"{line}   goal {limit}peak {PEAK_GOAL:.2f}: {'met' if met else 'MISSED'}"


def make_parser() -> TrlParser:
    """Parser of the command line; a misspelt key fails."""
    return TrlParser([GpuArguments])


def main(args: GpuArguments) -> int:
    """Measure, print and write; the exit status."""
    if args.device == "cuda" and not torch.cuda.is_available():
        print(
            "not measured: there is no GPU here. `--device cpu --shape tiny` tries the command out.", file=sys.stderr
        )
        return 1
    device, started = torch.device(args.device), machine()
    settings = itertools.product(args.shape, args.tuning, args.checkpointing, args.sequence_lengths)
    cases = [Case(shape, length, tuning == "lora", on == "on", args.zero3) for shape, tuning, on, length in settings]
    # ZeRO-3 leaves no gradient where a sequence's norm could be read from.
    names = [name for name in PASSES if not (args.zero3 and name == "per_sequence")]
    records: list[dict[str, Any]] = []
    with tqdm(total=len(cases) * len(names) * (args.rounds + 1), desc="passes measured") as progress:
        for case in cases:
            passes = measure(lambda case=case: Workload(args, case, device), names, args.rounds, device, progress)  # type: ignore[misc]
            _free(device)
            records.append({**vars(case), "batch_size": args.batch_size, "passes": passes, "ratios": ratios(passes)})
            # After every case: what has been measured outlives a machine that is taken back.
            write_record(args.output, args, started, {"passes": PASSES, "goals": TIME_GOALS, "cases": records})
    print(format_table(records, started, args.device))
    Path(args.output).with_suffix(".md").write_text("```\n" + format_table(records, started, args.device) + "```\n")
    return 0


if __name__ == "__main__":
    (arguments,) = make_parser().parse_args_and_config()
    sys.exit(main(arguments))
