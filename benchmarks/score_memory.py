"""What a scoring pass needs in memory beside training, as peaks of fresh processes on the same micro-batch.

    python -m benchmarks.score_memory

Training is the forward and backward of TRL's loss as far as gradients of the parameters, with TRL's fused output projection.
On a CPU a peak is the kernel's high-water mark of resident memory, reset before the pass (`/proc/self/clear_refs`), so that
neither imports nor the building of the model count; malloc is told to give every freed block back at once. On a GPU it is
the allocator's. Three comparisons:

- peak: the whole process, with interpreter, libraries and parameters on both sides;
- increment: what the peak adds to the state before. Training starts without gradients and makes them, as after
  `zero_grad(set_to_none=True)`; a scoring pass makes its projections, as in the first step. The project's target is here;
- activations: the same against training that starts with its gradients allocated, as in every micro-batch of gradient
  accumulation but the first, so that the increment is that over model and gradients;
- floor: the same against training whose output projection moreover takes an eighth of the tokens at a time. Without Triton,
  TRL's keeps about eight arrays of tokens times vocabulary where its kernels keep one, which flatters the comparison.
"""

import gc
import itertools
import os
import re
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing import forkserver, get_context
from pathlib import Path
from statistics import median
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from tqdm import tqdm
from trl import TrlParser
from trl.kernels import chunked_logprob
from trl.trainer.utils import add_fused_lm_head

from benchmarks.record import machine, write_record
from benchmarks.score_pass import ScorePassArguments, build_model
from oblr_trl.scores import ScorePass

PASSES = {
    "train": "training: forward + backward of TRL's loss, starting without gradients",
    "train_accumulating": "the same, starting with gradients of an earlier micro-batch",
    "train_floor": "the same, with TRL's output projection in small tiles",
    "all": "scope all, sketches",
    "last_k": "scope last_k = 1, sketches",
    "lm_head": "scope lm_head, sketches",
    "exact_all": "scope all, sketches and exact norms",
    "exact_last_k": "scope last_k = 1, sketches and exact norms",
    "exact_lm_head": "scope lm_head, sketches and exact norms",
}
_SCOPES: dict[str, dict[str, Any]] = {
    "all": {"scope": "all"},
    "last_k": {"scope": "last_k", "last_k": 1},
    "lm_head": {"scope": "lm_head"},
}
SCORE_PASSES: dict[str, dict[str, Any]] = {
    **_SCOPES,
    # The trainer needs sketches beside exact norms, for the signal-to-noise ratio.
    **{f"exact_{name}": {**settings, "methods": ("sketch", "exact")} for name, settings in _SCOPES.items()},
}
# Arrays of a tile's size that TRL's output projection keeps without Triton, about.
_TILE_COPIES = 8
# The increment of a scoring pass over that of training which the project aims to stay below.
TARGET = 1.0

_MIB = 2**20
# Every block from 64 KiB on is a mapping of its own, which leaves the process when it is freed: resident memory then follows
# the tensors alive, and not the history of one heap.
_MALLOC = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
# Matrix products of MKL otherwise keep their work space.
_ENVIRONMENT = {**_MALLOC, "MKL_DISABLE_FAST_MM": "1"}


@dataclass
class ScoreMemoryArguments:
    """
    Settings of the benchmark.

    Args:
        hidden_size (`int`, *optional*, defaults to `256`): Hidden features d; the MLP has 3 d.
        num_layers (`int`, *optional*, defaults to `8`): Decoder blocks.
        vocab_size (`int`, *optional*, defaults to `8192`): Vocabulary.
        batch_size (`int`, *optional*, defaults to `4`): Sequences of the micro-batch.
        sequence_lengths (`list[int]`, *optional*, defaults to `[256]`): Tokens per sequence, four tables each.
        lora_r (`int`, *optional*, defaults to `16`): Rank of the adapter on all linear layers.
        sketch_dim (`int`, *optional*, defaults to `4096`): Length of a sketch.
        repeats (`int`, *optional*, defaults to `3`): Fresh processes per measurement.
        num_threads (`int`, *optional*, defaults to `1`): Threads of a measured pass.
        seed (`int`, *optional*, defaults to `0`): Seed of weights, tokens and projections.
        output (`str`, *optional*, defaults to `"benchmarks/results/score_memory.json"`): Where the numbers go.
    """

    hidden_size: int = field(default=256, metadata={"help": "Hidden features d; the MLP has 3 d."})
    num_layers: int = field(default=8, metadata={"help": "Decoder blocks."})
    vocab_size: int = field(default=8192, metadata={"help": "Vocabulary."})
    batch_size: int = field(default=4, metadata={"help": "Sequences of the micro-batch."})
    sequence_lengths: list[int] = field(default_factory=lambda: [256], metadata={"help": "Tokens per sequence."})
    lora_r: int = field(default=16, metadata={"help": "Rank of the adapter on all linear layers."})
    sketch_dim: int = field(default=4096, metadata={"help": "Length of a sketch."})
    repeats: int = field(default=3, metadata={"help": "Fresh processes per measurement."})
    num_threads: int = field(default=1, metadata={"help": "Threads of a measured pass."})
    seed: int = field(default=0, metadata={"help": "Seed of weights, tokens and projections."})
    output: str = field(default="benchmarks/results/score_memory.json", metadata={"help": "Where the numbers go."})


