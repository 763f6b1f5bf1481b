"""What `python -m benchmarks.snr` measured: the estimated rho against the true one."""

from collections.abc import Callable
from statistics import mean
from typing import Any

from matplotlib.figure import Figure

from benchmarks.snr_summary import verdict

RESULT = "snr.json"
TITLE = "Is rho right?"
_DECAY = "0.9"
_UNKNOWN = "n/a"


def markdown(record: dict[str, Any]) -> str:
    """A table by batch size, averaged over the policies, and what it comes to."""
    policies = record["policies"]
    sizes = [entry["num_prompts"] for entry in policies[0]["batches"]]
    header = (
        "prompts",
        "true rho",
        "rho of mean signal and noise: error",
        "one batch: bias",
        "one batch: typical error",
        "signal below 0",
        f"EMA {_DECAY}: bias",
        f"EMA {_DECAY}: typical error",
        "95 % interval holds",
    )
    rows = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    rows += [_row([policy["batches"][index] for policy in policies]) for index in range(len(sizes))]
    settings = record["settings"]
    return "\n".join(
        [
            f"`python -m benchmarks.snr`: the start model and the policies after {_steps(policies)} steps of the demo's run, "
            f"{settings['num_seeds']} draws of {settings['num_prompts']} prompts x {settings['num_generations']} completions "
            "from each. True signal: summed over all problems; true noise: exact gradients of these rollouts. Errors are relative "
            "to the true rho, means over the policies; *bias* is that of the mean, *typical* the median absolute error.",
            "",
            *rows,
            "",
            _conclusion(record),
        ]
    )


def _steps(policies: list[dict[str, Any]]) -> str:
    steps = [str(policy["step"]) for policy in policies if policy["step"] > 0]
    return steps[0] if len(steps) == 1 else ", ".join(steps[:-1]) + " and " + steps[-1]


def _row(entries: list[dict[str, Any]]) -> str:
    rhos = [entry["true_rho"]["value"] for entry in entries]
    single = [entry["single_batch"] for entry in entries]
    smoothed = [entry["smoothed"]["separate"].get(_DECAY) for entry in entries]
    cells = (
        str(entries[0]["num_prompts"]),
        f"{min(rhos):.2f} to {max(rhos):.2f}",
        f"{mean(entry['ratio_of_means']['relative_error'] for entry in entries):+.1%}",
        _mean_of(single, "bias", "+.0%"),
        _mean_of(single, "typical_error", ".0%"),
        f"{mean(entry['negative_signal'] for entry in entries):.0%}",
        _mean_of(smoothed, "bias", "+.0%"),
        _mean_of(smoothed, "typical_error", ".0%"),
        f"{mean(entry['coverage']['log']['coverage'] for entry in entries):.0%}",
    )
    return "| " + " | ".join(cells) + " |"


def _mean_of(summaries: list[dict[str, float] | None], key: str, form: str) -> str:
    known = [summary[key] for summary in summaries if summary is not None]
    return format(mean(known), form) if known else _UNKNOWN


def _conclusion(record: dict[str, Any]) -> str:
    found = verdict(record["policies"])
    sketch = [abs(error) for policy in record["policies"] for error in policy["sketch_error_of_signal"]]

    def said(key: str, form: Callable[[dict[str, float]], str]) -> str:
        return _UNKNOWN if found[key] is None else form(found[key])

    at_least = f"At {found['least_prompts']} prompts or more"
    single = said(
        "single_batch",
        lambda s: (
            f"one batch is biased by {s['worst_bias']:+.1%} at worst but lies within {found['tolerance']:.0%} of the true rho "
            f"only {s['mean_within_tolerance']:.0%} of the time (typical error up to {s['worst_typical_error']:.0%})"
        ),
    )
    smoothed = said(
        "separate",
        lambda s: (
            f"the default moving average is within {found['tolerance']:.0%} {s['mean_within_tolerance']:.0%} of the time "
            f"(typical error up to {s['worst_typical_error']:.0%}) on a policy that stands still"
        ),
    )
    worst = found["ratio_of_means_worst"]
    off = _UNKNOWN if worst is None else f"{worst:+.1%}"
    text = f"{at_least}, rho from the mean signal and noise is off by {off} at worst; {single}; {smoothed}. "
    text += f"The sketch alone changes the true signal by {mean(sketch):.1%} on average. "
    return text + _drift(record["drift"])


