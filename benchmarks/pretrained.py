"""Learning curves on a real pretrained model, SmolLM2-135M-Instruct: ours without a learning rate to choose against GRPO and RLOO at
every constant rate of a grid, and the controls for either half of it: its baseline at those rates, and GRPO's advantages with its trust region.

    make pretrained
    python -m benchmarks.pretrained

As many rollouts per step for all. GRPO and RLOO are judged at the rate that turns out best on the very seeds that are compared, which
favours them. Finished runs are kept in `runs/pretrained/` and not repeated, so that a stopped study resumes. Seeds are the outermost loop:
ask for fewer seeds or tasks to see what there is.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product
from statistics import mean
from typing import Any

import numpy as np
from trl import TrlParser

from benchmarks.learning import complete
from benchmarks.learning_summary import area, paired_difference
from benchmarks.pretrained_runs import TASKS, PretrainedSpec, finished_run, run_file
from benchmarks.record import spread, write_record
from benchmarks.sections.pretrained import markdown
from benchmarks.small_groups_summary import part_until
from examples.smollm2.__main__ import DIRECTORY
from oblr_trl import OBLRPOConfig, metrics

# Group sizes of others than OBLR-PO's; TRL's default for GRPO is 8.
GROUP_SIZES = {"grpo": (8,), "rloo": (4,), "grpo_kl": (8,)}
OURS = "ours"
UNTUNED = (OURS, "grpo_kl")
RIVALS = ("grpo", "rloo")
_LAST = 5  # steps

Run = dict[str, Any]
Arm = tuple[str, int, float | None]  # method, group size, and delta where it was set


@dataclass
class PretrainedArguments:
    """Settings of the study; fields are documented by their `help`."""

    tasks: list[str] = field(default_factory=lambda: list(TASKS), metadata={"help": "Tasks, by name."})
    methods: list[str] = field(
        default_factory=lambda: [OURS, *RIVALS], metadata={"help": "Methods; also `constant` and `grpo_kl`."}
    )
    group_sizes: list[int] = field(default_factory=lambda: [1], metadata={"help": "Group sizes of OBLR-PO."})
    learning_rates: list[float] = field(
        default_factory=lambda: [1.6e-5, 3.2e-5, 6.4e-5], metadata={"help": "Constant rates of the controls."}
    )
    kls: list[float] = field(
        default_factory=lambda: [OBLRPOConfig.trust_region_kl, 0.5],
        metadata={"help": "Values of OBLR-PO's delta, the default first."},
    )
    seeds: int = field(default=3, metadata={"help": "Runs of every method."})
    num_steps: int = field(default=40, metadata={"help": "Optimizer steps of a run."})
    rollouts: int = field(default=64, metadata={"help": "Completions per step."})
    eval_steps: int = field(default=5, metadata={"help": "Steps between two evaluations."})
    test_size: int = field(default=128, metadata={"help": "Held-out prompts."})
    bf16: bool = field(default=True, metadata={"help": "Whether to train in bfloat16 autocast, else in float32."})
    num_workers: int = field(default=1, metadata={"help": "Processes that share the GPU; 0 runs in this one."})
    only_finished: bool = field(
        default=False, metadata={"help": "Whether to make no run, and leave out what is missing."}
    )
    runs: str = field(default="runs/pretrained", metadata={"help": "Where finished runs are kept."})
    output: str = field(default="benchmarks/results/pretrained.json", metadata={"help": "Where the numbers go."})

    def specs(self) -> list[PretrainedSpec]:
        """All runs, seed by seed."""
        found = []
        lengths = {"num_steps": self.num_steps, "eval_steps": self.eval_steps, "test_size": self.test_size}
        for seed, task, method in product(range(self.seeds), self.tasks, self.methods):
            steps: list[dict[str, Any]] = [{"learning_rate": rate} for rate in self.learning_rates]
            if method in UNTUNED:
                steps = [{"trust_region_kl": kl} for kl in self.kls]
            for size, step in product(GROUP_SIZES.get(method, self.group_sizes), steps):
                found.append(
                    PretrainedSpec(task, method, self.rollouts // size, size, seed, bf16=self.bf16, **lengths, **step)
                )
        return found


def curve_area(run: Run) -> float:
    """Mean held-out reward over the steps."""
    return area(run["rewards"], range(len(run["rewards"])))


def summarise(runs: Sequence[Run]) -> dict[str, Any]:
    """
    By task and arm: the best rate, and its runs' curve, area and final reward. Of ours and its halves also the differences to the strongest
    rival, paired over seeds, and after which part of its rollouts each run has the reward that this one ends with (`None`: never).
    """
    summary: dict[str, Any] = {}
    for task in dict.fromkeys(run["spec"]["task"] for run in runs):
        by_arm: dict[Arm, dict[float, list[Run]]] = {}
        for run in runs:
            spec = run["spec"]
            if spec["task"] == task:
                rates = by_arm.setdefault((spec["method"], spec["num_generations"], spec["trust_region_kl"]), {})
                rates.setdefault(spec["learning_rate"], []).append(run)
        summary[task] = _summarise_task(by_arm)
    return summary


def _movement(runs: Sequence[Run]) -> dict[str, float] | None:
    """Mean KL of a step and its target over the second halves of the runs, where they were measured."""
    found = {}
    for name, key in (("kl", metrics.KL), ("target", metrics.KL_TARGET)):
        logs = [run["logged"].get(key, []) for run in runs]
        # A first step has none.
        values = [value for log in logs for value in log[len(log) // 2 :] if value is not None]
        if not values:
            return None
        found[name] = mean(values)
    return found


def _last_entropy(runs: Sequence[Run]) -> float | None:
    """Mean entropy of a token over the last steps of the runs, `None` where one is lost."""
    values = [value for run in runs for value in run["logged"]["entropy"][-_LAST:]]
    return None if None in values else round(mean(values), 3)


def _summarise_task(by_arm: dict[Arm, dict[float, list[Run]]]) -> dict[str, Any]:
    best = {arm: max(rates, key=lambda rate: mean(map(curve_area, rates[rate]))) for arm, rates in by_arm.items()}
    chosen = {arm: by_arm[arm][rate] for arm, rate in best.items()}
    rivals = [arm for arm in chosen if arm[0] in RIVALS]
    strongest = max(rivals, key=lambda arm: mean(map(curve_area, chosen[arm])), default=None)
    arms = {}
    for arm, runs in chosen.items():
        cell: dict[str, Any] = {
            "method": arm[0],
            "num_prompts": runs[0]["spec"]["num_prompts"],
            "num_generations": arm[1],
            "trust_region_kl": arm[2],
            "learning_rate": best[arm] if arm[0] not in UNTUNED else None,
            "num_seeds": len(runs),
            "curve": np.round(np.mean([run["rewards"] for run in runs], axis=0), 4).tolist(),
            "final": spread([run["rewards"][-1] for run in runs]),
            "area": spread([curve_area(run) for run in runs]),
            "seconds_per_step": round(float(np.median([s for run in runs for s in run["seconds"]])), 3),
            "movement": _movement(runs),
            "failures": sum(run["failure"] is not None for run in runs),
            "last_rates": [run["logged"]["learning_rate"][-1] for run in runs],
            "highest_rates": [max(run["logged"]["learning_rate"]) for run in runs],
            "by_rate": {f"{rate:g}": [run["rewards"] for run in of_rate] for rate, of_rate in by_arm[arm].items()},
            "rollouts_by_rate": {
                f"{rate:g}": [round(mean(run["logged"]["reward"]), 4) for run in of_rate]
                for rate, of_rate in by_arm[arm].items()
            },
            "entropy_by_rate": {f"{rate:g}": _last_entropy(of_rate) for rate, of_rate in by_arm[arm].items()},
        }
        if strongest is not None and arm[0] not in RIVALS:
            theirs = chosen[strongest]
            num = min(len(runs), len(theirs))
            cell["area_minus_strongest"] = paired_difference(
                [curve_area(run) for run in runs[:num]], [curve_area(run) for run in theirs[:num]]
            )
            goal = mean(run["rewards"][-1] for run in theirs)
            parts = [part_until(run["rewards"], goal) for run in runs]
            cell["rollouts_to_strongest"] = [round(part, 3) if math.isfinite(part) else None for part in parts]
        arms[f"{arm[0]}, G = {arm[1]}" + (f", delta = {arm[2]:g}" if arm[2] else "")] = cell
    return {"strongest": None if strongest is None else f"{strongest[0]}, G = {strongest[1]}", "arms": arms}


def main(args: PretrainedArguments) -> None:
    """Run, print and write."""
    if not DIRECTORY.is_dir():
        raise SystemExit(f"not measured: there is no {DIRECTORY}. Run `make pretrained` first.")
    specs = args.specs()
    if args.only_finished:
        specs = [spec for spec in specs if run_file(args.runs, spec).is_file()]
        if not specs:
            raise SystemExit(
                f"no run of these settings is finished in {args.runs}. Leave `only_finished` out to make them."
            )
    runs = complete(specs, args.runs, args.num_workers, "SmolLM2", finished_run, runs_per_process=1)
    summary = summarise(runs)
    print(markdown({"summary": summary, "settings": vars(args)}))
    # Of the first run: a machine that is lent makes the runs, and another one may summarise them.
    write_record(args.output, args, runs[0]["machine"], {"summary": summary})


if __name__ == "__main__":
    (arguments,) = TrlParser([PretrainedArguments]).parse_args_and_config()
    main(arguments)
