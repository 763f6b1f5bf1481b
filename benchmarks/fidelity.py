"""How well every scope and sketch size reproduces exact weights, the baseline and rho, also where a scope should fail.

    python -m benchmarks.policies
    python -m benchmarks.fidelity

Exact is what the oracle gives: one backward per sequence, all trainable parameters. Every seed draws its own prompts,
completions and projections, one batch. What is finished is kept below `runs/fidelity`.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from tqdm import tqdm
from trl import TrlParser

from benchmarks.fidelity_measures import measure_sketches, rho_differences
from benchmarks.policy_pools import LoadedPolicy, kept, load_policy, policy_identity, sample_with_rewards
from benchmarks.record import machine, write_record
from benchmarks.variance_summary import spread
from oblr_trl.scores import reference_scores, score_sketches

SCOPES: dict[str, tuple[str, int | None]] = {
    "lm_head": ("lm_head", None),
    "last_k=1": ("last_k", 1),
    "last_k=2": ("last_k", 2),
    "all": ("all", None),
}
# Confident enough that the logits' gradients nearly vanish where the policy is right.
_SATURATION = 3.0


@dataclass(frozen=True)
class Case:
    """
    A policy and what is done to it before it samples.

    Args:
        policy (`str`): Name of the policy.
        variant (`str`, *optional*, defaults to `"as it is"`): `"as it is"`; `"frozen head"`: embedding and output projection,
            which are one matrix, are not trained; `"saturated head"`: final norm times 3; `"LoRA"`: only adapters of the
            attention's projections are trained.
    """

    policy: str
    variant: str = "as it is"

    @property
    def label(self) -> str:
        """Name in tables."""
        return f"{self.policy}, {self.variant}"


CASES = (
    Case("chain_sum"),
    Case("spell_backward"),
    Case("chain_sum-0.1M"),
    Case("number_sorting"),
    Case("chain_sum", "frozen head"),
    Case("chain_sum", "saturated head"),
    Case("chain_sum", "LoRA"),
)


@dataclass
class FidelityArguments:
    """
    Settings of the study.

    Args:
        policies (`list[str]`, *optional*): Policies whose cases are measured; all of them if not given.
        num_seeds (`int`, *optional*, defaults to `3`): Independent batches.
        num_prompts (`int`, *optional*, defaults to `16`): Prompts of a batch.
        num_generations (`int`, *optional*, defaults to `8`): Completions of every prompt.
        sketch_dims (`list[int]`, *optional*, defaults to `[256, 1024, 4096, 16384]`): Lengths of a sketch.
        prior_strength (`float`, *optional*, defaults to `16.0`): Prior strength of the baseline.
        kept (`str`, *optional*, defaults to `"runs/fidelity"`): Where measurements are kept.
        output (`str`, *optional*, defaults to `"benchmarks/results/fidelity.json"`): Where the numbers go.
    """

    policies: list[str] = field(
        default_factory=lambda: list(dict.fromkeys(case.policy for case in CASES)),
        metadata={"help": "Policies whose cases are measured; all of them if not given."},
    )
    num_seeds: int = field(default=3, metadata={"help": "Independent batches."})
    num_prompts: int = field(default=16, metadata={"help": "Prompts of a batch."})
    num_generations: int = field(default=8, metadata={"help": "Completions of every prompt."})
    sketch_dims: list[int] = field(
        default_factory=lambda: [256, 1024, 4096, 16384], metadata={"help": "Lengths of a sketch."}
    )
    prior_strength: float = field(default=16.0, metadata={"help": "Prior strength of the baseline."})
    kept: str = field(default="runs/fidelity", metadata={"help": "Where measurements are kept."})
    output: str = field(default="benchmarks/results/fidelity.json", metadata={"help": "Where the numbers go."})

    def __post_init__(self) -> None:
        known = list(dict.fromkeys(case.policy for case in CASES))
        for name in self.policies:
            if name not in known:
                raise ValueError(
                    f"`policies` has {name!r}, of which there is no case. Choose from: {', '.join(known)}."
                )
        if self.num_prompts < 2:
            raise ValueError(f"`num_prompts` is {self.num_prompts}: rho needs the gradients of at least 2 prompts.")
        if self.num_generations < 2:
            raise ValueError(
                f"`num_generations` is {self.num_generations}: leave-one-out needs at least 2 completions."
            )


def prepare(policy: LoadedPolicy, variant: str) -> LoadedPolicy:
    """The policy with what the variant does to it; its model is changed in place."""
    model: Any = policy.model
    if variant == "frozen head":
        model.get_output_embeddings().weight.requires_grad_(False)
    elif variant == "saturated head":
        with torch.no_grad():
            model.get_decoder().norm.weight.mul_(_SATURATION)
    elif variant == "LoRA":
        targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
        model = get_peft_model(model, LoraConfig(r=8, target_modules=targets, task_type="CAUSAL_LM")).eval()
    return LoadedPolicy(policy.settings, model, policy.tokenizer)


def measure_batch(args: FidelityArguments, case: Case, seed: int) -> dict[str, Any]:
    """One batch of a case: what it is, and every scope and sketch size against the oracle."""
    torch.manual_seed(seed)  # of the adapters
    policy = prepare(load_policy(case.policy), case.variant)
    completions, rewards = sample_with_rewards(
        policy, num_prompts=args.num_prompts, num_completions=args.num_generations, seed=seed
    )
    inputs = (completions.input_ids, completions.attention_mask, completions.completion_mask)
    rows = torch.arange(rewards.numel()).split(rewards.size(1))
    scores = [reference_scores(policy.model, *(tensor[row] for tensor in inputs)) for row in rows]  # P of (G, D)

    def sketched(scope: str, **options: Any) -> Tensor:
        name, last_k = SCOPES[scope]
        return score_sketches(policy.model, *inputs, scope=name, last_k=last_k, micro_batch_size=32, **options)

    measured = measure_sketches(
        rewards,
        scores,
        {
            scope: (
                sketched(scope, method="exact").view_as(rewards),
                {str(dim): sketched(scope, sketch_dim=dim, seed=seed) for dim in args.sketch_dims},
            )
            for scope in SCOPES
        },
        prior_strength=args.prior_strength,
    )
    return measured | {
        "seed": seed,
        "num_trained_parameters": scores[0].size(1),
        "mean_length": completions.completion_mask.sum(dim=1).double().mean().item(),
        "mean_reward": rewards.mean().item(),
    }


def summarise(batches: list[dict[str, Any]], num_prompts: int) -> dict[str, Any]:
    """Figures of one case over its batches."""
    summary: dict[str, Any] = {"num_trained_parameters": batches[0]["num_trained_parameters"]}
    for key in ("mean_length", "mean_reward"):
        summary[key] = sum(batch[key] for batch in batches) / len(batches)
    summary["rloo_objective"] = spread([batch["rloo_objective"] for batch in batches])
    summary["scopes"] = {}
    for scope, by_dim in batches[0]["scopes"].items():
        summary["scopes"][scope] = {
            dim: {
                figure: spread([batch["scopes"][scope][dim][figure] for batch in batches])
                for figure in ("rank_correlation", "norm_error", "baseline_difference", "objective")
            }
            | {"rho": rho_differences(batches, scope, dim, num_prompts)}
            for dim in by_dim
        }
    return summary


def table(record: dict[str, Any], sketch_dim: str) -> str:
    """Every case and scope at one sketch size, as plain text."""
    lines = [f"{f'sketch of {sketch_dim}':<34}{'rank':>7}{'norm':>8}{'b':>8}{'objective':>11}{'rho':>8}"]
    for label, case in record["cases"].items():
        lines.append(f"{label} (RLOO's objective {case['rloo_objective']['mean']:.2f})")
        for scope, by_dim in case["scopes"].items():
            figures = by_dim[sketch_dim]
            means = {name: figures[name]["mean"] for name in figures if name != "rho"}
            lines.append(
                f"  {scope:<32}{means['rank_correlation']:>7.2f}{means['norm_error']:>8.1%}"
                f"{means['baseline_difference']:>8.3f}{means['objective']:>11.3f}{figures['rho']['difference']:>+8.3f}"
            )
    return "\n".join(lines)


def make_parser() -> TrlParser:
    """Parser of the command line; a misspelt key fails."""
    return TrlParser([FidelityArguments])


def main(args: FidelityArguments) -> None:
    """Measure, print and write."""
    started = machine()
    cases = [case for case in CASES if case.policy in args.policies]
    results: dict[str, Any] = {}
    with tqdm(total=len(cases) * args.num_seeds, desc="batches measured") as progress:
        for case in cases:
            batches = []
            for seed in range(args.num_seeds):
                progress.set_postfix_str(f"{case.label}, seed {seed}")
                path = Path(args.kept) / f"{case.policy}-{case.variant.replace(' ', '_')}-{seed}.pt"
                batches.append(kept(path, _settings(args, case, seed), _measurement(args, case, seed)))
                progress.update()
            results[case.label] = asdict(case) | summarise(batches, args.num_prompts)
    record = {"cases": results}
    print(table(record, str(args.sketch_dims[-1])))
    write_record(args.output, args, started, record)


def _measurement(args: FidelityArguments, case: Case, seed: int) -> Callable[[], dict[str, Any]]:
    return lambda: measure_batch(args, case, seed)


def _settings(args: FidelityArguments, case: Case, seed: int) -> dict[str, Any]:
    settings = {
        key: value for key, value in asdict(args).items() if key not in ("policies", "num_seeds", "kept", "output")
    }
    return settings | {"case": asdict(case), "policy": policy_identity(case.policy), "seed": seed}


if __name__ == "__main__":
    torch.set_num_threads(1)  # tiny matrices: more threads only contend
    (arguments,) = make_parser().parse_args_and_config()
    main(arguments)
