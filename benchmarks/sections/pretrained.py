"""Learning curves on SmolLM2-135M-Instruct."""

from typing import Any

from benchmarks.sections.tables import markdown_table


def markdown(record: dict[str, Any]) -> str:
    """The conditions, then a row for every method, group size and rate."""
    rows = []
    for task, of_task in record["summary"].items():
        for arm in of_task["arms"].values():
            for rate, curves in arm["by_rate"].items():
                found = ", ".join(f"{last:.2g}" for last in arm["last_rates"]) if arm["learning_rate"] is None else ""
                half, final = ([curve[place] for curve in curves] for place in (len(curves[0]) // 2, -1))
                seeds = ["lost" if not last else f"{last:.3f}" for last in final]
                size = arm["num_generations"]
                groups = f"{record['settings'].get('rollouts', 64) // size} x {size}"
                named = f"found: {found}" if found else f"{float(rate):g}"
                rows.append(
                    [
                        task,
                        arm["method"],
                        groups,
                        named,
                        f"{curves[0][0]:.3f}",
                        ", ".join(f"{v:.3f}" for v in half),
                        ", ".join(seeds),
                    ]
                )
    steps = record["settings"]["num_steps"]
    header = [
        "task",
        "method",
        "prompts x completions",
        "learning rate",
        "start",
        f"after {steps // 2} steps",
        f"after {steps}, by seed",
    ]
    return (
        f"`make gpu`: all parameters, bfloat16 autocast, AdamW, {steps} steps of 64 rollouts; mean reward of 128 held-out prompts, answered once "
        "each at temperature 1. *Lost*: the sampler met a value that is no probability.\n\n"
        + markdown_table(header, rows)
    )
