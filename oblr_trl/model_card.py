"""The card that TRL writes for a model, under the name of the method that was really in use and with its settings."""

import math
import os
import textwrap
from typing import Any, NamedTuple

from transformers.training_args import OptimizerNames
from trl import GRPOTrainer, RLOOTrainer

from oblr_trl import __version__
from oblr_trl.oblrpo_config import OBLRPOConfig

PAPER_TITLE = "OBLR-PO: A Theoretical Framework for Stable Reinforcement Learning"
PAPER_TITLE_2026 = (
    "Variance-aware baselines and adaptive learning rates for reinforcement learning with verifiable rewards"
)

# The heading of TRL's template that ours goes before, so that all of "Training procedure" stays together.
_NEXT_HEADING = "### Framework versions"


class Method(NamedTuple):
    """What a card calls a method, tags it with and cites: `_name`, `_tag_names` and `_paper` of a trainer of TRL."""

    name: str
    tag_names: list[str]
    paper: dict[str, str]


OBLRPO = Method(
    "OBLR-PO",
    ["trl", "oblr-po", "oblr_trl"],
    {
        "title": PAPER_TITLE,
        "id": "2511.23310",
        # docstyle-ignore
        "citation": textwrap.dedent(f"""\
            @article{{huang2025oblrpo,
                title        = {{{{{PAPER_TITLE}}}}},
                author       = {{Huang and Sheng and Zheng}},
                year         = 2025,
                eprint       = {{arXiv:2511.23310}},
                note         = {{Re-titled in 2026: {PAPER_TITLE_2026}}},
            }}"""),
    },
)
_OPO = Method(
    "OPO",
    ["trl", "opo", "oblr_trl"],
    {
        "title": "On-Policy RL with Optimal Reward Baseline",
        "id": "2505.23585",
        # docstyle-ignore
        "citation": textwrap.dedent("""\
            @article{hao2025opo,
                title        = {{On-Policy RL with Optimal Reward Baseline}},
                author       = {Yaru Hao and Li Dong and Xun Wu and Shaohan Huang and Zewen Chi and Furu Wei},
                year         = 2025,
                eprint       = {arXiv:2505.23585},
            }"""),
    },
)
# Methods whose learning rate is the schedule alone.
_METHOD_OF_BASELINE = {
    "gradient_weighted": OBLRPO,
    "group_mean": Method(GRPOTrainer._name, [*GRPOTrainer._tag_names, "oblr_trl"], GRPOTrainer._paper),
    "leave_one_out": Method(RLOOTrainer._name, [*RLOOTrainer._tag_names, "oblr_trl"], RLOOTrainer._paper),
    "length_weighted": _OPO,
}
_BASELINE_IN_WORDS = {
    "gradient_weighted": "mean of rewards weighted by squared score norms, OBLR-PO's",
    "group_mean": "mean of the group's rewards, GRPO's",
    "leave_one_out": "mean of the other completions' rewards, RLOO's",
    "length_weighted": "mean of rewards weighted by completion lengths, OPO's",
}


def method_in_use(args: OBLRPOConfig) -> Method:
    """OBLR-PO if its baseline or its learning rate is in use, else the method that the baseline comes from."""
    return OBLRPO if args.lr_adaptation == "snr" else _METHOD_OF_BASELINE[args.baseline]


def complete_model_card(args: OBLRPOConfig, optimizer: Any, prior_strength: float) -> None:
    """
    Add the section of [`training_details`] and this package's citation to the card that TRL has just written.

    Args:
        args ([`OBLRPOConfig`]): Configuration of the run; the card lies in its `output_dir`.
        optimizer (`torch.optim.Optimizer`, *optional*): The optimizer in use, or `None` before training.
        prior_strength (`float`): Prior strength of the baseline for the next batch, in completions.
    """
    assert args.output_dir is not None  # set by the parent
    path = os.path.join(args.output_dir, "README.md")
    with open(path, encoding="utf-8") as f:
        before, heading, after = f.read().partition(_NEXT_HEADING)
    with open(path, "w", encoding="utf-8") as f:
        f.write(f"{before}{training_details(args, optimizer, prior_strength)}\n{heading}{after}\n{_citation()}")