@dataclass(frozen=True)
class Case:
    """
    One table.

    Args:
        sequence_length (`int`): Tokens per sequence, of which the last three quarters are the completion.
        lora (`bool`): Whether an adapter is trained, instead of all parameters.
        checkpointing (`bool`): Whether gradient checkpointing (non-reentrant) is on.
    """

    sequence_length: int
    lora: bool
    checkpointing: bool


@dataclass(frozen=True)
class Memory:
    """
    Memory of one operation, in bytes.

    Args:
        before (`int`): When it started.
        peak (`int`): At most, while it ran.
        after (`int`): When it had ended: what it keeps is the difference to `before`.
    """

    before: int
    peak: int
    after: int


def measure_memory(operation: Callable[[], object], device: torch.device) -> Memory:
    """Memory of this process (CPU) or of its tensors (GPU) while `operation` runs; its result is kept until the end."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = operation()
        torch.cuda.synchronize()
        peak, after = torch.cuda.max_memory_allocated(), torch.cuda.memory_allocated()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark falls to what is resident now
        before = _resident("VmRSS")
        result = operation()
        peak, after = _resident("VmHWM"), _resident("VmRSS")
    del result
    return Memory(before, peak, after)


def _resident(counter: str) -> int:
    match = re.search(rf"^{counter}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert match is not None
    return int(match[1]) * 1024


class Workload:
    """
    A model and a micro-batch without padding, and what is done with them.

    Args:
        args ([`ScoreMemoryArguments`]): Settings.
        case ([`Case`]): The table.
        device (`torch.device`): Where it runs; float32 on a CPU, bfloat16 on a GPU.
    """

    def __init__(self, args: ScoreMemoryArguments, case: Case, device: torch.device) -> None:
        self.args = args
        shape = ScorePassArguments(hidden_size=args.hidden_size, num_layers=args.num_layers, seed=args.seed)
        model: Any = build_model(shape, args.vocab_size, device)
        # The rest as GRPOTrainer prepares a model.
        add_fused_lm_head(model, outputs=("log_probs", "entropy"))
        if case.lora:
            model = get_peft_model(model, LoraConfig(r=args.lora_r, target_modules="all-linear"))
        if case.checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            if case.lora:
                model.enable_input_require_grads()
        self.model = model
        generator = torch.Generator().manual_seed(args.seed)
        shape_of_ids = (args.batch_size, case.sequence_length)
        self.input_ids = torch.randint(0, args.vocab_size, shape_of_ids, generator=generator).to(device)

    def warm_up(self) -> None:
        """One short sequence through everything: code is paged in and work space is made, nothing else stays."""
        short = self.input_ids[:1, :8]
        self._train(short)
        self.model.zero_grad(set_to_none=True)
        for settings in SCORE_PASSES.values():
            self._score(short, ScorePass(self.model, sketch_dim=self.args.sketch_dim, **settings))

    def allocate_gradients(self) -> None:
        """Gradients of an earlier micro-batch, in memory and not only promised."""
        for parameter in self.model.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.full_like(parameter, 1e-3)

    def run(self, name: str) -> object:
        """The pass of that name; what the caller would go on holding is returned."""
        if name not in SCORE_PASSES:
            self._train(self.input_ids)
            return None
        settings = {"sketch_dim": self.args.sketch_dim, "seed": self.args.seed, **SCORE_PASSES[name]}
        score_pass = ScorePass(self.model, **settings)
        return score_pass, self._score(self.input_ids, score_pass)

    def _train(self, input_ids: Tensor) -> None:
        num_tokens = input_ids.size(1) * 3 // 4
        labels = input_ids.clone()
        labels[:, :-num_tokens] = -100
        outputs = self.model(**_model_inputs(input_ids), labels=labels, fused_lm_head=True)
        outputs.log_probs[:, -num_tokens:].sum().backward()

    def _score(self, input_ids: Tensor, score_pass: ScorePass) -> object:
        targets = input_ids[:, -(input_ids.size(1) * 3 // 4) :]
        return score_pass(_model_inputs(input_ids), targets, torch.ones(targets.shape, device=targets.device))


def _model_inputs(input_ids: Tensor) -> dict[str, Tensor]:
    return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}


def measure_pass(args: ScoreMemoryArguments, case: Case, name: str) -> Memory:
    """Memory of one pass, measured in the process that calls, which is of no use to others afterwards."""
    warnings.simplefilter("ignore", FutureWarning)  # once per process, of transformers' renamed checkpointing
    torch.set_num_threads(args.num_threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    workload = Workload(args, case, device)
    workload.warm_up()
    if name in ("train_accumulating", "train_floor"):
        workload.allocate_gradients()
    if name == "train_floor":
        num_positions = min(workload.input_ids.numel(), chunked_logprob.TOKEN_CHUNK_SIZE)
        chunked_logprob.TOKEN_CHUNK_SIZE = max(num_positions // _TILE_COPIES, 1)
    return measure_memory(lambda: workload.run(name), device)


@contextmanager
def fresh_processes() -> Iterator[Callable[..., Any]]:
    """
    Yields a function that calls another one, with its arguments, in a process of its own.

    On a CPU the processes are forked from one that has imported the libraries and done nothing else; CUDA does not survive a
    fork.
    """
    context = get_context("spawn" if torch.cuda.is_available() else "forkserver")
    outside = {name: os.environ.get(name) for name in _ENVIRONMENT}
    os.environ.update(_ENVIRONMENT)  # read by malloc when the fork server starts
    try:
        context.set_forkserver_preload(["benchmarks.score_pass", "peft"])
        if not torch.cuda.is_available():
            forkserver.ensure_running()
        with ProcessPoolExecutor(1, mp_context=context, max_tasks_per_child=1) as executor:
            yield lambda function, *args: executor.submit(function, *args).result()
    finally:
        for name, value in outside.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def summarize(measured: dict[str, list[Memory]]) -> dict[str, dict[str, Any]]:
    """Medians of every pass over its processes, in bytes, and ratios of medians to training's."""
    summary: dict[str, dict[str, Any]] = {}
    for name, memories in measured.items():
        increments = [memory.peak - memory.before for memory in memories]
        summary[name] = {
            "before": median(memory.before for memory in memories),
            "peak": median(memory.peak for memory in memories),
            "increment": median(increments),
            "increment_spread": max(increments) - min(increments),
            "kept": median(memory.after - memory.before for memory in memories),
        }
    train = summary["train"]
    for name in SCORE_PASSES:
        pass_ = summary[name]
        pass_["ratios"] = {
            "peak": pass_["peak"] / train["peak"],
            "increment": pass_["increment"] / train["increment"],
            "activations": pass_["increment"] / summary["train_accumulating"]["increment"],
            "floor": pass_["increment"] / summary["train_floor"]["increment"],
        }
    return summary


