"""Tables of `benchmarks.snr`: estimated rho against the true one."""

from collections.abc import Sequence
from statistics import mean
from typing import Any

from benchmarks.sections.tables import markdown_table

_NOT_MEASURED = "n/a"


def markdown(record: dict[str, Any]) -> str:
    """Errors by batch size."""
    settings, policies = record["settings"], record["policies"]
    steps = ", ".join(str(policy["step"]) for policy in policies)
    return (
        f"Policies after {steps} steps; {settings['num_seeds']} draws of {settings['num_prompts']} prompts x "
        f"{settings['num_generations']} completions from each. Means over the policies.\n\n{_sizes_table(policies)}"
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
