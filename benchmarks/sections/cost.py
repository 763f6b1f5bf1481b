"""What `make bench` measured: whole training steps of OBLR-PO against TRL's GRPO, and how both grow."""

from statistics import median
from typing import Any

from matplotlib.figure import Figure

RESULT = "cost.json"
TITLE = "Cost of whole training steps"

_COSTS = {
    "control_step": "GRPO step, s",
    "pass": "scoring pass, s",
    "ratio": "OBLR-PO / GRPO",
    "pass_over_control": "pass / GRPO step",
}
_COLUMNS = {"transformers": "random policy", "demo": "the demo's model"}


def ratio_cell(ratio: dict[str, float]) -> str:
    """Median and quartiles."""
    return f"{ratio['median']:.2f} [{ratio['lower']:.2f}, {ratio['upper']:.2f}]"


def shape_sentence(case: dict[str, int]) -> str:
    """The policy and the batch in words."""
    return (
        f"a random Qwen3 (hidden {case['hidden_size']}, {case['num_layers']} layers, vocabulary {case['vocab_size']}, float32), "
        f"{case['num_prompts']} prompts x {case['num_generations']} completions of {case['prompt_length']} + "
        f"{case['completion_length']} tokens per step"
    )


def markdown(record: dict[str, Any]) -> str:
    """The ratios of whole steps, then the slopes."""
    comparisons, settings = record["comparisons"], record["settings"]
    columns = [name for name in _COLUMNS if name in comparisons]
    heads = "".join(f" {_COLUMNS[name]}: step / GRPO's | pass / GRPO's step |" for name in columns)
    table = [f"| |{heads}", "|---|" + "---|---|" * len(columns)]
    for method, description in record["methods"].items():
        if method not in comparisons[columns[0]]["ratios"]:
            continue
        cells = [
            f" {ratio_cell(comparisons[name][kind][method])} |"
            for name in columns
            for kind in ("ratios", "pass_over_control")
        ]
        table.append(f"| {description} |" + "".join(cells))
    times = ", ".join(f"{median(comparisons[name]['seconds']['grpo']):.2f} s ({_COLUMNS[name]})" for name in columns)
    return "\n".join(
        [
            "`make bench`: real training steps (generation by transformers, rewards, scoring, backward, optimizer) of all trainers "
            f"in turn in one process with {record['machine']['num_threads']} thread; median [quartiles] over "
            f"{settings['rounds']} rounds, seed {settings['seed']}. The random policy is "
            f"{shape_sentence(comparisons['transformers']['case'])}. A GRPO step takes {times}.",
            "",
            *table,
            "",
            *_growth(record),
        ]
    )


def _growth(record: dict[str, Any]) -> list[str]:
    fitted = {axis: values for axis, values in record["scaling"].items() if values["slopes"]}
    if not fitted:
        return []
    lines = [
        "Growth: log-log slope ± standard error of the fit (1: the cost doubles with the size) through medians over "
        f"{record['settings']['scaling_rounds']} rounds, scope `all`. With processes (DDP, one thread each) the batch grows too, so 0 "
        "is ideal.",
        "",
        "| axis, sizes | " + " | ".join(_COSTS.values()) + " |",
        "|---|" + "---|" * len(_COSTS),
    ]
    for axis, values in fitted.items():
        sizes = ", ".join(str(value) for value in values["values"])
        cells = " | ".join(_slope(values["slopes"][cost]) for cost in _COSTS)
        lines.append(f"| {axis}: {sizes} | {cells} |")
    ends = []
    for axis, values in fitted.items():
        first, last = (values["cases"][i]["ratios"]["all"]["median"] for i in (0, -1))
        ends.append(f"{first:.2f} to {last:.2f} ({axis})")
    return [
        *lines,
        "",
        "From the smallest to the largest size the ratio of whole steps goes from " + ", ".join(ends) + ".",
    ]


def _slope(fit: dict[str, float | None]) -> str:
    error = fit["standard_error"]
    return f"{fit['slope']:+.2f}" + (" (two sizes)" if error is None else f" ± {error:.2f}")


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
