"""What `python -m benchmarks.variance` measured: the gradient's variance under every baseline, relative to RLOO's."""

import math
from collections.abc import Collection
from typing import Any

from matplotlib.figure import Figure

RESULT = "variance.json"
TITLE = "Variance of the gradient"
# Above two standard errors one estimate in twenty lies by chance.
_NUM_ERRORS = 2.0
_ROUNDING = 1e-12
# What the README shows of the baselines.
_SHOWN = (
    "RLOO (mean of the others)",
    "none",
    "length-weighted (OPO)",
    "logit-energy-weighted, prior automatic",
    "mean, prior automatic",
    "gradient-weighted, all, prior 0",
    "gradient-weighted, all, prior automatic",
    "gradient-weighted, last_k, prior automatic",
    "gradient-weighted, lm_head, prior automatic",
    "oracle b* (whole pool)",
)


def markdown(record: dict[str, Any]) -> str:
    """Every baseline over the policies, the default by policy, and the targets."""
    settings, policies = record["settings"], record["policies"]
    smallest, largest = (
        choose(policy["num_parameters"] / 1e6 for policy in policies.values()) for choose in (min, max)
    )
    return "\n".join(
        [
            f"`python -m benchmarks.variance`: within-prompt variance of the full gradient, relative to RLOO's on the same "
            f"completions. {len(policies)} policies of {smallest:.1f} to {largest:.1f} million parameters, "
            f"{settings['num_seeds']} seeds of {settings['num_prompts']} prompts x {settings['num_completions']} completions "
            f"({settings['num_prompts_large']} prompts where the policy is large), batches of {settings['prompts_per_batch']} "
            "prompts. Median / worst over policies of the mean over seeds; below 1 is a gain.",
            "",
            *_methods_table(record),
            "",
            "The default (bold) by policy; ± is the standard deviation over seeds. The last columns read: with G = 4 its gradient "
            "is as good as RLOO's with that many completions, and its variance over that of RLOO at G = 8.",
            "",
            *_policies_table(record),
            "",
            _targets(record),
            "",
            _reason(record),
            "",
            _bias(record),
        ]
    )


def summary(record: dict[str, Any]) -> str:
    """The baselines that a user chooses among, and the targets."""
    settings = record["settings"]
    shown = [label for label in _SHOWN if label in record["over_policies"]]
    return "\n".join(
        [
            f"`make bench-variance`: within-prompt variance of the full gradient relative to RLOO's, median / worst of "
            f"{len(record['policies'])} policies, {settings['num_seeds']} seeds each; below 1 is a gain. Every baseline, every policy, "
            "spread and bias: [docs/results.md](docs/results.md).",
            "",
            *_methods_table(record, shown),
            "",
            _targets(record),
            "",
            _reason(record),
        ]
    )


def _sizes(record: dict[str, Any]) -> list[str]:
    return [str(size) for size in record["settings"]["num_generations"]]


def _methods_table(record: dict[str, Any], shown: Collection[str] | None = None) -> list[str]:
    sizes = _sizes(record)
    rows = [
        "| baseline | " + " | ".join(f"G = {size}" for size in sizes) + " |",
        "|---|" + "---|" * len(sizes),
    ]
    for label, by_size in record["over_policies"].items():
        if shown is not None and label not in shown:
            continue
        name = f"{label} (biased)" if label in record["biased"] else label
        cells = [f"{by_size[size]['median']:.2f} / {by_size[size]['worst']:.2f}" for size in sizes]
        if label == record["default"]:
            name, cells = f"**{name}**", [f"**{cell}**" for cell in cells]
        rows.append(f"| {name} | " + " | ".join(cells) + " |")
    return rows


def _policies_table(record: dict[str, Any]) -> list[str]:
    rows = [
        "| policy | parameters | reward | mean | tokens | G = 4 | G = 8 | G = 4 equals RLOO's G = | over RLOO's G = 8 |",
        "|" + "---|" * 9,
    ]
    for name, policy in record["policies"].items():
        at_four, at_eight = (policy["methods"][record["default"]][size] for size in ("4", "8"))
        cells = (
            name,
            f"{policy['num_parameters'] / 1e6:.1f} M",
            policy["reward"],
            f"{policy['mean_reward']:.2f}",
            f"{policy['mean_length']:.1f}",
            _spread(at_four["relative_variance"]),
            _spread(at_eight["relative_variance"]),
            f"{at_four['equivalent_group_size']['mean']:.1f}",
            f"{at_four['relative_to_reference_at_twice_the_group']['mean']:.2f}",
        )
        rows.append("| " + " | ".join(cells) + " |")
    return rows


def _spread(value: dict[str, float]) -> str:
    return f"{value['mean']:.2f} ± {value['std']:.2f}"


def _targets(record: dict[str, Any]) -> str:
    described = {
        "default_at_4": "the default at G = 4",
        "default_at_8": "the default at G = 8",
        "lm_head_beyond_all_at_4": "what `lm_head` adds to the variance of `all` at G = 4",
        "lm_head_beyond_all_at_8": "the same at G = 8",
        "default_at_4_over_reference_at_8": "the default at G = 4 over RLOO at G = 8",
    }
    parts = []
    for name, figures in record["targets"].items():
        form = "+.1%" if name.startswith("lm_head") else ".2f"
        verdict = "held" if figures["held"] else "not held"
        parts.append(
            f"{described[name]}: median {figures['median']:{form}}, worst {figures['worst']:{form}} "
            f"({figures['worst_policy']}), {verdict}"
        )
    return (
        "Against the targets (median at most 0.6 and worst at most 1.02; at most 10 %; median at most 1): "
        + "; ".join(parts)
        + "."
    )


