"""The trust region with its default delta, with half of it, and with twice and four times as much, in the settings of its study.

    python -m benchmarks.deltas

What is compared is the gain, mean held-out accuracy over the run less that of the start, as a part of the default's on the same seeds.
Finished runs are kept in `runs/trust_region/`, as those of `benchmarks.trust_region`, and not repeated.
"""

from dataclasses import dataclass, field
from statistics import mean

from trl import TrlParser

from benchmarks.learning_runs import DELTAS
from benchmarks.policies import policy_directory
from benchmarks.record import machine, spread, write_record
from benchmarks.sections.deltas import markdown
from benchmarks.trust_region import LEARNING_RATE, TrustRegionArguments, gain
from benchmarks.trust_region_summary import share
from oblr_trl import OBLRPOConfig

_DEFAULT = "trust_region"


@dataclass
class DeltasArguments(TrustRegionArguments):
    """Settings of the study; fields are documented by their `help`."""

    methods: list[str] = field(
        default_factory=lambda: list(DELTAS), metadata={"help": "Methods that are compared with the default."}
    )
    evaluation_seeds: int = field(default=3, metadata={"help": "Runs of every method in every setting."})
    output: str = field(default="benchmarks/results/deltas.json", metadata={"help": "Where the numbers go."})


def main(args: DeltasArguments) -> None:
    """Run, print and write."""
    started = machine()
    for setting in args.settings:  # before two workers would make the same one
        policy_directory(args.spec(setting, _DEFAULT, LEARNING_RATE, 0).policy)
    specs = {
        (setting, method, seed): args.spec(setting, method, LEARNING_RATE, seed)
        for seed in range(args.evaluation_seeds)
        for method in (_DEFAULT, *args.methods)
        for setting in args.settings
    }
    runs = dict(zip(specs, args.complete(list(specs.values()), "deltas"), strict=True))
    by_delta = {_DEFAULT: OBLRPOConfig.trust_region_kl} | {method: DELTAS[method] for method in args.methods}
    gains = {
        setting: {
            delta: [gain(runs[setting, method, seed]) for seed in range(args.evaluation_seeds)]
            for method, delta in sorted(by_delta.items(), key=lambda pair: pair[1])
        }
        for setting in args.settings
    }
    default = by_delta[_DEFAULT]
    parts = {
        setting: {
            "gain": spread(of_setting[default]),
            "shares": {f"{delta:g}": share(values, of_setting[default]) for delta, values in of_setting.items()},
        }
        for setting, of_setting in gains.items()
    }
    means = {
        f"{delta:g}": mean(part["shares"][f"{delta:g}"]["mean"] for part in parts.values())
        for delta in sorted(by_delta.values())
    }
    record = {"default": f"{default:g}", "parts": parts, "means": means}
    print(markdown(record | {"settings": vars(args)}))
    write_record(args.output, args, started, record)


if __name__ == "__main__":
    (arguments,) = TrlParser([DeltasArguments]).parse_args_and_config()
    main(arguments)
