"""Learning curves on SmolLM2-135M-Instruct."""

from typing import Any

from benchmarks.sections.tables import markdown_table

_LABELS = {"ours": "OBLR-PO", "grpo": "GRPO", "rloo": "RLOO"}


def markdown(record: dict[str, Any]) -> str:
    """The conditions, then a row for every method, group size and rate."""
    rows = []
    for task, of_task in record["summary"].items():
        for arm in of_task["arms"].values():
            for rate, curves in sorted(arm["by_rate"].items(), key=lambda pair: float(pair[0])):
                found = ", ".join(f"{last:.2g}" for last in arm["last_rates"]) if arm["learning_rate"] is None else ""
                half, final = ([curve[place] for curve in curves] for place in (len(curves[0]) // 2, -1))
                part = arm["movement"]
                moved = "" if part is None else f"{part['kl']:.4f} ({part['target']:.4f})"
                seeds = ["lost" if not last else f"{last:.3f}" for last in final]
                groups = f"{arm['num_prompts']} x {arm['num_generations']}"
                named = f"found: {found}" if found else f"{float(rate):g}"
                rows.append(
                    [
                        task,
                        _LABELS[arm["method"]],
                        groups,
                        named,
                        f"{curves[0][0]:.3f}",
                        ", ".join(f"{v:.3f}" for v in half),
                        ", ".join(seeds),
                        moved,
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
        "KL of a step (target)",
    ]
    return (
        f"`make gpu`: all parameters, bfloat16 autocast, AdamW, {steps} steps of 64 rollouts; mean reward of 128 held-out prompts, answered once "
        "each at temperature 1. *Lost*: the sampler met a value that is no probability.\n\n"
        + markdown_table(header, rows)
    )