def _reason(record: dict[str, Any]) -> str:
    """Why RLOO's baseline is too high, and where the output projection cannot tell completions apart."""
    policies = record["policies"]
    ratios = [policy["weights"]["exact"]["right_over_wrong"] for policy in policies.values()]
    slopes = {name: policy["weights"]["lm_head"]["log_slope"] for name, policy in policies.items()}
    least = min(slopes, key=slopes.__getitem__)
    beyond = {
        source: policies[least]["methods"][f"gradient-weighted, {source}, prior automatic"]["8"]["relative_variance"][
            "mean"
        ]
        for source in ("all", "last_k", "lm_head")
    }
    without = [policy["methods"]["none"]["8"]["relative_variance"]["mean"] for policy in policies.values()]
    return (
        f"Why: the mean squared score of a right completion is {min(ratios):.2f} to {max(ratios):.2f} of a wrong one's, so the best "
        f"baseline lies far below the mean reward, and using none at all has less variance than RLOO's at G = 8 on {sum(ratio < 1 for ratio in without)} of {len(policies)} policies. The "
        "gradient of the output projection is bounded by the error of the probabilities, which is large for every completion of a "
        f"policy that is unsure: on {least} the logarithm of its weight grows by {slopes[least]:.2f} of that of the exact weight "
        f"within prompts, and `lm_head` gives {beyond['lm_head']:.2f} of RLOO's variance at G = 8 where `last_k=1` gives "
        f"{beyond['last_k']:.2f} and `all` {beyond['all']:.2f}."
    )


def _bias(record: dict[str, Any]) -> str:
    """How many of the unbiased baselines' bias estimates lie beyond two standard errors, and what a biased one shows."""
    beyond = total = 0
    for policy in record["policies"].values():
        for label, by_size in policy["methods"].items():
            if label in record["biased"] or label == record["reference"]:
                continue
            for figures in by_size.values():
                bias = figures["squared_bias"]
                if (
                    bias["standard_error"] > _ROUNDING
                ):  # else it is RLOO itself, as any baseline without prior at G = 2
                    total += 1
                    beyond += abs(bias["mean"]) > _NUM_ERRORS * bias["standard_error"]
    shown = [
        math.sqrt(policy["methods"]["group mean (GRPO)"]["4"]["squared_bias"]["relative"])
        for policy in record["policies"].values()
    ]
    return (
        f"Bias, the distance of the mean gradient from RLOO's: of {total} estimates (unbiased baselines x G x policies) "
        f"{beyond / total:.1%} lie more than {_NUM_ERRORS:.0f} standard errors from zero. The group mean's, which is 1/G of the "
        f"gradient, shows as {min(shown):.3f} to {max(shown):.3f} at G = 4."
    )


_FIGURE_METHODS = {
    "mean, prior automatic": "mean + prior",
    "logit-energy-weighted, prior automatic": "logit energy + prior",
    "gradient-weighted, all, prior 0": "gradient-weighted, no prior (the paper)",
    "gradient-weighted, lm_head, prior automatic": "gradient-weighted + prior, lm_head",
    "gradient-weighted, all, prior automatic": "gradient-weighted + prior (default)",
    "oracle b* (whole pool)": "oracle b* (biased)",
}


def figure(record: dict[str, Any]) -> Figure:
    """Left: relative variance by group size, median and range over policies. Right: every policy's default at G = 4 and 8."""
    drawn = Figure(figsize=(10, 4), layout="constrained")
    left, right = drawn.subplots(1, 2)
    sizes = _sizes(record)
    places = range(len(sizes))
    for label, name in _FIGURE_METHODS.items():
        ratios = [
            sorted(
                policy["methods"][label][size]["relative_variance"]["mean"] for policy in record["policies"].values()
            )
            for size in sizes
        ]
        (line,) = left.plot(
            places, [record["over_policies"][label][size]["median"] for size in sizes], marker="o", label=name
        )
        if label == record["default"]:
            left.fill_between(
                places, [r[0] for r in ratios], [r[-1] for r in ratios], color=line.get_color(), alpha=0.15
            )
    left.axhline(1, color="black", linewidth=0.8)
    left.set_xticks(places, sizes)
    left.set(xlabel="completions per prompt G", ylabel="variance relative to RLOO's", ylim=(0, 1.5))
    left.set_title("Median over policies (band: all policies)", fontsize=10)
    left.legend(fontsize=7, ncol=2, loc="upper center")
    rows = range(len(record["policies"]))
    for offset, size in ((-0.15, "4"), (0.15, "8")):
        figures = [
            policy["methods"][record["default"]][size]["relative_variance"] for policy in record["policies"].values()
        ]
        right.errorbar(
            [figure["mean"] for figure in figures],
            [row + offset for row in rows],
            xerr=[figure["std"] for figure in figures],
            fmt="o",
            capsize=2,
            label=f"G = {size}",
        )
    right.axvline(1, color="black", linewidth=0.8)
    right.set_yticks(rows, list(record["policies"]))
    right.invert_yaxis()
    right.set(xlabel="variance of the default relative to RLOO's", xlim=(0, 1.1))
    right.set_title("By policy (standard deviation over seeds)", fontsize=10)
    right.legend(fontsize=8)
    return drawn
