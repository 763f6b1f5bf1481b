"""Peak memory of a scoring pass relative to training on the same micro-batch, each in fresh processes.

    python -m benchmarks.score_memory

Training is the forward and backward of TRL's loss up to the gradients of the parameters, with TRL's fused output projection.
A peak is the kernel's high-water mark of resident memory, reset before the pass (`/proc/self/clear_refs`), so that neither
imports nor the building of the model count; malloc is told to return every freed block at once. Two ratios:

- increment: what the peak adds to the state before. Training starts without gradients and makes them, as after
  `zero_grad(set_to_none=True)`; a scoring pass makes its projections, as in the first step. Our goal is about this one;
- floor: relative to training that starts with its gradients allocated, and whose output projection works in tiles of an eighth
  of the tokens. Without Triton, TRL's keeps about eight arrays of tokens times vocabulary where its kernels keep one, which
  flatters the other ratio.
"""

import gc
import itertools
import os
import re
import sys
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from tqdm import tqdm
from trl import TrlParser
from trl.kernels import chunked_logprob

from benchmarks.record import machine, write_record
from benchmarks.score_workload import CPU, Case, Workload, WorkloadArguments, qwen3_config, scopes
from benchmarks.sections.score_memory import table

SCORES: dict[str, dict[str, Any]] = scopes(last_k=1)
PASSES = {
    "train": "training: forward + backward of TRL's loss, starting without gradients",
    "train_floor": "the same, starting with gradients, with TRL's output projection in small tiles",
    "all": "scope all, sketches",
    "last_k": "scope last_k = 1, sketches",
    "lm_head": "scope lm_head, sketches",
}
# Arrays of a tile's size that TRL's output projection keeps without Triton, about.
_TILE_COPIES = 8
# Our upper goal for the increment of every scoring pass over that of training.
TARGET = 1.0
ENVIRONMENT = {
    # Every block from 64 KiB on is a mapping of its own, which leaves the process when it is freed: resident memory then
    # follows the tensors alive, and not the history of one heap.
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
    # Matrix products of MKL otherwise keep their work space.
    "MKL_DISABLE_FAST_MM": "1",
}


@dataclass
class ScoreMemoryArguments(WorkloadArguments):
    """Settings of the benchmark; fields are documented by their `help`."""

    hidden_size: int = field(default=256, metadata={"help": "Hidden features d; the MLP has 3 d."})
    num_layers: int = field(default=8, metadata={"help": "Decoder blocks."})
    vocab_size: int = field(default=8192, metadata={"help": "Vocabulary."})
    batch_size: int = field(default=4, metadata={"help": "Sequences of the micro-batch."})
    sequence_lengths: list[int] = field(
        default_factory=lambda: [256], metadata={"help": "Tokens per sequence, four cases each."}
    )
    repeats: int = field(default=3, metadata={"help": "Fresh processes per measurement."})
    num_threads: int = field(default=1, metadata={"help": "Threads of a measured pass."})
    output: str = field(default="benchmarks/results/score_memory.json", metadata={"help": "Where the numbers go."})


class Memory(NamedTuple):
    """Bytes of memory before an operation and at most while it runs, and the seconds that it takes."""

    before: int
    peak: int
    seconds: float = 0.0


def measure_memory(operation: Callable[[], object], device: torch.device) -> Memory:
    """Memory of this process (CPU) or of its tensors (GPU) while `operation` runs; its result is kept until the end."""
    gc.collect()
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark falls to what is resident now
    before = torch.cuda.memory_allocated() if on_gpu else _resident("VmRSS")
    start = time.perf_counter()
    result = operation()
    if on_gpu:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    peak = torch.cuda.max_memory_allocated() if on_gpu else _resident("VmHWM")
    del result
    return Memory(before, peak, seconds)


def _resident(counter: str) -> int:
    match = re.search(rf"^{counter}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert match is not None
    return int(match[1]) * 1024


def warm_workload(args: ScoreMemoryArguments, case: Case) -> Workload:
    """A workload after one short sequence through everything: code is paged in, work space is made, nothing else stays."""
    config = qwen3_config(args.hidden_size, args.num_layers, args.vocab_size)
    workload = Workload(args, config, case, SCORES)
    input_ids, workload.input_ids = workload.input_ids, workload.input_ids[:1, :8]
    for name in ("train", *SCORES):
        workload.run(name)
        workload.model.zero_grad(set_to_none=True)
    workload.forget_projections()
    workload.input_ids = input_ids
    return workload


def measure_pass(args: ScoreMemoryArguments, case: Case, name: str) -> Memory:
    """Memory of one pass, measured in the process that calls, which is of no use to others afterwards."""
    warnings.simplefilter("ignore", FutureWarning)  # once per process, of transformers' renamed checkpointing
    torch.set_num_threads(args.num_threads)
    workload = warm_workload(args, case)
    if name == "train_floor":
        for parameter in workload.model.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.full_like(parameter, 1e-3)  # in memory, which zeros might not be
        num_positions = min(workload.input_ids.numel(), chunked_logprob.TOKEN_CHUNK_SIZE)
        chunked_logprob.TOKEN_CHUNK_SIZE = max(num_positions // _TILE_COPIES, 1)
    return measure_memory(lambda: workload.run(name if name in SCORES else "train"), CPU)


def fresh_processes() -> ProcessPoolExecutor:
    """Every call in a process of its own, forked from one that has imported the libraries and done nothing else."""
    os.environ.update(ENVIRONMENT)  # read by malloc when the fork server starts
    context = get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.score_workload"])
    return ProcessPoolExecutor(1, mp_context=context, max_tasks_per_child=1)


def summarize(measured: dict[str, list[Memory]]) -> dict[str, dict[str, Any]]:
    """Median increment of every pass over its processes, in bytes, and ratios of medians to training's."""
    summary: dict[str, dict[str, Any]] = {}
    for name, memories in measured.items():
        summary[name] = {"increment": median(memory.peak - memory.before for memory in memories)}
    for name in SCORES:
        increment = summary[name]["increment"]
        summary[name]["ratios"] = {
            "increment": increment / summary["train"]["increment"],
            "floor": increment / summary["train_floor"]["increment"],
        }
    return summary


def main(args: ScoreMemoryArguments) -> None:
    """Measure, write, and print the table."""
    started = machine()
    cases = [Case(*values) for values in itertools.product(args.sequence_lengths, (False, True), (False, True))]
    results: dict[str, Any] = {"passes": PASSES, "target": TARGET, "cases": []}
    with fresh_processes() as executor:
        for case in tqdm(cases, desc="cases"):
            measured: dict[str, list[Memory]] = {name: [] for name in PASSES}
            for _, name in itertools.product(range(args.repeats), PASSES):
                measured[name].append(executor.submit(measure_pass, args, case, name).result())
            described = {"batch_size": args.batch_size, **case._asdict()}
            results["cases"].append({**described, "passes": summarize(measured)})
    write_record(args.output, args, started, results)
    sys.stdout.write(table(results) + "\n")


if __name__ == "__main__":
    main(*TrlParser([ScoreMemoryArguments]).parse_args_and_config())
