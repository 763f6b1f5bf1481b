"""From measurements of single pools to the figures of `benchmarks.variance`: by policy, over policies, against the targets.

Ratios are formed within a seed, from one pool, and then averaged over seeds.
"""

import math
from collections.abc import Callable, Sequence
from statistics import mean, median, stdev
from typing import Any

from benchmarks.gradient_variance import RLOO, Method, equivalent_group_size

# What the default and the cheapest scope are held to.
TARGET_MEDIAN = 0.6
TARGET_WORST = 1.02
TARGET_SCOPE = 0.1
_ALL, _LM_HEAD = "gradient-weighted, all, prior automatic", "gradient-weighted, lm_head, prior automatic"


def spread(values: Sequence[float]) -> dict[str, float]:
    """Mean, standard deviation (`nan` for one value), least and greatest."""
    return {
        "mean": mean(values),
        "std": stdev(values) if len(values) > 1 else math.nan,
        "min": min(values),
        "max": max(values),
    }


def summarise(results: Sequence[dict[str, Any]], methods: Sequence[Method], *, default: str) -> dict[str, Any]:
    """
    Everything that `benchmarks.variance` writes beside its settings.

    Args:
        results (`Sequence[dict]`): One entry per policy and seed, as `measure_policy` returns it.
        methods (`Sequence[Method]`): What was measured, RLOO among them.
        default (`str`): Label of the trainer's default.
    """
    names = list(dict.fromkeys(result["policy"] for result in results))
    policies = {
        name: summarise_policy([result for result in results if result["policy"] == name], methods) for name in names
    }
    over_policies = {
        method.label: {
            size: _over_policies(
                {name: policies[name]["methods"][method.label][size]["relative_variance"]["mean"] for name in names}
            )
            for size in results[0]["measured"]
        }
        for method in methods
    }
    return {
        "default": default,
        "reference": RLOO.label,
        "biased": [method.label for method in methods if not method.unbiased],
        "targets": targets(policies, default),
        "over_policies": over_policies,
        "policies": policies,
    }


def summarise_policy(results: Sequence[dict[str, Any]], methods: Sequence[Method]) -> dict[str, Any]:
    """Figures of one policy over its seeds: what it is, and every method by group size."""
    first = results[0]
    described = {key: first[key] for key in ("task", "reward", "num_parameters", "num_prompts")}
    for key in ("mean_reward", "accuracy", "fraction_of_prompts_with_equal_rewards", "mean_length"):
        described[key] = mean(result[key] for result in results)
    described["difference_from_oracle"] = max(result["difference_from_oracle"] for result in results)
    described["weights"] = {
        source: {figure: mean(result["weights"][source][figure] for result in results) for figure in figures}
        for source, figures in first["weights"].items()
    }
    described["variance_of_reference"] = {
        size: [measured[RLOO.label]["variance"] for measured in by_seed] for size, by_seed in _by_size(results).items()
    }
    return described | {
        "methods": {
            method.label: {size: _summarise_method(results, method.label, size) for size in first["measured"]}
            for method in methods
        }
    }


def _by_size(results: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    return {size: [result["measured"][size] for result in results] for size in results[0]["measured"]}


def _summarise_method(results: Sequence[dict[str, Any]], label: str, size: str) -> dict[str, Any]:
    by_seed = [result["measured"][size] for result in results]
    sizes = list(results[0]["measured"])
    equivalents = [
        equivalent_group_size(
            result["measured"][size][label]["variance"],
            [int(other) for other in sizes],
            [result["measured"][other][RLOO.label]["variance"] for other in sizes],
        )
        for result in results
    ]
    figures = {
        "relative_variance": spread([m[label]["variance"] / m[RLOO.label]["variance"] for m in by_seed]),
        "relative_objective": mean(m[label]["objective"] / m[RLOO.label]["objective"] for m in by_seed),
        "equivalent_group_size": spread(equivalents),
        "squared_bias": _squared_bias(by_seed, label),
    }
    doubled = str(2 * int(size))
    if doubled in sizes:
        figures["relative_to_reference_at_twice_the_group"] = spread(
            [
                result["measured"][size][label]["variance"] / result["measured"][doubled][RLOO.label]["variance"]
                for result in results
            ]
        )
    return figures


def _squared_bias(by_seed: Sequence[dict[str, Any]], label: str) -> dict[str, float]:
    """Squared norm of the difference from RLOO's mean gradient, mean over prompts and seeds with its standard error: unbiased
    methods are zero within it, on either side. `relative` is over the squared norm of RLOO's mean gradient."""
    biases = [bias for measured in by_seed for bias in measured[label]["squared_bias"]]
    signal = mean(measured[RLOO.label]["squared_signal"] for measured in by_seed)
    return {
        "mean": mean(biases),
        "standard_error": stdev(biases) / math.sqrt(len(biases)),
        "relative": mean(biases) / signal if signal > 0 else math.nan,
    }


def _over_policies(ratios: dict[str, float]) -> dict[str, Any]:
    worst = max(ratios, key=ratios.__getitem__)
    return {"median": median(ratios.values()), "worst": ratios[worst], "worst_policy": worst}


def targets(policies: dict[str, Any], default: str) -> dict[str, Any]:
    """Each target with its figure on the median and on the worst policy, and whether it holds; only for measured sizes."""

    def over(figure: Callable[[dict[str, Any]], float]) -> dict[str, Any]:
        return _over_policies({name: figure(policy["methods"]) for name, policy in policies.items()})

    sizes = next(iter(policies.values()))["methods"][default]
    found: dict[str, Any] = {}
    for size in ("4", "8"):
        if size in sizes:
            figures = over(lambda methods, size=size: methods[default][size]["relative_variance"]["mean"])
            held = figures["median"] <= TARGET_MEDIAN and figures["worst"] <= TARGET_WORST
            found[f"default_at_{size}"] = figures | {"held": held}
            figures = over(
                lambda methods, size=size: (
                    methods[_LM_HEAD][size]["relative_variance"]["mean"]
                    / methods[_ALL][size]["relative_variance"]["mean"]
                    - 1
                )
            )
            found[f"lm_head_beyond_all_at_{size}"] = figures | {"held": figures["worst"] <= TARGET_SCOPE}
    if "4" in sizes and "8" in sizes:
        figures = over(lambda methods: methods[default]["4"]["relative_to_reference_at_twice_the_group"]["mean"])
        found["default_at_4_over_reference_at_8"] = figures | {"held": figures["median"] <= 1}
    return found


def table(summary: dict[str, Any]) -> str:
    """Relative variance on the median and the worst policy, and the targets, as plain text."""
    sizes = list(next(iter(summary["over_policies"].values())))
    lines = [
        f"Variance relative to RLOO's: median / worst of {len(summary['policies'])} policies",
        f"{'baseline':<44}" + "".join(f"{f'G = {size}':>16}" for size in sizes),
    ]
    for label, by_size in summary["over_policies"].items():
        marks = " *" * (label == summary["default"]) + " (biased)" * (label in summary["biased"])
        cells = [f"{by_size[size]['median']:.2f} / {by_size[size]['worst']:.2f}" for size in sizes]
        lines.append(f"{label + marks:<44}" + "".join(f"{cell:>16}" for cell in cells))
    lines.append("* the trainer's default\n")
    for name, figures in summary["targets"].items():
        verdict = "met" if figures["held"] else "MISSED"
        worst = f"{figures['worst']:.3f} ({figures['worst_policy']})"
        lines.append(f"target {name}: median {figures['median']:.3f}, worst {worst}: {verdict}")
    return "\n".join(lines)
