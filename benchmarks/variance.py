"""Variance of the policy gradient under every baseline, relative to RLOO's, on every policy of the studies.

    python -m benchmarks.policies
    python -m benchmarks.variance

Every seed draws its own held-out prompts and completions. Gradients are those of all parameters; the baselines see
what the trainer would see. `benchmarks/gradient_variance.py` has the estimator. Finished pools are kept below
`runs/variance`, from where an interrupted study resumes.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from tqdm import tqdm
from trl import TrlParser

from benchmarks.completion_pool import build_pool, kept, sample_with_rewards
from benchmarks.gradient_variance import RLOO, Method, Pool, measure_methods, right_over_wrong
from benchmarks.policies import POLICIES, LoadedPolicy, check_policies, load_policy
from benchmarks.record import machine, spread, write_record
from benchmarks.sections.variance import markdown

DEFAULT = "gradient-weighted, all, prior automatic"
METHODS = (
    RLOO,
    Method("none", "none"),
    Method("group mean (GRPO)", "group_mean", unbiased=False),
    Method("length-weighted (OPO)", "length_weighted"),
    Method("mean, prior automatic", "gradient_weighted", "equal", None),
    Method("gradient-weighted, exact, prior automatic", "gradient_weighted", "exact", None),
    Method("gradient-weighted, all, prior 0", "gradient_weighted", "all", 0.0),
    Method("gradient-weighted, all, prior 4", "gradient_weighted", "all", 4.0),
    Method("gradient-weighted, all, prior 16", "gradient_weighted", "all", 16.0),
    Method(DEFAULT, "gradient_weighted", "all", None),
    Method("gradient-weighted, last_k, prior automatic", "gradient_weighted", "last_k", None),
    Method("gradient-weighted, lm_head, prior automatic", "gradient_weighted", "lm_head", None),
    Method("oracle b* (whole pool)", "oracle", "exact", unbiased=False),
)
# Above it fewer prompts are drawn: the time of a pool grows with the parameters.
_LARGE = 5_000_000
# Figures of one pool that are plain numbers.
_DESCRIPTION = ("num_parameters", "mean_reward", "mean_length", "right_over_wrong")


@dataclass
class VarianceArguments:
    """Settings of the study; fields are documented by their `help`."""

    policies: list[str] = field(
        default_factory=lambda: list(POLICIES), metadata={"help": "Names of policies; all of them if not given."}
    )
    num_seeds: int = field(default=3, metadata={"help": "Independent draws of prompts, completions and projections."})
    num_prompts: int = field(default=32, metadata={"help": "Prompts of a pool."})
    num_prompts_large: int = field(
        default=16, metadata={"help": "The same for policies of more than 5 million parameters."}
    )
    num_completions: int = field(default=32, metadata={"help": "Completions of every prompt."})
    prompts_per_batch: int = field(default=16, metadata={"help": "Prompts that a batch, and so a prior, is made of."})
    num_generations: list[int] = field(default_factory=lambda: [2, 4, 8, 16], metadata={"help": "Group sizes G."})
    groups_per_prompt: int = field(default=16, metadata={"help": "Groups of every prompt, over all partitions."})
    sketch_dim: int = field(default=4096, metadata={"help": "Length of a sketch, the trainer's default."})
    kept: str = field(default="runs/variance", metadata={"help": "Where pools are kept."})
    output: str = field(default="benchmarks/results/variance.json", metadata={"help": "Where the numbers go."})

    def __post_init__(self) -> None:
        check_policies("policies", self.policies)
        for name, value in (("num_prompts", self.num_prompts), ("num_prompts_large", self.num_prompts_large)):
            if value % self.prompts_per_batch:
                raise ValueError(
                    f"`{name}` is {value}, which is not a multiple of `prompts_per_batch` {self.prompts_per_batch}: "
                    "a prompt would be left over. Change one of them."
                )
        for group_size in self.num_generations:
            if self.num_completions % group_size or self.num_completions < 2 * group_size:
                raise ValueError(
                    f"`num_completions` is {self.num_completions}, which is not two or more groups of {group_size} "
                    "completions (`num_generations`), as a variance needs: change one of them."
                )


def measure_policy(args: VarianceArguments, name: str, seed: int) -> dict[str, Any]:
    """Draw one pool of a policy or read the one that is kept, and measure every method on it."""
    pool = kept_policy_pool(args, name, seed)
    return {
        "num_parameters": _num_parameters(load_policy(name)),
        "mean_reward": pool.rewards.mean().item(),
        "mean_length": pool.lengths.mean().item(),
        "right_over_wrong": right_over_wrong(pool),
        "measured": measure_pool(args, pool, seed),
    }


def kept_policy_pool(args: VarianceArguments, name: str, seed: int) -> Pool:
    """The pool of a policy, drawn or read."""
    policy = load_policy(name)
    num_prompts = args.num_prompts_large if _num_parameters(policy) > _LARGE else args.num_prompts
    settings: dict[str, Any] = {"policy": asdict(POLICIES[name]), "seed": seed, "num_prompts": num_prompts}
    settings |= {"num_completions": args.num_completions, "sketch_dim": args.sketch_dim}
    return kept(Path(args.kept) / f"{name}-{seed}.pool.pt", settings, lambda: _draw_pool(policy, settings))


def _num_parameters(policy: LoadedPolicy) -> int:
    return sum(parameter.numel() for parameter in policy.model.parameters())


def _draw_pool(policy: LoadedPolicy, settings: dict[str, Any]) -> Pool:
    counts = {key: settings[key] for key in ("num_prompts", "num_completions", "seed")}
    completions, rewards = sample_with_rewards(policy, **counts)
    return build_pool(policy.model, completions, rewards, sketch_dim=settings["sketch_dim"], seed=settings["seed"])


def measure_pool(args: Any, pool: Pool, seed: int) -> dict[str, dict[str, float]]:
    """Mean variance over prompts, by group size and label."""
    measured = {}
    for group_size in args.num_generations:
        variances = measure_methods(
            pool,
            METHODS,
            num_generations=group_size,
            num_prompts=args.prompts_per_batch,
            num_partitions=max(args.groups_per_prompt * group_size // args.num_completions, 1),
            generator=torch.Generator().manual_seed(seed),
        )
        measured[str(group_size)] = {label: variance.mean().item() for label, variance in variances.items()}
    return measured


def summarise_policy(reward: str, pools: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Figures of one policy over its pools, one per seed: its description, and the variance relative to RLOO's of
    every method by group size. Ratios are formed within a seed and then averaged."""
    by_seed = [pool["measured"] for pool in pools]
    summary: dict[str, Any] = {"reward": reward, **{name: mean(pool[name] for pool in pools) for name in _DESCRIPTION}}
    summary["methods"] = {method.label: {} for method in METHODS}
    for label, by_size in summary["methods"].items():
        for size in by_seed[0]:
            by_size[size] = spread([seed[size][label] / seed[size][RLOO.label] for seed in by_seed])
    if {"4", "8"} <= set(by_seed[0]):
        summary["default_at_4_over_rloo_at_8"] = mean(seed["4"][DEFAULT] / seed["8"][RLOO.label] for seed in by_seed)
    return summary


def main(args: VarianceArguments) -> None:
    """Measure, print and write."""
    started = machine()
    policies = {}
    with tqdm(total=len(args.policies) * args.num_seeds, desc="pools measured") as progress:
        for name in args.policies:
            pools = []
            for seed in range(args.num_seeds):
                progress.set_postfix_str(f"{name}, seed {seed}")
                pools.append(measure_policy(args, name, seed))
                progress.update()
            policies[name] = summarise_policy(POLICIES[name].reward, pools)
    biased = [method.label for method in METHODS if not method.unbiased]
    record = {"default": DEFAULT, "reference": RLOO.label, "biased": biased, "policies": policies}
    print(markdown(record | {"settings": asdict(args)}))
    write_record(args.output, args, started, record)


if __name__ == "__main__":
    torch.set_num_threads(1)  # tiny matrices: more threads only contend
    (arguments,) = TrlParser([VarianceArguments]).parse_args_and_config()
    main(arguments)
