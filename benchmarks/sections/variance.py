"""Tables and figure of `benchmarks.variance`: the gradient's variance under every baseline, relative to RLOO's."""

from statistics import median
from typing import Any

from matplotlib.figure import Figure

from benchmarks.sections.tables import markdown_table, plus_minus

_LM_HEAD = "gradient-weighted, lm_head, prior automatic"
_FIGURE_METHODS = {
    "mean, prior automatic": "mean + prior",
    "gradient-weighted, all, prior 0": "gradient-weighted, no prior (the paper)",
    _LM_HEAD: "gradient-weighted + prior, lm_head",
    "gradient-weighted, all, prior automatic": "gradient-weighted + prior (default)",
    "oracle b* (whole pool)": "oracle b* (biased)",
}


def markdown(record: dict[str, Any]) -> str:
    """Every baseline over the policies, and the default by policy."""
    settings = record["settings"]
    sizes = _sizes(record)
    by_method = markdown_table(
        ["baseline", *(f"G = {size}" for size in sizes)],
        [_method_row(record, label) for label in next(iter(record["policies"].values()))["methods"]],
    )
    return "\n\n".join(
        [
            f"Median / worst over {len(record['policies'])} policies of the mean over {settings['num_seeds']} seeds "
            f"of {settings['num_prompts']} prompts ({settings['num_prompts_large']} for the largest policy) x "
            f"{settings['num_completions']} completions; batches of {settings['prompts_per_batch']} prompts.",
            by_method,
            "The default by policy; ± is the standard deviation over seeds.",
            _policies_table(record),
        ]
    )


def _sizes(record: dict[str, Any]) -> list[str]:
    return [str(size) for size in record["settings"]["num_generations"]]


def _ratios(record: dict[str, Any], label: str, size: str) -> list[float]:
    """Relative variance of a baseline on every policy."""
    return [policy["methods"][label][size]["mean"] for policy in record["policies"].values()]


def _method_row(record: dict[str, Any], label: str) -> list[str]:
    ratios = [_ratios(record, label, size) for size in _sizes(record)]
    cells = [f"{label} (biased)" if label in record["biased"] else label]
    cells += [f"{median(values):.2f} / {max(values):.2f}" for values in ratios]
    return [f"**{cell}**" for cell in cells] if label == record["default"] else cells


def _policies_table(record: dict[str, Any]) -> str:
    sizes = [size for size in ("4", "8") if size in _sizes(record)]
    header = ["policy", "parameters", "reward", "mean", "tokens", *(f"G = {size}" for size in sizes)]
    header += ["G = 4 over RLOO's G = 8", "`lm_head` over `all`, G = 8", "w right / wrong"]
    rows = []
    for name, policy in record["policies"].items():
        default, lm_head = policy["methods"][record["default"]], policy["methods"][_LM_HEAD]
        description = [f"{policy['num_parameters'] / 1e6:.1f} M", policy["reward"], f"{policy['mean_reward']:.2f}"]
        rows.append(
            [
                name,
                *description,
                f"{policy['mean_length']:.1f}",
                *(plus_minus(default[size], ".2f") for size in sizes),
                f"{policy['default_at_4_over_rloo_at_8']:.2f}",
                f"{lm_head['8']['mean'] / default['8']['mean']:.2f}",
                f"{policy['right_over_wrong']:.2f}",
            ]
        )
    return markdown_table(header, rows)


def figure(record: dict[str, Any]) -> Figure:
    """Relative variance by group size: median over policies, for the default their range."""
    drawn = Figure(figsize=(6, 4), layout="constrained")
    axis = drawn.subplots()
    sizes = _sizes(record)
    places = range(len(sizes))
    for label, name in _FIGURE_METHODS.items():
        ratios = [_ratios(record, label, size) for size in sizes]
        (line,) = axis.plot(places, [median(values) for values in ratios], marker="o", label=name)
        if label == record["default"]:
            ends = [min(values) for values in ratios], [max(values) for values in ratios]
            axis.fill_between(places, *ends, color=line.get_color(), alpha=0.15)
    axis.axhline(1, color="black", linewidth=0.8)
    axis.set_xticks(places, sizes)
    axis.set(xlabel="completions per prompt G", ylabel="variance relative to RLOO's", ylim=(0, 1.5))
    axis.set_title("Median over policies (band: all policies)", fontsize=10)
    axis.legend(fontsize=7, ncol=2, loc="upper center")
    return drawn
