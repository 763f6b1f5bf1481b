"""Whole training steps of OBLR-PO against TRL's GRPO, and how both grow, as `make bench` measured them."""

from statistics import median
from typing import Any

from matplotlib.figure import Figure

RESULT = "cost.json"
TITLE = "Cost of whole training steps"

_COLUMNS = {"transformers": "random policy", "demo": "the demo's model", "vllm": "vLLM"}
_COSTS = {
    "control_step": "GRPO step, s",
    "pass": "scoring pass, s",
    "ratio": "OBLR-PO / GRPO",
    "pass_over_control": "pass / GRPO step",
}


def table(record: dict[str, Any]) -> str:
    """Ratios of whole steps and of the pass alone, median [quartiles]; then the slopes, where costs were scaled."""
    comparisons = {name: record["comparisons"][name] for name in _COLUMNS if name in record["comparisons"]}
    heads = "".join(f" {_COLUMNS[name]}: step / GRPO's | pass / GRPO's step |" for name in comparisons)
    lines = [f"| |{heads}", "|---|" + "---|---|" * len(comparisons)]
    for method, description in record["methods"].items():
        measured = [comparison for comparison in comparisons.values() if method in comparison["ratios"]]
        ratios = [comparison[kind][method] for comparison in measured for kind in ("ratios", "pass_over_control")]
        if ratios:
            cells = " | ".join(
                f"{ratio['median']:.2f} [{ratio['lower']:.2f}, {ratio['upper']:.2f}]" for ratio in ratios
            )
            lines.append(f"| {description} | {cells} |")
    return "\n".join(lines + _growth(record))


def _growth(record: dict[str, Any]) -> list[str]:
    fitted = {axis: values for axis, values in record.get("scaling", {}).items() if values["slopes"]}
    if not fitted:
        return []
    lines = ["", "| axis, sizes | " + " | ".join(_COSTS.values()) + " | OBLR-PO / GRPO, smallest to largest |"]
    lines.append("|---|" + "---|" * (len(_COSTS) + 1))
    for axis, values in fitted.items():
        sizes = ", ".join(str(value) for value in values["values"])
        slopes = " | ".join(_slope(values["slopes"][cost]) for cost in _COSTS)
        first, last = (values["cases"][i]["ratios"]["all"]["median"] for i in (0, -1))
        lines.append(f"| {axis}: {sizes} | {slopes} | {first:.2f} to {last:.2f} |")
    return lines


def _slope(fit: dict[str, float | None]) -> str:
    error = fit["standard_error"]
    return f"{fit['slope']:+.2f}" + (" (two sizes)" if error is None else f" ± {error:.2f}")


def conditions(record: dict[str, Any], name: str) -> str:
    """The random policy, its batch, rounds, seed, and the seconds of the control's step."""
    case, settings = record["comparisons"][name]["case"], record["settings"]
    times = ", ".join(
        f"{median(comparison['seconds']['grpo']):.2f} s ({_COLUMNS[name]})"
        for name, comparison in record["comparisons"].items()
    )
    return (
        f"The random policy is a Qwen3 (hidden {case['hidden_size']}, {case['num_layers']} layers, vocabulary "
        f"{case['vocab_size']}, float32), {case['num_prompts']} prompts x {case['num_generations']} completions of "
        f"{case['prompt_length']} + {case['completion_length']} tokens per step; median [quartiles] over {settings['rounds']} rounds, "
        f"seed {settings['seed']}. A GRPO step takes {times}."
    )


def markdown(record: dict[str, Any]) -> str:
    """The conditions, then the tables."""
    return (
        "`make bench`: real training steps (generation by transformers, rewards, scoring, backward, optimizer) of all trainers in "
        f"turn in one process with {record['machine']['num_threads']} thread. {conditions(record, 'transformers')} Growth: log-log "
        "slope ± standard error of the fit (1: the cost doubles with the size) through medians over "
        f"{record['settings']['scaling_rounds']} rounds, scope `all`. With processes (DDP, one thread each) the batch grows too, so "
        f"0 is ideal.\n\n{table(record)}"
    )


def figure(record: dict[str, Any]) -> Figure:
    """One log-log panel per axis: the control's step, OBLR-PO's, and the pass alone."""
    axes = record["scaling"]
    drawn = Figure(figsize=(3.0 * len(axes), 3.2), layout="constrained")
    panels = drawn.subplots(1, len(axes), squeeze=False)[0]
    for panel, (axis, values) in zip(panels, axes.items(), strict=True):
        for label, kind, method, marker in (
            ("GRPO step", "seconds", "grpo", "o"),
            ("OBLR-PO step", "seconds", "all", "s"),
            ("scoring pass", "pass_seconds", "all", "^"),
        ):
            costs = [median(case[kind][method]) for case in values["cases"]]
            panel.loglog(values["values"], costs, marker=marker, label=label)
        panel.set_xticks(values["values"], [str(value) for value in values["values"]])
        panel.minorticks_off()
        panel.set_xlabel(axis)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("seconds (median)")
    panels[0].legend(fontsize="small")
    return drawn
