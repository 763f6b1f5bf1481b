"""Variance of the policy gradient under every baseline, relative to RLOO's, on the model that the recipes start from.

    python -m oblr_trl.scripts.start_model
    python -m benchmarks.start_model_variance

Every seed draws its own held-out prompts and completions. Gradients are those of all parameters, by one backward per
completion; the baselines see what the trainer would see. How the variance is estimated is said in `benchmarks/variance.py`.
"""

import math
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, set_seed
from trl import TrlParser

from benchmarks.completion_pool import build_pool, sample_completions
from benchmarks.record import machine, write_record
from benchmarks.variance import Method, Pool, mean_variances
from oblr_trl.data import DataArguments, load_prompts
from oblr_trl.scripts.start_model import TASK, TASK_PARAMS
from oblr_trl.tasks import decode_entry, make_task

RLOO = "RLOO (mean of the others)"
DEFAULT = "gradient-weighted, sketch, prior automatic"
TARGET = 0.7
_PRIORS = {"0": 0.0, "4": 4.0, "16": 16.0, "automatic": None}
METHODS = (
    Method(RLOO, "leave_one_out"),
    Method("group mean x G/(G-1) (GRPO)", "group_mean"),
    Method("length-weighted (OPO)", "length_weighted"),
    Method("mean, prior automatic", "gradient_weighted", "equal", None),
    *(
        Method(f"gradient-weighted, {weights}, prior {name}", "gradient_weighted", weights, strength)
        for weights in ("exact", "sketch", "lm_head")
        for name, strength in _PRIORS.items()
    ),
    Method("oracle b* (whole pool; biased)", "oracle", "exact"),
)

Policy = tuple[PreTrainedModel, PreTrainedTokenizerBase]


@dataclass
class VarianceArguments:
    """
    Settings of the benchmark.

    Args:
        model (`str`, *optional*, defaults to `".cache/tiny-Qwen3-chain_sum"`): Directory of the model.
        num_seeds (`int`, *optional*, defaults to `3`): Independent draws of prompts, completions and projections.
        num_prompts (`int`, *optional*, defaults to `48`): Prompts of a pool.
        num_completions (`int`, *optional*, defaults to `32`): Completions of every prompt.
        prompts_per_batch (`int`, *optional*, defaults to `16`): Prompts that a batch, and so a prior, is made of.
        num_generations (`list[int]`, *optional*, defaults to `[8, 4]`): Group sizes G.
        num_partitions (`int`, *optional*, defaults to `8`): Random divisions of a pool into groups.
        max_completion_length (`int`, *optional*, defaults to `8`): Tokens sampled at most.
        sketch_dim (`int`, *optional*, defaults to `4096`): Length of a sketch, the trainer's default.
        output (`str`, *optional*, defaults to `"benchmarks/results/start_model_variance.json"`): Where the numbers go.
    """

    model: str = field(default=".cache/tiny-Qwen3-chain_sum", metadata={"help": "Directory of the model."})
    num_seeds: int = field(default=3, metadata={"help": "Independent draws of prompts, completions and projections."})
    num_prompts: int = field(default=48, metadata={"help": "Prompts of a pool."})
    num_completions: int = field(default=32, metadata={"help": "Completions of every prompt."})
    prompts_per_batch: int = field(default=16, metadata={"help": "Prompts that a batch, and so a prior, is made of."})
    num_generations: list[int] = field(default_factory=lambda: [8, 4], metadata={"help": "Group sizes G."})
    num_partitions: int = field(default=8, metadata={"help": "Random divisions of a pool into groups."})
    max_completion_length: int = field(default=8, metadata={"help": "Tokens sampled at most."})
    sketch_dim: int = field(default=4096, metadata={"help": "Length of a sketch."})
    output: str = field(
        default="benchmarks/results/start_model_variance.json", metadata={"help": "Where the numbers go."}
    )

    def __post_init__(self) -> None:
        if self.num_prompts % self.prompts_per_batch:
            raise ValueError(
                f"`num_prompts` is {self.num_prompts}, which is not a multiple of `prompts_per_batch` "
                f"{self.prompts_per_batch}: a prompt would be left over. Change one of them."
            )
        for group_size in self.num_generations:
            if self.num_completions % group_size or self.num_completions < 2 * group_size:
                raise ValueError(
                    f"`num_completions` is {self.num_completions}, which is not two or more groups of {group_size} "
                    "completions (`num_generations`), as a variance needs: change one of them."
                )


def load_policy(path: str) -> Policy:
    """Model and tokenizer of a local directory, in float32."""
    if not (Path(path) / "config.json").is_file():
        raise ValueError(
            f"`model` is {path!r}, where there is no model. Make the start model with "
            "`python -m oblr_trl.scripts.start_model`."
        )
    tokenizer = AutoTokenizer.from_pretrained(path)
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval(), tokenizer