def training_details(args: OBLRPOConfig, optimizer: Any, prior_strength: float) -> str:
    """The section of a card on how the model was trained, in Markdown. Arguments as in [`complete_model_card`]."""
    method = method_in_use(args)
    lines = [
        "### Method settings",
        "",
        f"Trained with `oblr_trl` {__version__}.",
        "",
    ]
    if method is OBLRPO:
        lines[2] += f" It is not the authors' code. The paper was re-titled in 2026: *{PAPER_TITLE_2026}*."
        if args.baseline != "gradient_weighted":
            lines[2] += " Of OBLR-PO only the learning rate is in use, not the baseline."
        elif args.lr_adaptation != "snr":
            lines[2] += " Of OBLR-PO only the baseline is in use, not the learning rate."
    rows = {"Setting": "Value", "---": "---"} | _baseline_rows(args, prior_strength) | _score_rows(args)
    rows |= _optimization_rows(args, optimizer) | _rollout_rows(args)
    return "\n".join([*lines, *(f"| {name} | {value} |" for name, value in rows.items()), ""])


def _baseline_rows(args: OBLRPOConfig, prior_strength: float) -> dict[str, str]:
    leave_one_out = args.baseline_leave_one_out and args.baseline != "group_mean"
    rows = {
        "Baseline": f"`{args.baseline}`: {_BASELINE_IN_WORDS[args.baseline]}",
        "Leave-one-out": "yes" if leave_one_out else "no",
    }
    if args.baseline == "gradient_weighted":
        strength = "infinite" if math.isinf(prior_strength) else f"{prior_strength:g}"
        automatic = args.baseline_prior_strength is None
        rows["Prior strength"] = f"automatic, last chosen: {strength}" if automatic else strength
    return rows


def _score_rows(args: OBLRPOConfig) -> dict[str, str]:
    if not args.needs_scores:
        return {}
    sketches = f"sketches of length {args.score_sketch_dim}"
    if args.baseline != "gradient_weighted":
        use = f"{sketches}, for the learning rate alone"
    elif args.score_method == "sketch":
        use = f"`sketch`: norms of {sketches}"
    else:
        use = f"`exact`: exact norms; {sketches} for signal and noise"
    scope = f"`{args.score_scope}`" + (f", {args.score_last_k} blocks" if args.score_scope == "last_k" else "")
    return {"Score scope": scope, "Scores": use}


def _optimization_rows(args: OBLRPOConfig, optimizer: Any) -> dict[str, str]:
    rates = {args.learning_rate}
    name = OptimizerNames(args.optim).value
    if optimizer is not None:
        rates = {group.get("initial_lr", args.learning_rate) for group in optimizer.param_groups}
        while "optimizer" in vars(optimizer):  # accelerate's and DeepSpeed's wrappers keep what they wrap there
            optimizer = optimizer.optimizer
        name = type(optimizer).__name__
    adaptation = "none"
    if args.lr_adaptation == "snr":
        adaptation = (
            f"`snr`: schedule x rho, rho clamped to [{args.snr_min_multiplier:g}, {args.snr_max_multiplier:g}]; signal and noise "
            f"smoothed with EMA decay {args.snr_ema_decay:g}"
        )
    return {
        "Learning-rate adaptation": adaptation,
        "Initial learning rate": ", ".join(f"{rate:g}" for rate in sorted(rates)),
        "Optimizer": f"`{name}`",
        "Loss": f"`{args.loss_type}`, reward scaling `{args.scale_rewards}`, KL coefficient {args.beta:g}",
    }


def _rollout_rows(args: OBLRPOConfig) -> dict[str, str]:
    assert args.generation_batch_size is not None  # set by the parent
    assert args.num_generations is not None
    return {
        "Rollouts": f"N = {args.prompts_per_step:g} prompts x G = {args.num_generations} completions per optimizer step; "
        f"{args.generation_batch_size // args.num_generations} prompts per generated batch; `num_iterations` "
        f"{args.num_iterations}",
        "Generation": f"vLLM, mode `{args.vllm_mode}`" if args.use_vllm else "transformers, no vLLM",
    }


def _citation() -> str:
    # docstyle-ignore
    return textwrap.dedent(f"""
        Cite oblr_trl as:

        ```bibtex
        @software{{oblr_trl,
            title   = {{{{oblr_trl: OBLR-PO for TRL}}}},
            author  = {{{{The oblr_trl authors}}}},
            version = {{{__version__}}},
            license = {{Apache-2.0}},
        }}
        ```
        """)