def print_tables(cases: list[dict[str, Any]], started: dict[str, Any]) -> None:
    """Print every case's medians and ratios."""
    print(f"{started['gpu'] or started['cpu']}; MiB, medians over fresh processes, ± half the range of the increments")
    for case in cases:
        adapted = "LoRA" if case["lora"] else "all parameters"
        checkpointing = "on" if case["checkpointing"] else "off"
        print(
            f"\n{case['batch_size']} x {case['sequence_length']} tokens, {adapted}, gradient checkpointing {checkpointing}"
        )
        print(
            f"  {'':<72}{'before':>8}{'peak':>8}{'increment':>16}{'kept':>7}   ratios: peak, increment, activations, floor"
        )
        for name, result in case["passes"].items():
            before, peak, increment, kept = (result[key] / _MIB for key in ("before", "peak", "increment", "kept"))
            spread = result["increment_spread"] / 2 / _MIB
            line = f"  {PASSES[name]:<72}{before:>8.0f}{peak:>8.0f}{increment:>9.1f} ±{spread:>5.1f}{kept:>7.1f}"
            if name in SCORE_PASSES:
                ratios = result["ratios"]
                verdict = "met" if ratios["increment"] <= TARGET else "MISSED"
                line += "  " + "".join(f"{ratio:>6.2f}" for ratio in ratios.values()) + f"  {verdict}"
            print(line)
    print(f"\nTarget of every scoring pass: at most {TARGET:.2f} of training's increment.")


def make_parser() -> TrlParser:
    """Parser of the command line; a misspelt key fails."""
    return TrlParser([ScoreMemoryArguments])


def main(args: ScoreMemoryArguments) -> None:
    """Measure, print and write."""
    started = machine()
    cases = [Case(*values) for values in itertools.product(args.sequence_lengths, (False, True), (False, True))]
    results: list[dict[str, Any]] = []
    with (
        fresh_processes() as call,
        tqdm(total=len(cases) * args.repeats * len(PASSES), desc="passes measured") as progress,
    ):
        for case in cases:
            measured: dict[str, list[Memory]] = {name: [] for name in PASSES}
            for _, name in itertools.product(range(args.repeats), PASSES):
                measured[name].append(call(measure_pass, args, case, name))
                progress.update()
            results.append({"batch_size": args.batch_size, **vars(case), "passes": summarize(measured)})
    print_tables(results, started)
    write_record(args.output, args, started, {"passes": PASSES, "target": TARGET, "cases": results})


if __name__ == "__main__":
    (arguments,) = make_parser().parse_args_and_config()
    main(arguments)
