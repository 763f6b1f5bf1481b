"""Time and peak memory of the scoring pass relative to training's on a GPU, at the shapes of Qwen3-0.6B to -8B.

    python -m benchmarks.gpu
    python -m benchmarks.gpu --device cpu --shape tiny --sequence_lengths 32 --profiled tiny --output runs/gpu.json

The second command rehearses the first; its numbers mean nothing. Adapters have the precision of the model, without autocast.
Passes take turns; a peak is the allocator's, over the complete pass. A pass that does not fit is recorded as
such, and the next one is measured. Without a GPU the command says so and fails, unless it is told to use the CPU.

In addition to the ratios to training: how many times as long a pass takes as its FLOPs (`benchmarks.scale`) at the rate of one large
matrix product, measured at the start; the peaks that `oblr_trl.planning` calculates, optimizer states left out; and the kernels that
take the time, of one shape's first case.
"""

import gc
import itertools
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from peft import LoraConfig
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm
from transformers import PretrainedConfig
from trl import TrlParser

from benchmarks.interleaving import rotating
from benchmarks.record import machine, write_record
from benchmarks.scale import flops_per_token
from benchmarks.score_memory import Memory, measure_memory
from benchmarks.score_workload import COMPLETION_SHARE, Case, Workload, WorkloadArguments, qwen3_config, scopes
from oblr_trl import OBLRPOConfig
from oblr_trl.planning.memory import phase_bytes, plan_memory
from oblr_trl.planning.models import PUBLISHED, meta_model
from oblr_trl.planning.setup import Backend, Setup

SHAPES: dict[str, PretrainedConfig] = {
    **{f"Qwen3-{size}": PUBLISHED[f"Qwen/Qwen3-{size}-Base"] for size in ("0.6B", "1.7B", "4B", "8B")},
    "tiny": qwen3_config(hidden_size=64, num_layers=3, vocab_size=512),
}
# In the order of their interest, should the time not suffice for all.
DEFAULT_CASES = (
    ("Qwen3-0.6B", Case(1024, checkpointing=True)),
    ("Qwen3-4B", Case(1024, checkpointing=True)),
    ("Qwen3-1.7B", Case(1024, checkpointing=True)),
    ("Qwen3-8B", Case(1024, lora=True, checkpointing=True)),
    ("Qwen3-4B", Case(4096, checkpointing=True)),
    ("Qwen3-8B", Case(1024, checkpointing=True)),
    ("Qwen3-0.6B", Case(1024)),
)
LAST_K = 2
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


# Side of the square matrices whose product gives the rate of the arithmetic.
_MATRIX_SIDE = {"cuda": 8192, "cpu": 512}
_NUM_KERNELS = 10


@dataclass
class GpuArguments(WorkloadArguments):
    """Settings of the benchmark; fields are documented by their `help`."""

    shape: list[str] | None = field(
        default=None,
        metadata={
            "help": "Shapes. With any of the next three it selects the product of all, 1024 tokens of all parameters with "
            "checkpointing unless given; with none of them a list of cases is measured.",
            "choices": list(SHAPES),
        },
    )
    sequence_lengths: list[int] | None = field(default=None, metadata={"help": "Tokens per sequence."})
    tuning: list[str] | None = field(default=None, metadata={"help": "Full or LoRA.", "choices": ["full", "lora"]})
    checkpointing: list[str] | None = field(
        default=None, metadata={"help": "Gradient checkpointing.", "choices": ["on", "off"]}
    )
    per_sequence: list[str] = field(
        default_factory=lambda: ["Qwen3-0.6B", "tiny"],
        metadata={
            "help": "Shapes whose sequences are also scored one by one, which is slow.",
            "choices": list(SHAPES),
        },
    )
    profiled: str | None = field(
        default="Qwen3-4B",
        metadata={"help": "Shape of whose first case the kernels are listed.", "choices": list(SHAPES)},
    )
    tf32: bool = field(default=False, metadata={"help": "Whether products in float32 may round to TF32."})
    rounds: int = field(default=3, metadata={"help": "Measurements of every pass; one more warms up."})
    budget: float | None = field(default=None, metadata={"help": "Seconds after which no further case is begun."})
    device: str = field(default="cuda", metadata={"help": "Where to measure.", "choices": ["cuda", "cpu"]})
    output: str = field(default="benchmarks/results/gpu.json", metadata={"help": "Where the numbers go."})

    def cases(self) -> list[tuple[str, Case]]:
        """Shapes and cases to measure."""
        chosen = (self.shape, self.sequence_lengths, self.tuning, self.checkpointing)
        if all(values is None for values in chosen):
            return list(DEFAULT_CASES)
        product = itertools.product(
            self.shape or [name for name in SHAPES if name != "tiny"],
            self.tuning or ["full"],
            self.checkpointing or ["on"],
            self.sequence_lengths or [1024],
        )
        return [(shape, Case(length, tuning == "lora", on == "on")) for shape, tuning, on, length in product]