def _drift(drift: dict[str, Any]) -> str:
    if drift["run"] is None:
        return ""
    errors = drift["run"]["errors"]["separate"]
    best = min(errors, key=lambda decay: errors[decay]["rms"])
    cosines = zip(drift["path"][:-1], drift["path"][1:], drift["cosine_to_next"], strict=True)
    first, second, cosine = next(cosines)
    text = f"Along the run, lag and sampling error together are {errors[best]['rms']:.2f} at the best decay, {best}"
    if _DECAY in errors and best != _DECAY:
        text += f" ({errors[_DECAY]['rms']:.2f} at {_DECAY})"
    run = drift["run"]
    text += f", of a true rho of {run['mean_true_rho']:.2f} (a constant equal to that: {run['constant_rms']:.2f}). "
    text += f"The expected gradient turns quickly: its cosine between steps {first['step']} and {second['step']} is {cosine:.2f}. "
    pooled = run["errors"]["pooled"].get(_DECAY)
    if pooled is not None:
        text += (
            "A signal from the inner products of different batches, steadier on a policy that stands still, therefore fails on the "
            f"run: its rho is off by {pooled['mean']:+.2f} on average at decay {_DECAY}, the separate one's by "
            f"{errors[_DECAY]['mean']:+.2f}."
        )
    return text


def figure(record: dict[str, Any]) -> Figure:
    """True rho, and the mean and 5 % to 95 % range of single batches and of the default moving average, by policy."""
    policies = record["policies"]
    drawn = Figure(figsize=(3.0 * len(policies), 3.2), layout="constrained")
    axes = drawn.subplots(1, len(policies), sharey=True, squeeze=False)[0]
    for axis, policy in zip(axes, policies, strict=True):
        entries = policy["batches"]
        axis.plot(
            [entry["num_prompts"] for entry in entries],
            [entry["true_rho"]["value"] for entry in entries],
            color="black",
            label="true",
        )
        _bars(axis, entries, lambda entry: entry["single_batch"], 0.93, "tab:blue", "one batch, mean and 5 to 95 %")
        _bars(
            axis,
            entries,
            lambda entry: entry["smoothed"]["separate"].get(_DECAY),
            1.07,
            "tab:orange",
            f"moving average, decay {_DECAY}",
        )
        axis.set_xscale("log", base=2)
        axis.set_xticks([entry["num_prompts"] for entry in entries])
        axis.set_xticklabels([str(entry["num_prompts"]) for entry in entries])
        axis.set_title("start model" if policy["step"] == 0 else f"after {policy['step']} steps")
        axis.set_xlabel("prompts per step")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("rho")
    axes[0].set_ylim(0, 1)
    axes[0].legend(fontsize=8, loc="upper left")
    return drawn


def _bars(
    axis: Any,
    entries: list[dict[str, Any]],
    summary_of: Callable[[dict[str, Any]], dict[str, float] | None],
    shift: float,
    colour: str,
    label: str,
) -> None:
    known = [
        (entry["num_prompts"] * shift, summary) for entry in entries if (summary := summary_of(entry)) is not None
    ]
    if not known:
        return
    means = [summary["mean"] for _, summary in known]
    # A mean may lie outside of the range where nearly all estimates are 0.
    below = [max(summary["mean"] - summary["quantile_05"], 0) for _, summary in known]
    above = [max(summary["quantile_95"] - summary["mean"], 0) for _, summary in known]
    axis.errorbar([x for x, _ in known], means, yerr=[below, above], fmt="o", ms=4, color=colour, label=label)
