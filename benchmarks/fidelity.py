r"""Error of weights, baseline and rho under every scope and sketch size, also where a scope should fail.

    python -m benchmarks.policies
    python -m benchmarks.fidelity

Exact means the oracle: one backward per sequence, all trainable parameters. Every seed draws its own prompts,
completions and projections, one batch. Finished batches are kept below `runs/fidelity`.

Shapes: P prompts, G completions of each, D trained parameters, k numbers of a sketch.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from tqdm import tqdm
from trl import TrlParser

from benchmarks.completion_pool import kept, sample_with_rewards
from benchmarks.policies import POLICIES, LoadedPolicy, load_policy
from benchmarks.record import machine, spread, write_record
from benchmarks.sections.fidelity import markdown
from oblr_trl.baselines import gradient_variance, gradient_weighted_baseline, leave_one_out_baseline
from oblr_trl.gradient_snr import gradient_moments, per_prompt_gradients, rho
from oblr_trl.scores import reference_scores, score_sketches

SCOPES: dict[str, tuple[str, int | None]] = {
    "lm_head": ("lm_head", None),
    "last_k=1": ("last_k", 1),
    "last_k=2": ("last_k", 2),
    "all": ("all", None),
}
# Confident enough that the logits' gradients nearly vanish where the policy is right.
_SATURATION = 3.0


class Case(NamedTuple):
    """A policy and a variation of it before it samples."""

    policy: str
    # "frozen head": embedding and output projection, which are one matrix, are not trained; "saturated head": final
    # norm times 3; "LoRA": only adapters of the attention's projections are trained.
    variant: str = "as it is"


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
    """Settings of the study; fields are documented by their `help`."""

    num_seeds: int = field(default=3, metadata={"help": "Independent batches of every case."})
    num_prompts: int = field(default=16, metadata={"help": "Prompts of a batch."})
    num_generations: int = field(default=8, metadata={"help": "Completions of every prompt."})
    sketch_dims: list[int] = field(
        default_factory=lambda: [256, 1024, 4096, 16384], metadata={"help": "Lengths of a sketch."}
    )
    prior_strength: float = field(default=16.0, metadata={"help": "Prior strength of the baseline, in completions."})
    kept: str = field(default="runs/fidelity", metadata={"help": "Where measurements are kept."})
    output: str = field(default="benchmarks/results/fidelity.json", metadata={"help": "Where the numbers go."})

    def __post_init__(self) -> None:
        if self.num_prompts < 2:
            raise ValueError(f"`num_prompts` is {self.num_prompts}: rho needs the gradients of at least 2 prompts.")
        if self.num_generations < 2:
            raise ValueError(
                f"`num_generations` is {self.num_generations}: leave-one-out needs at least 2 completions."
            )


def prepare(policy: LoadedPolicy, variant: str) -> LoadedPolicy:
    """The policy as the variant says; its model is changed in place."""
    model = policy.model
    if variant == "frozen head":
        model.get_output_embeddings().weight.requires_grad_(False)
    elif variant == "saturated head":
        with torch.no_grad():
            model.get_decoder().norm.weight.mul_(_SATURATION)
    elif variant == "LoRA":
        targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
        model = get_peft_model(model, LoraConfig(r=8, target_modules=targets, task_type="CAUSAL_LM")).eval()
    return policy._replace(model=model)


def measure_sketches(
    rewards: Tensor,
    scores: Sequence[Tensor],
    sketches: Mapping[str, Mapping[str, Tensor]],
    *,
    prior_strength: float,
) -> dict[str, Any]:
    """
    Compare every sketch of a batch with exact scores.

    Args:
        rewards (`torch.Tensor` of shape `(P, G)`): Rewards.
        scores (`Sequence[torch.Tensor]`): Exact scores `(G, D)` of every prompt.
        sketches (`Mapping`): Sketches `(P * G, k)` by scope and length.
        prior_strength (`float`): Prior strength of the baseline.

    Returns:
        `dict`: The exact moments; `rloo_objective`, the objective of RLOO relative to that of the exact baseline; and
        for every scope and sketch `norm_error`, the median relative difference of ‖z‖² from the exact one; `objective`
        of the baseline relative to that of the exact one; and the `moments` of the gradient under the exact baseline's
        advantages.
    """
    exact = torch.stack([score.double().square().sum(dim=1) for score in scores])
    baseline = gradient_weighted_baseline(rewards, exact, prior_strength=prior_strength)
    advantages = rewards - baseline
    minimum = gradient_variance(rewards, exact, baseline)
    gradients = torch.stack(
        [advantage @ score.double() / len(advantage) for advantage, score in zip(advantages, scores, strict=True)]
    )

    def compared(sketch: Tensor) -> dict[str, Any]:
        weights = sketch.double().square().sum(dim=1).view_as(rewards)
        own = gradient_weighted_baseline(rewards, weights, prior_strength=prior_strength)
        sketched = per_prompt_gradients(sketch.double().view(*rewards.shape, -1), advantages)
        return {
            "norm_error": (weights / exact - 1)[exact > 0].abs().median().item(),
            "objective": gradient_variance(rewards, exact, own) / minimum,
            "moments": tuple(gradient_moments(sketched)),
        }

    return {
        "moments": tuple(gradient_moments(gradients)),
        "rloo_objective": gradient_variance(rewards, exact, leave_one_out_baseline(rewards)) / minimum,
        "scopes": {
            scope: {name: compared(sketch) for name, sketch in by_name.items()} for scope, by_name in sketches.items()
        },
    }


def measure_batch(args: FidelityArguments, case: Case, seed: int) -> dict[str, Any]:
    """One batch of a case: its description, and every scope and sketch size against the oracle."""
    torch.manual_seed(seed)  # of the adapters
    policy = prepare(load_policy(case.policy), case.variant)
    completions, rewards = sample_with_rewards(
        policy, num_prompts=args.num_prompts, num_completions=args.num_generations, seed=seed
    )
    by_prompt = torch.arange(rewards.numel()).split(rewards.size(1))
    scores = [reference_scores(policy.model, *completions.inputs(rows)) for rows in by_prompt]  # P of (G, D)
    sketch = partial(score_sketches, policy.model, *completions.inputs(), seed=seed, micro_batch_size=32)
    sketches = {
        scope: {str(dim): sketch(scope=name, last_k=last_k, sketch_dim=dim) for dim in args.sketch_dims}
        for scope, (name, last_k) in SCOPES.items()
    }
    return measure_sketches(rewards, scores, sketches, prior_strength=args.prior_strength)


def summarise(batches: Sequence[dict[str, Any]], num_prompts: int) -> dict[str, Any]:
    """Figures of one case over its batches."""
    summary: dict[str, Any] = {"rloo_objective": spread([batch["rloo_objective"] for batch in batches]), "scopes": {}}
    for scope, by_dim in batches[0]["scopes"].items():
        summary["scopes"][scope] = {
            dim: {
                figure: spread([batch["scopes"][scope][dim][figure] for batch in batches])
                for figure in ("norm_error", "objective")
            }
            | {"rho": rho_differences(batches, scope, dim, num_prompts)}
            for dim in by_dim
        }
    return summary


def rho_differences(batches: Sequence[dict[str, Any]], scope: str, name: str, num_prompts: int) -> dict[str, float]:
    """
    Rho from sketches minus rho from exact gradients, each formed from the mean signal and noise of the batches: a
    difference and no ratio, because a signal estimated from few batches may be negative and its rho 0. `min` and `max`
    leave one batch out.
    """

    def rho_of(moments: Sequence[tuple[float, float]]) -> float:
        signal, noise = (mean(values) for values in zip(*moments, strict=True))
        return rho(signal, noise, num_prompts)

    def difference(chosen: Sequence[dict[str, Any]]) -> float:
        sketched = [batch["scopes"][scope][name]["moments"] for batch in chosen]
        return rho_of(sketched) - rho_of([batch["moments"] for batch in chosen])

    left_out = [difference([*batches[:i], *batches[i + 1 :]]) for i in range(len(batches)) if len(batches) > 1]
    return {
        "exact": rho_of([batch["moments"] for batch in batches]),
        "difference": difference(batches),
        "min": min(left_out, default=math.nan),
        "max": max(left_out, default=math.nan),
    }


def main(args: FidelityArguments) -> None:
    """Measure, print and write."""
    started = machine()
    cases: dict[str, Any] = {}
    with tqdm(total=len(CASES) * args.num_seeds, desc="batches measured") as progress:
        for case in CASES:
            batches = []
            for seed in range(args.num_seeds):
                settings = {**asdict(args), "case": case, "policy": asdict(POLICIES[case.policy]), "seed": seed}
                settings = {name: settings[name] for name in settings if name not in ("num_seeds", "kept", "output")}
                path = Path(args.kept) / f"{case.policy}-{case.variant.replace(' ', '_')}-{seed}.pt"
                batches.append(kept(path, settings, partial(measure_batch, args, case, seed)))
                progress.update()
            cases[f"{case.policy}, {case.variant}"] = summarise(batches, args.num_prompts)
    print(markdown({"settings": asdict(args), "cases": cases}))
    write_record(args.output, args, started, {"cases": cases})


if __name__ == "__main__":
    torch.set_num_threads(1)  # tiny matrices: more threads only contend
    (arguments,) = TrlParser([FidelityArguments]).parse_args_and_config()
    main(arguments)