def product_rate(device: torch.device) -> float:
    """FLOPs per second of one large matrix product, in the dtype of the models."""
    side = _MATRIX_SIDE[device.type]
    matrix = torch.randn(side, side, device=device, dtype=torch.bfloat16 if device.type == "cuda" else torch.float32)
    seconds = []
    for _ in range(4):  # the best of several: the clock rises
        memory = measure_memory(lambda: [matrix @ matrix for _ in range(8)], device)
        seconds.append(memory.seconds / 8)
    return 2 * side**3 / min(seconds)


def limits(args: GpuArguments, shape: str, case: Case, rate: float) -> dict[str, float]:
    """Seconds that the FLOPs of a pass take at the rate of a matrix product; of full fine-tuning alone."""
    if case.lora:
        return {}
    flops = flops_per_token(
        meta_model(SHAPES[shape]),
        length=case.sequence_length,
        sketch_dim=args.sketch_dim,
        last_k=LAST_K,
        checkpointing=case.checkpointing,
        completion_share=COMPLETION_SHARE,
    )
    num_tokens = args.batch_size * case.sequence_length
    passes = {"train": flops.train, "old_logps": flops.forward, "all": flops.score_all}
    passes |= {"last_k": flops.score_last_k, "lm_head": flops.score_lm_head}
    return {name: num_tokens * per_token / rate for name, per_token in passes.items()}


def planned_peaks(args: GpuArguments, shape: str, case: Case, device: torch.device) -> dict[str, int]:
    """Peaks of training, without optimizer, and of scope `all` that the planner calculates."""
    num_completion_tokens = int(case.sequence_length * COMPLETION_SHARE)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of batches that are not going to be trained on
        config = OBLRPOConfig(
            "unused",
            per_device_train_batch_size=args.batch_size,
            num_generations=args.batch_size,
            gradient_accumulation_steps=2,
            max_completion_length=num_completion_tokens,
            gradient_checkpointing=case.checkpointing,
            score_sketch_dim=args.sketch_dim,
            bf16=False,  # weights are
            use_cpu=True,
            report_to="none",
        )
        setup = Setup(
            args=config,
            backend=Backend("one process", 1, False),
            config=SHAPES[shape],
            prompt_length=case.sequence_length - num_completion_tokens,
            gpu_memory=80e9,
            peft_config=LoraConfig(r=args.lora_r, target_modules="all-linear") if case.lora else None,
            parameter_bytes=2 if device.type == "cuda" else 4,
            masked=False,
        )
        totals = phase_bytes([item for item in plan_memory(setup) if item.name != "optimizer states"])
    return {"train": totals["train"], "all": totals["score"]}


def kernels(operation: Callable[[], object], device: torch.device) -> list[dict[str, Any]]:
    """The kernels (on a CPU, operations) that take most of the time of a pass, with their seconds and their share of all."""
    on_gpu = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiler:
        operation()
        if on_gpu:
            torch.cuda.synchronize()

    def microseconds(event: Any) -> float:
        return event.self_device_time_total if on_gpu else event.self_cpu_time_total

    # On a GPU without the processor's calls that launch them.
    events = [e for e in profiler.key_averages() if not on_gpu or e.device_type == DeviceType.CUDA]
    total = sum(map(microseconds, events))
    events = sorted(events, key=microseconds, reverse=True)[:_NUM_KERNELS]
    return [
        {"name": e.key[:100], "seconds": microseconds(e) / 1e6, "share": microseconds(e) / total, "calls": e.count}
        for e in events
        if microseconds(e) > 0
    ]


