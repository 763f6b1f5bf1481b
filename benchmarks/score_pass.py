"""Time of a scoring pass relative to training, as ratios of interleaved measurements in one process on a CPU.

    python -m benchmarks.score_pass

Every pass is timed once per round; a ratio is taken within a round.
"""

import sys
from dataclasses import dataclass, field
from typing import Any

from tqdm import tqdm
from trl import TrlParser

from benchmarks.interleaving import ratio_spread, rotating
from benchmarks.record import machine, write_record
from benchmarks.score_workload import Case, Workload, WorkloadArguments, qwen3_config, scopes
from benchmarks.sections.score_pass import RATIOS, table

PASSES = {
    "train": "training: forward + backward of TRL's loss, all weight gradients",
    "no_taps": "TRL's scoring forward + backward of activations alone",
    "no_taps_own_head": "the same with our output projection, still without layer sketches",
    "all": "scope all, sketches",
    "last_k": "scope last_k = 1, sketches",
    "lm_head": "scope lm_head, sketches",
    "exact": "scope all, exact norms",
    "per_sequence": "one forward + backward per sequence, exact norms",
}
SCORES: dict[str, dict[str, Any]] = {**scopes(last_k=1), "exact": {"methods": ("exact",)}, "no_taps_own_head": {}}


@dataclass
class ScorePassArguments(WorkloadArguments):
    """Settings of the benchmark; fields are documented by their `help`."""

    hidden_size: int = field(default=512, metadata={"help": "Hidden features d; the MLP has 3 d."})
    num_layers: int = field(default=8, metadata={"help": "Decoder blocks."})
    vocab_size: int = field(default=8192, metadata={"help": "Vocabulary."})
    sequence_lengths: list[int] = field(
        default_factory=lambda: [256, 512], metadata={"help": "Tokens per sequence, a case each."}
    )
    rounds: int = field(default=7, metadata={"help": "Measurements of every pass; one more warms up."})
    output: str = field(default="benchmarks/results/score_pass.json", metadata={"help": "Where the numbers go."})


def measure(args: ScorePassArguments, sequence_length: int) -> dict[str, list[float]]:
    """Seconds of every pass in every round."""
    config = qwen3_config(args.hidden_size, args.num_layers, args.vocab_size)
    workload = Workload(args, config, Case(sequence_length), SCORES)
    seconds: dict[str, list[float]] = {name: [] for name in PASSES}
    for round_, name in tqdm(list(rotating(list(PASSES), args.rounds)), desc=f"passes, {sequence_length} tokens"):
        elapsed = workload.seconds(name)
        if round_ > 0:  # the first one draws projections and warms caches
            seconds[name].append(elapsed)
    return seconds


def main(args: ScorePassArguments) -> None:
    """Measure, write, and print the table."""
    started = machine()
    cases = []
    for sequence_length in args.sequence_lengths:
        seconds = measure(args, sequence_length)
        ratios = {
            label: {**ratio_spread(seconds[numerator], seconds[denominator]), "target": goal}
            for label, (numerator, denominator, goal, _) in RATIOS.items()
        }
        shape = {"batch_size": args.batch_size, "sequence_length": sequence_length, "vocab_size": args.vocab_size}
        cases.append({**shape, "ratios": ratios, "seconds": seconds})
    results = {"passes": PASSES, "cases": cases}
    write_record(args.output, args, started, results)
    sys.stdout.write(table(results) + "\n")


if __name__ == "__main__":
    main(*TrlParser([ScorePassArguments]).parse_args_and_config())
