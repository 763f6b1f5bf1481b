"""Where the scoring pass spends its time: its dearest operations on SmolLM2-135M-Instruct, beside those of a training step's forward and
backward on the same completions, both in float32 with one thread.

    make pretrained
    python -m benchmarks.pass_profile
"""

import os
import time
from dataclasses import dataclass, field
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM
from trl import TrlParser

from benchmarks.record import machine, write_record
from examples.smollm2.__main__ import DIRECTORY
from oblr_trl.scores import ScorePass


@dataclass
class ProfileArguments:
    """Settings of the profile; fields are documented by their `help`."""

    model: str = field(default=str(DIRECTORY), metadata={"help": "Directory of the model."})
    num_sequences: int = field(default=16, metadata={"help": "Completions of the micro-batch."})
    prompt_length: int = field(default=16, metadata={"help": "Tokens of every prompt."})
    completion_length: int = field(default=48, metadata={"help": "Tokens of every completion."})
    num_operations: int = field(default=10, metadata={"help": "Operations that are shown."})
    output: str = field(default="benchmarks/results/pass_profile.json", metadata={"help": "Where the numbers go."})


def profiled(function: Any, num_operations: int) -> dict[str, Any]:
    """Seconds without a profiler, arithmetic, and the dearest operations with their own seconds and calls, of a second run each."""
    function()
    started = time.perf_counter()
    function()
    seconds = time.perf_counter() - started
    with FlopCounterMode(display=False) as counter:
        function()
    with profile(activities=[ProfilerActivity.CPU]) as events:
        function()
    operations = sorted(events.key_averages(), key=lambda event: event.self_cpu_time_total, reverse=True)
    shown = [[event.key, event.self_cpu_time_total / 1e6, event.count] for event in operations[:num_operations]]
    total = sum(event.self_cpu_time_total for event in operations) / 1e6
    return {
        "seconds": seconds,
        "gflop": counter.get_total_flops() / 1e9,
        "profiled_seconds": total,
        "operations": shown,
    }


def main(args: ProfileArguments) -> None:
    """Profile both, print and write."""
    torch.set_num_threads(1)
    started = machine()
    model: Any = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    shape = (args.num_sequences, args.prompt_length + args.completion_length)
    ids = torch.randint(model.config.vocab_size, shape, generator=generator)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    targets = ids[:, -args.completion_length :]

    def train() -> None:
        model.zero_grad()
        logits = model(**inputs, use_cache=False, logits_to_keep=args.completion_length + 1).logits[:, :-1]
        logits.log_softmax(dim=2).gather(2, targets.unsqueeze(2)).sum().backward()

    score_pass = ScorePass(model)
    weights = torch.ones(targets.shape)
    passes = {
        "the scoring pass": lambda: score_pass(inputs, targets, weights),
        "forward and backward of training": train,
    }
    found = {name: profiled(function, args.num_operations) for name, function in passes.items()}
    for name, values in found.items():
        print(f"{name}: {values['seconds']:.1f} s, {values['gflop']:.0f} GFLOP")
        for operation, seconds, calls in values["operations"]:
            print(f"  {seconds:8.3f} s {calls:6} {operation}")
    write_record(args.output, args, started, {"passes": found})


if __name__ == "__main__":
    main(*TrlParser([ProfileArguments]).parse_args_and_config())