def measure(
    make_workload: Callable[[], Workload],
    rounds: int,
    device: torch.device,
    *,
    names: Sequence[str] = tuple(PASSES),
    profiled: dict[str, list[dict[str, Any]]] | None = None,
) -> dict[str, dict[str, Any]]:
    """Median seconds and peak bytes of every pass of `names`, or why there are none; kernels go into `profiled`, if given."""
    measured: dict[str, list[Memory]] = {name: [] for name in names}
    try:
        workload = make_workload()
    except torch.OutOfMemoryError:
        return {name: {"error": OUT_OF_MEMORY} for name in names}
    for round_, name in rotating(list(names), rounds):
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
    if profiled is not None:
        for name in ("train", "all"):
            if name in measured:
                profiled[name] = kernels(partial(workload.run, name), device)
                workload.model.zero_grad(set_to_none=True)
    return {name: _summary(measured[name]) if name in measured else {"error": OUT_OF_MEMORY} for name in names}


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
    """Medians of seconds, peaks in GB (1e9 bytes), ratios to training's, our goal for the ratio of times, the ratio to the time that
    the FLOPs take, and the planner's peak."""
    lines = ["| case | pass | s | GB | time ratio | goal, at most | peak ratio | time over limit | GB planned |"]
    lines.append("|---" * 9 + "|")
    for case in record["cases"]:
        label = f"{case['shape']}, {case['batch_size']} x {case['sequence_length']} tokens"
        label += ", LoRA" if case["lora"] else ", all parameters"
        label += ", gradient checkpointing" if case["checkpointing"] else ""
        for name in (*PASSES, REUSED):
            if name not in case["passes"] and name not in case["ratios"]:
                continue
            description = PASSES.get(name, "scope lm_head beyond the forward that it replaces")
            result, ratio = case["passes"].get(name, {}), case["ratios"].get(name)
            seconds = f"{result['seconds']:.3f}" if "seconds" in result else result.get("error", "")
            peak = f"{result['peak'] / 1e9:.2f}" if "peak" in result else ""
            time_ratio, peak_ratio = (f"{ratio['time']:.2f}", f"{ratio['peak']:.2f}") if ratio else ("", "")
            limit, planned = case["limits"].get(name), case["planned"].get(name)
            over = f"{result['seconds'] / limit:.2f}" if limit and "seconds" in result else ""
            cells = [label, description, seconds, peak, time_ratio, str(TIME_GOALS.get(name, "")), peak_ratio, over]
            lines.append("| " + " | ".join([*cells, f"{planned / 1e9:.2f}" if planned else ""]) + " |")
    lines += ["", f"Goal for the peak of every scope: at most {PEAK_GOAL:.2f} of training's."]
    lines += [f"The limit is that of {record['product_rate'] / 1e12:.3g} TFLOP/s, the rate of one matrix product.", ""]
    for case in record["cases"]:
        for name, found in case["kernels"].items():
            lines += [f"Kernels of {PASSES[name]}, {case['shape']}, {case['sequence_length']} tokens:", ""]
            lines += ["| kernel | s | share | calls |", "|---|---|---|---|"]
            lines += [f"| `{k['name']}` | {k['seconds']:.4f} | {k['share']:.2f} | {k['calls']} |" for k in found]
            lines.append("")
    return "\n".join(lines)


def main(args: GpuArguments) -> int:
    """Measure, write, and print the table; the exit status."""
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.stderr.write("not measured: there is no GPU here. `--device cpu --shape tiny` rehearses the command.\n")
        return 1
    device, started, start = torch.device(args.device), machine(), time.monotonic()
    gc.freeze()  # of what the imports left, which every measurement would look through
    torch.set_float32_matmul_precision("high" if args.tf32 else "highest")
    rate = product_rate(device)
    results: dict[str, Any] = {"passes": PASSES, "goals": TIME_GOALS, "product_rate": rate, "cases": []}
    where = started["gpu"] if args.device == "cuda" else f"{started['cpu']} (a rehearsal: the goals are for a GPU)"
    text, to_profile = "", args.profiled
    for shape, case in tqdm(args.cases(), desc="cases"):
        if args.budget is not None and time.monotonic() - start > args.budget:
            sys.stderr.write(f"not measured for lack of time: {shape}, {case}\n")
            continue
        profiled: dict[str, list[dict[str, Any]]] = {}
        passes = measure(
            partial(Workload, args, SHAPES[shape], case, scopes(last_k=LAST_K), device),
            args.rounds,
            device,
            names=[name for name in PASSES if name != "per_sequence" or shape in args.per_sequence],
            profiled=profiled if shape == to_profile else None,
        )
        to_profile = None if profiled else to_profile
        _free(device)
        found = {"passes": passes, "ratios": ratios(passes), "limits": limits(args, shape, case, rate)}
        found |= {"planned": planned_peaks(args, shape, case, device), "kernels": profiled}
        results["cases"].append({"shape": shape, **case._asdict(), "batch_size": args.batch_size, **found})
        # After every case: what has been measured outlives a machine that is taken back.
        write_record(args.output, args, started, results)
        text = f"Measured on {where}.\n\n{table(results)}"
        Path(args.output).with_suffix(".md").write_text(text)
    sys.stdout.write(text)
    return 0


if __name__ == "__main__":
    sys.exit(main(*TrlParser([GpuArguments]).parse_args_and_config()))
