"""Variance and bias of the policy gradient under every baseline, relative to RLOO's, on every policy of the studies.

    python -m benchmarks.policies
    python -m benchmarks.variance

Every seed draws its own held-out prompts and completions. Gradients are those of all parameters; the baselines see what the
trainer would see. How variance and bias are estimated is said in `benchmarks/gradient_variance.py`. What is finished is kept
below `runs/variance`, so an interrupted study goes on where it stopped.
"""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from trl import TrlParser

from benchmarks.completion_pool import build_pool, oracle_difference
from benchmarks.gradient_variance import RLOO, Measurement, Method, Pool, describe_weights, measure_methods
from benchmarks.policies import POLICIES
from benchmarks.policy_pools import LoadedPolicy, kept, load_policy, policy_identity, sample_with_rewards
from benchmarks.record import machine, write_record
from benchmarks.variance_summary import summarise, table

DEFAULT = "gradient-weighted, all, prior automatic"
_PRIORS = {"0": 0.0, "4": 4.0, "16": 16.0, "automatic": None}
METHODS = (
    RLOO,
    Method("none", "none"),
    Method("group mean (GRPO)", "group_mean", unbiased=False),
    Method("group mean x G/(G-1)", "rescaled_group_mean"),
    Method("length-weighted (OPO)", "length_weighted"),
    Method("logit-energy-weighted, prior 0", "gradient_weighted", "logit_energy"),
    Method("logit-energy-weighted, prior automatic", "gradient_weighted", "logit_energy", None),
    Method("mean, prior automatic", "gradient_weighted", "equal", None),
    *(
        Method(f"gradient-weighted, {weights}, prior {name}", "gradient_weighted", weights, strength)
        for weights in ("exact", "all", "last_k", "lm_head")
        for name, strength in _PRIORS.items()
    ),
    Method("oracle b* (whole pool)", "oracle", "exact", unbiased=False),
)
# Above it fewer prompts are drawn: the time of a pool grows with the parameters.
_LARGE = 5_000_000
# Completions of every pool whose gradients are compared with the oracle's.
_NUM_CHECKED = 8


@dataclass
class VarianceArguments:
    """
    Settings of the study.

    Args:
        policies (`list[str]`, *optional*): Names of policies; all of them if not given.
        num_seeds (`int`, *optional*, defaults to `3`): Independent draws of prompts, completions and projections.
        num_prompts (`int`, *optional*, defaults to `32`): Prompts of a pool.
        num_prompts_large (`int`, *optional*, defaults to `16`): The same for policies of more than 5 million parameters.
        num_completions (`int`, *optional*, defaults to `32`): Completions of every prompt.
        prompts_per_batch (`int`, *optional*, defaults to `16`): Prompts that a batch, and so a prior, is made of.
        num_generations (`list[int]`, *optional*, defaults to `[2, 4, 8, 16]`): Group sizes G, ascending.
        groups_per_prompt (`int`, *optional*, defaults to `16`): Groups of every prompt, over all partitions.
        sketch_dim (`int`, *optional*, defaults to `4096`): Length of a sketch, the trainer's default.
        kept (`str`, *optional*, defaults to `"runs/variance"`): Where pools and measurements are kept.
        output (`str`, *optional*, defaults to `"benchmarks/results/variance.json"`): Where the numbers go.
    """

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
    num_generations: list[int] = field(
        default_factory=lambda: [2, 4, 8, 16], metadata={"help": "Group sizes, ascending."}
    )
    groups_per_prompt: int = field(default=16, metadata={"help": "Groups of every prompt, over all partitions."})
    sketch_dim: int = field(default=4096, metadata={"help": "Length of a sketch."})
    kept: str = field(default="runs/variance", metadata={"help": "Where pools and measurements are kept."})
    output: str = field(default="benchmarks/results/variance.json", metadata={"help": "Where the numbers go."})

    def __post_init__(self) -> None:
        for name in self.policies:
            if name not in POLICIES:
                raise ValueError(f"`policies` has {name!r}, which there is not. Choose from: {', '.join(POLICIES)}.")
        for field_name in ("num_prompts", "num_prompts_large"):
            if getattr(self, field_name) % self.prompts_per_batch:
                raise ValueError(
                    f"`{field_name}` is {getattr(self, field_name)}, which is not a multiple of `prompts_per_batch` "
                    f"{self.prompts_per_batch}: a prompt would be left over. Change one of them."
                )
        if len(self.num_generations) < 2 or sorted(set(self.num_generations)) != self.num_generations:
            raise ValueError(
                f"`num_generations` is {self.num_generations}: give at least two group sizes, ascending, because RLOO's "
                "variance is interpolated between them."
            )
        for group_size in self.num_generations:
            if self.num_completions % group_size or self.num_completions < 2 * group_size:
                raise ValueError(
                    f"`num_completions` is {self.num_completions}, which is not two or more groups of {group_size} "
                    "completions (`num_generations`), as a variance needs: change one of them."
                )