def measure_seed(
    args: VarianceArguments,
    policy: Policy,
    rows: list[dict[str, str]],
    seed: int,
    progress: tqdm,
) -> dict[str, Any]:
    """Draw one pool from `rows` (prompts and entries of the task) and measure every method on it."""
    set_seed(seed)
    pool = _draw_pool(args, policy, rows, seed, progress)
    result: dict[str, Any] = {
        "seed": seed,
        "mean_reward": pool.rewards.mean().item(),
        "fraction_of_prompts_with_equal_rewards": (pool.rewards.std(dim=1) == 0).double().mean().item(),
        "mean_length": pool.lengths.mean().item(),
        "sketch_weight_error_median": _median_error(pool.weights["sketch"], pool.weights["exact"]),
        "variance": {},
        "relative_to_rloo": {},
    }
    for group_size in args.num_generations:
        variances = mean_variances(
            pool,
            METHODS,
            num_generations=group_size,
            num_prompts=args.prompts_per_batch,
            num_partitions=args.num_partitions,
            generator=torch.Generator().manual_seed(seed),
            on_partition=progress.update,
        )
        result["variance"][str(group_size)] = variances
        reference = variances[RLOO]
        result["relative_to_rloo"][str(group_size)] = {
            label: variance / reference if reference > 0 else math.nan for label, variance in variances.items()
        }
    return result


def _draw_pool(
    args: VarianceArguments,
    policy: Policy,
    rows: list[dict[str, str]],
    seed: int,
    progress: tqdm,
) -> Pool:
    completions = sample_completions(
        *policy,
        [row["prompt"] for row in rows],
        num_completions=args.num_completions,
        max_completion_length=args.max_completion_length,
    )
    task = make_task(TASK, TASK_PARAMS, size=1, seed=0)
    entries = [decode_entry(row["entry"]) for row in rows for _ in range(args.num_completions)]
    rewards = [task.score_answer(text, entry) for text, entry in zip(completions.texts, entries, strict=True)]
    return build_pool(
        policy[0],
        completions,
        torch.tensor(rewards).view(len(rows), args.num_completions),
        sketch_dim=args.sketch_dim,
        seed=seed,
        on_prompt=progress.update,
    )


def _median_error(estimate: torch.Tensor, exact: torch.Tensor) -> float:
    used = exact > 0
    return ((estimate - exact).abs() / exact)[used].median().item()


def summarise(results: list[dict[str, Any]], group_sizes: list[int]) -> dict[str, dict[str, dict[str, float]]]:
    """Mean, standard deviation (`nan` for one seed), least and greatest ratio over seeds, by group size and label."""
    summary: dict[str, dict[str, dict[str, float]]] = {}
    for group_size in map(str, group_sizes):
        summary[group_size] = {}
        for method in METHODS:
            ratios = [result["relative_to_rloo"][group_size][method.label] for result in results]
            summary[group_size][method.label] = {
                "mean": mean(ratios),
                "std": stdev(ratios) if len(ratios) > 1 else math.nan,
                "min": min(ratios),
                "max": max(ratios),
            }
    return summary


def print_table(
    args: VarianceArguments, results: list[dict[str, Any]], summary: dict[str, dict[str, dict[str, float]]]
) -> None:
    """Print the ratios, and whether the trainer's default meets its target."""
    print(
        f"Within-prompt variance of the gradient estimate relative to RLOO's: mean +- standard deviation over "
        f"{args.num_seeds} seeds\n({args.num_prompts} prompts x {args.num_completions} completions each, "
        f"{args.prompts_per_batch} prompts a batch; mean reward {mean(r['mean_reward'] for r in results):.2f})\n"
    )
    print(f"{'baseline':<46}" + "".join(f"{f'G = {group_size}':>18}" for group_size in args.num_generations))
    for method in METHODS:
        cells = [summary[str(group_size)][method.label] for group_size in args.num_generations]
        marker = " *" if method.label == DEFAULT else ""
        print(f"{method.label + marker:<46}" + "".join(f"{c['mean']:>10.3f} +-{c['std']:>5.3f}" for c in cells))
    print("\n* the trainer's default")
    for group_size in args.num_generations:
        ratio = summary[str(group_size)][DEFAULT]["mean"]
        verdict = "met" if ratio <= TARGET else "MISSED"
        print(f"target: default at most {TARGET} at G = {group_size}: {ratio:.3f}, {verdict}")


def make_parser() -> TrlParser:
    """Parser of the command line; a misspelt key fails."""
    return TrlParser([VarianceArguments])


def main(args: VarianceArguments) -> None:
    """Measure, print and write."""
    started = machine()
    policy = load_policy(args.model)
    data = DataArguments(task=TASK, task_params=TASK_PARAMS, train_size=1, test_size=args.num_seeds * args.num_prompts)
    rows = list(load_prompts(data)["test"])
    steps = args.num_prompts + args.num_partitions * len(args.num_generations)
    with tqdm(total=args.num_seeds * steps, desc="prompts scored and partitions measured") as progress:
        results = [
            measure_seed(args, policy, rows[seed * args.num_prompts :][: args.num_prompts], seed, progress)
            for seed in range(args.num_seeds)
        ]
    summary = summarise(results, args.num_generations)
    print_table(args, results, summary)
    write_record(args.output, args, started, {"default": DEFAULT, "relative_to_rloo": summary, "seeds": results})


if __name__ == "__main__":
    torch.set_num_threads(1)  # one tiny sequence at a time: more threads only contend
    (arguments,) = make_parser().parse_args_and_config()
    main(arguments)
