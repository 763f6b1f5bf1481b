"""Study of the trust region: one delta in every setting, against rates that are tuned for each.

    python -m benchmarks.trust_region
    python -m benchmarks.trust_region --settings fresh --output benchmarks/results/trust_region_fresh.json

A setting is a policy with an optimizer, a batch and so on. For each, the best *constant* rate is searched on a grid with a factor
of 2, with seeds of their own, which is extended until its best rate lies inside. Then, with other seeds, run with the same
baseline: that rate; linear decay to zero from the better of it and twice it; the SNR multiplier at the best of a few multiples;
and the trust region with its default, started at TRL's default rate. Over the batch sizes alone, with nothing retuned, it is compared
with constant rates and with a KL that follows neither SNR, each with one value for all of them. At last GRPO and ours start from a
rate at which a constant one collapses. What is compared is the *gain*: mean held-out accuracy over the run less that of the start.

Finished runs are kept in `runs/trust_region/` and not repeated, so that a stopped study resumes. Ask for fewer `methods` or seeds
to see what there is.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

from trl import TrlParser

from benchmarks.learning import FIRST_TUNING_SEED, complete
from benchmarks.learning_runs import RunSpec
from benchmarks.learning_summary import Run, held_out, step_area
from benchmarks.policies import policy_directory
from benchmarks.rate_grids import around, best, extended
from benchmarks.record import machine, write_record
from benchmarks.sections.trust_region import markdown
from benchmarks.trust_region_summary import compare_one_value, mean_curve, summarise

LEARNING_RATE = 1e-6  # TRL's default, which no method but ours could start from
UNTUNED = ("trust_region", "minimum")  # the latter where c is at its minimum throughout
_MULTIPLES = {"linear": (1.0, 2.0), "snr": (4.0, 8.0)}
# What differs from AdamW on all parameters of `products` with 16 prompts x 4 completions, and a constant rate to begin with.
SETTINGS: dict[str, tuple[dict[str, Any], float]] = {
    "AdamW, 16 x 4": ({}, 2.6e-4),
    "AdamW, 4 x 8": ({"num_prompts": 4, "num_generations": 8}, 1.3e-4),
    "AdamW, 64 x 2": ({"num_prompts": 64, "num_generations": 2}, 5.2e-4),
    "SGD, 16 x 4": ({"optimizer": "sgd"}, 0.1),
    "Lion, 16 x 4": ({"optimizer": "lion"}, 3e-5),
    "LoRA r = 8, AdamW": ({"policy": "chain_sum", "lora_rank": 8}, 1.5e-3),
    "temperature 0.7, AdamW": ({"temperature": 0.7}, 2.6e-4),
    "graded rewards, AdamW": ({"policy": "spell_backward"}, 6.5e-5),
    "0.1 M parameters, AdamW": ({"policy": "chain_sum-0.1M"}, 2.6e-4),
    "300 steps, AdamW": ({"policy": "chain_sum", "num_steps": 300}, 1.3e-4),
}
# Evaluation seeds of the above that the rule was chosen by, the first ones.
CHOOSING_SEEDS = 2
# These had no part in it. A run of the last three takes minutes.
FRESH: dict[str, tuple[dict[str, Any], float]] = {
    "decimals, 64 x 1": ({"policy": "decimal_chain_sum", "num_prompts": 64, "num_generations": 1}, 2.6e-4),
    "products, easy to hard, 32 x 2": ({"policy": "products-mixed", "num_prompts": 32, "num_generations": 2}, 2.6e-4),
    "answers of 30 tokens, 16 x 4": ({"policy": "matrices-30"}, 1.3e-4),
    "answers of 104 tokens, 16 x 4": ({"policy": "matrices-104"}, 1.3e-4),
    "9 M parameters, 16 x 4": ({"policy": "chain_sum-9M"}, 6.5e-5),
}
# For `benchmarks.kl_measures`.
PRECISIONS: dict[str, tuple[dict[str, Any], float]] = {
    f"9 M parameters, {precision}": ({"policy": "chain_sum-9M", "precision": precision}, 6.5e-5)
    for precision in ("float32", "bfloat16 autocast", "bfloat16 weights")
}
# At which GRPO loses the policy.
COLLAPSE_RATE = 2e-3
# Settings that differ in the batch alone, and what is tried with one value for all of them: method and learning rate.
BATCH_SIZES = ("AdamW, 4 x 8", "AdamW, 16 x 4", "AdamW, 64 x 2")
ONE_VALUE = [("constant", 1.3e-4), ("constant", 2.6e-4)]
ONE_VALUE += [(f"fixed_kl_{kl}", LEARNING_RATE) for kl in ("1e-3", "3e-3", "1e-2")]
ONE_VALUE += [(f"falling_kl_{kl}", LEARNING_RATE) for kl in ("3e-3", "1e-2")]


@dataclass
class TrustRegionArguments:
    """Settings of the study; fields are documented by their `help`."""

    settings: list[str] = field(
        default_factory=lambda: list(SETTINGS), metadata={"help": "Settings, by name; or `fresh`, for all of those."}
    )
    methods: list[str] = field(
        default_factory=lambda: ["constant", *UNTUNED, "linear", "snr"],
        metadata={"help": "Methods that are run, of those named here."},
    )
    compare_batch_sizes: bool = field(
        default=True,
        metadata={"help": "Whether to compare one value over batch sizes, where all of these are asked for."},
    )
    tuning_seeds: int = field(default=3, metadata={"help": "Runs at every rate."})
    evaluation_seeds: int = field(default=5, metadata={"help": "Runs at the best rate."})
    num_steps: int = field(default=100, metadata={"help": "Optimizer steps of a run, where the setting says nothing."})
    test_size: int = field(default=512, metadata={"help": "Held-out prompts."})
    num_workers: int = field(default=2, metadata={"help": "Processes of one thread each; 0 runs in this one."})
    tuned_by: str | None = field(
        default=None, metadata={"help": "Record of an earlier study whose tuning is taken over."}
    )
    retuned: list[str] = field(default_factory=list, metadata={"help": "Settings whose tuning is not taken over."})
    runs: str = field(default="runs/trust_region", metadata={"help": "Where finished runs are kept."})
    output: str = field(default="benchmarks/results/trust_region.json", metadata={"help": "Where the numbers go."})

    def __post_init__(self) -> None:
        if self.settings == ["fresh"]:
            self.settings = list(FRESH)
        if unknown := set(self.settings) - set(SETTINGS | FRESH):
            raise ValueError(f"`settings` has {sorted(unknown)}. Choose from: {'; '.join(SETTINGS | FRESH)}.")

    def earlier(self) -> dict[str, Any]:
        """What `tuned_by` says of the settings that are not `retuned`."""
        if self.tuned_by is None:
            return {}
        record = json.loads(Path(self.tuned_by).read_text())
        self.tuning_seeds = record["settings"]["tuning_seeds"]
        return {setting: record["summary"][setting] for setting in set(self.settings) - set(self.retuned)}

    def spec(self, setting: str, method: str, learning_rate: float, seed: int) -> RunSpec:
        """A run of this study."""
        changes = {"num_steps": self.num_steps} | (SETTINGS | FRESH | PRECISIONS)[setting][0]
        common = {"policy": "products", "optimizer": "adamw", "test_size": self.test_size}
        rate = float(f"{learning_rate:.3g}")
        return RunSpec(**(common | changes), method=method, learning_rate=rate, seed=seed)  # type: ignore[arg-type]

    def complete(self, specs: Sequence[RunSpec], stage: str) -> list[Run]:
        """The runs of `specs`, made or read."""
        return complete(specs, self.runs, self.num_workers, stage)


def gain(run: Run) -> float:
    """Mean held-out accuracy over the run less that of the start."""
    return step_area(run) - held_out(run)[0]


def tuned(args: TrustRegionArguments, method: str, rates: dict[str, list[float]]) -> dict[str, dict[float, float]]:
    """Mean gain of every rate of every setting, on the tuning seeds."""
    specs = {
        (setting, rate, seed): args.spec(setting, method, rate, FIRST_TUNING_SEED + seed)
        for seed in range(args.tuning_seeds)
        for setting in rates
        for rate in rates[setting]
    }
    runs = dict(zip(specs, args.complete(list(specs.values()), f"{method} tuning"), strict=True))
    return {
        setting: {
            rate: mean(gain(runs[setting, rate, seed]) for seed in range(args.tuning_seeds)) for rate in rates[setting]
        }
        for setting in rates
    }


def best_constant_rates(args: TrustRegionArguments) -> dict[str, dict[float, float]]:
    """Gains of the constant rates."""
    known = {
        setting: {float(rate): value for rate, value in part["tuning"].items()}
        for setting, part in args.earlier().items()
    }
    rates = {setting: around((SETTINGS | FRESH)[setting][1]) for setting in args.settings if setting not in known}
    return known | extended(rates, partial(tuned, args, "constant"))


def best_multiples(args: TrustRegionArguments, method: str, constant: dict[str, float]) -> dict[str, float]:
    """The rate of a method with a schedule of its own: the best of a few multiples of the best constant one."""
    parts = {setting: part["methods"].get(method) for setting, part in args.earlier().items()}
    known = {setting: float(part["learning_rate"]) for setting, part in parts.items() if part is not None}
    grid = {
        setting: [rate * multiple for multiple in _MULTIPLES[method]]
        for setting, rate in constant.items()
        if setting not in known
    }
    return known | {setting: best(by_rate) for setting, by_rate in tuned(args, method, grid).items()}


def over_batch_sizes(args: TrustRegionArguments) -> dict[str, Any]:
    """Ours, constant rates and constant movements with one value for the settings that differ in the batch alone."""
    cases = [("trust_region", LEARNING_RATE), *ONE_VALUE]
    settings = list(BATCH_SIZES)
    keys = [(case, setting, seed) for seed in range(args.evaluation_seeds) for case in cases for setting in settings]
    specs = [args.spec(setting, method, rate, seed) for (method, rate), setting, seed in keys]
    runs = dict(zip(keys, args.complete(specs, "batch sizes"), strict=True))
    gains = {
        case: {
            setting: [gain(runs[case, setting, seed]) for seed in range(args.evaluation_seeds)] for setting in settings
        }
        for case in cases
    }
    return {"settings": settings, "rows": compare_one_value(gains)}


def collapse(args: TrustRegionArguments) -> dict[str, Any]:
    """Mean curves of the first setting at `COLLAPSE_RATE`."""
    curves = {}
    for method in ("grpo", "trust_region"):
        seeds = range(args.evaluation_seeds)
        specs = [args.spec(args.settings[0], method, COLLAPSE_RATE, seed) for seed in seeds]
        curves[method] = mean_curve(args.complete(specs, f"{method} at {COLLAPSE_RATE:g}"))
    return {"setting": args.settings[0], "learning_rate": COLLAPSE_RATE, "curves": curves}


def main(args: TrustRegionArguments) -> None:
    """Tune, evaluate, print and write."""
    started = machine()
    for setting in args.settings:  # before two workers would make the same one
        policy_directory(args.spec(setting, "constant", 1.0, 0).policy)
    gains = best_constant_rates(args)
    constant = {setting: best(by_rate) for setting, by_rate in gains.items()}
    rates = {"constant": constant} | dict.fromkeys(UNTUNED, dict.fromkeys(args.settings, LEARNING_RATE))
    for method in _MULTIPLES:
        if method in args.methods:
            rates[method] = best_multiples(args, method, constant)
    methods = [method for method in rates if method in args.methods]
    runs: dict[str, dict[str, list[Run]]] = {setting: {} for setting in args.settings}
    for method in methods:
        specs = {
            (seed, setting): args.spec(setting, method, rates[method][setting], seed)
            for seed in range(args.evaluation_seeds)
            for setting in args.settings
        }
        for (_, setting), run in zip(specs, args.complete(list(specs.values()), method), strict=True):
            runs[setting].setdefault(method, []).append(run)
    record: dict[str, Any] = {"summary": summarise(gains, runs)}
    if set(BATCH_SIZES) <= set(args.settings):
        record |= {"collapse": collapse(args), "choosing_seeds": CHOOSING_SEEDS}
        if args.compare_batch_sizes:
            record["batch_sizes"] = over_batch_sizes(args)
    print(markdown(record | {"settings": vars(args)}))
    write_record(args.output, args, started, record)


if __name__ == "__main__":
    (arguments,) = TrlParser([TrustRegionArguments]).parse_args_and_config()
    main(arguments)