def measure_policy(args: VarianceArguments, name: str, seed: int) -> dict[str, Any]:
    """Draw one pool of a policy and measure every method on it, or read what is kept of both."""
    policy = load_policy(name)
    num_prompts = args.num_prompts_large if policy.num_parameters > _LARGE else args.num_prompts
    settings: dict[str, Any] = {"policy": policy_identity(name), "seed": seed, "num_prompts": num_prompts}
    settings |= {"num_completions": args.num_completions, "sketch_dim": args.sketch_dim}
    pool, difference = kept(Path(args.kept) / f"{name}-{seed}.pool.pt", settings, lambda: _draw_pool(policy, settings))
    settings = settings | {"methods": [asdict(method) for method in METHODS], "groups": args.groups_per_prompt}
    settings |= {"prompts_per_batch": args.prompts_per_batch, "num_generations": args.num_generations}
    measured = kept(Path(args.kept) / f"{name}-{seed}.measured.pt", settings, lambda: _measure_pool(args, pool, seed))
    return {
        "policy": name,
        "seed": seed,
        "task": policy.settings.task,
        "reward": policy.settings.reward,
        "num_parameters": policy.num_parameters,
        "num_prompts": num_prompts,
        "mean_reward": pool.rewards.mean().item(),
        "accuracy": (pool.rewards >= 1).double().mean().item(),
        "fraction_of_prompts_with_equal_rewards": (pool.rewards.std(dim=1) == 0).double().mean().item(),
        "mean_length": pool.lengths.mean().item(),
        "difference_from_oracle": difference,
        "weights": describe_weights(pool),
        "measured": measured,
    }


def _draw_pool(policy: LoadedPolicy, settings: dict[str, Any]) -> tuple[Pool, float]:
    counts = {key: settings[key] for key in ("num_prompts", "num_completions", "seed")}
    completions, rewards = sample_with_rewards(policy, **counts)
    pool = build_pool(policy.model, completions, rewards, sketch_dim=settings["sketch_dim"], seed=settings["seed"])
    return pool, oracle_difference(policy.model, completions, _NUM_CHECKED)


def _measure_pool(args: VarianceArguments, pool: Pool, seed: int) -> dict[str, dict[str, dict[str, Any]]]:
    """Every method's figures as plain numbers, by group size and label."""
    measured = {}
    for group_size in args.num_generations:
        measurements = measure_methods(
            pool,
            METHODS,
            num_generations=group_size,
            num_prompts=args.prompts_per_batch,
            num_partitions=max(args.groups_per_prompt * group_size // args.num_completions, 1),
            generator=torch.Generator().manual_seed(seed),
        )
        measured[str(group_size)] = {label: _plain(measurement) for label, measurement in measurements.items()}
    return measured


def _plain(measurement: Measurement) -> dict[str, Any]:
    return {
        "variance": measurement.variance.mean().item(),
        "squared_signal": measurement.squared_signal.mean().item(),
        "squared_bias": measurement.squared_bias.tolist(),
        "objective": measurement.objective,
    }


def make_parser() -> TrlParser:
    """Parser of the command line; a misspelt key fails."""
    return TrlParser([VarianceArguments])


def main(args: VarianceArguments) -> None:
    """Measure, print and write."""
    started = machine()
    results = []
    with tqdm(total=len(args.policies) * args.num_seeds, desc="pools measured") as progress:
        for name in args.policies:
            for seed in range(args.num_seeds):
                progress.set_postfix_str(f"{name}, seed {seed}")
                results.append(measure_policy(args, name, seed))
                progress.update()
    summary = summarise(results, METHODS, default=DEFAULT)
    print(table(summary))
    write_record(args.output, args, started, summary)


if __name__ == "__main__":
    torch.set_num_threads(1)  # tiny matrices: more threads only contend
    (arguments,) = make_parser().parse_args_and_config()
    main(arguments)
