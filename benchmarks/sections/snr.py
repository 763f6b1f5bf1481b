"""Tables of `benchmarks.snr`: estimated rho against the true one."""

from collections.abc import Sequence
from statistics import mean
from typing import Any

from benchmarks.sections.tables import markdown_table

RESULT = "snr.json"
TITLE = "Accuracy of rho"
_NOT_MEASURED = "n/a"


def markdown(record: dict[str, Any]) -> str:
    """Errors by batch size, the moving averages along the run, and its path."""
    settings, policies = record["settings"], record["policies"]
    steps = ", ".join(str(policy["step"]) for policy in policies)
    return "\n\n".join(
        [
            f"Policies after {steps} steps; {settings['num_seeds']} draws of {settings['num_prompts']} prompts x "
            f"{settings['num_generations']} completions from each. Means over the policies.",
            _sizes_table(policies),
            *_run_tables(record["drift"]),
        ]
    )


def _sizes_table(policies: Sequence[dict[str, Any]]) -> str:
    header = ["prompts", "true rho", "rho of mean signal and noise: error"]
    header += [f"{name}: {figure}" for name in ("one batch", "moving average") for figure in ("bias", "typical error")]
    header += ["signal below 0"]
    rows = []
    for index in range(len(policies[0]["batches"])):
        entries = [policy["batches"][index] for policy in policies]
        rhos = [entry["true_rho"] for entry in entries]
        errors = [
            _mean_of([entry[name] for entry in entries], figure, form)
            for name in ("single_batch", "moving_average")
            for figure, form in (("bias", "+.0%"), ("typical_error", ".0%"))
        ]
        rows.append(
            [
                str(entries[0]["num_prompts"]),
                f"{min(rhos):.2f} to {max(rhos):.2f}",
                f"{mean(entry['error_of_mean_moments'] for entry in entries):+.1%}",
                *errors,
                f"{mean(entry['negative_signal'] for entry in entries):.0%}",
            ]
        )
    return markdown_table(header, rows)


def _mean_of(summaries: Sequence[dict[str, float] | None], figure: str, form: str) -> str:
    """Mean over the summaries there are: a moving average may never fill up."""
    known = [summary[figure] for summary in summaries if summary is not None]
    return format(mean(known), form) if known else _NOT_MEASURED


def _run_tables(drift: dict[str, Any]) -> list[str]:
    run = drift["run"]
    by_decay = [[decay, f"{error['rms']:.2f}", f"{error['mean']:+.2f}"] for decay, error in run["errors"].items()]
    by_decay.append(["a constant equal to the mean", f"{run['constant_rms']:.2f}", ""])
    cosines = [f"{cosine:.2f}" for cosine in drift["cosine_to_next"]] + [""]
    path = [
        [str(point["step"]), f"{point['signal']:.3f}", f"{point['noise']:.1f}", cosine]
        for point, cosine in zip(drift["path"], cosines, strict=True)
    ]
    return [
        f"Moving averages along the run, whose true rho is {run['mean_true_rho']:.2f} on average: "
        "error by decay, in units of rho.",
        markdown_table(["decay", "root mean square error", "mean error"], by_decay),
        "Path of the truth, and the cosine of the expected gradients of one policy and the next:",
        markdown_table(["step", "signal", "noise", "cosine to the next"], path),
    ]
