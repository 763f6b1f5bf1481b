"""Table of `benchmarks.pretrained_variance`: the gradient's variance under every baseline on a pretrained model."""

from typing import Any

from benchmarks.sections.tables import markdown_table, plus_minus


def markdown(record: dict[str, Any]) -> str:
    """Every baseline by task and group size, and how far the scopes agree with exact scores."""
    settings, tasks = record["settings"], record["policies"]
    sizes = [str(size) for size in settings["num_generations"]]
    rows = []
    for label in next(iter(tasks.values()))["methods"]:
        cells = [f"{label} (biased)" if label in record["biased"] else label]
        cells += [plus_minus(task["methods"][label][size], ".2f") for task in tasks.values() for size in sizes]
        rows.append([f"**{cell}**" for cell in cells] if label == record["default"] else cells)
    described = [
        f"{name}: mean reward {task['mean_reward']:.2f}, {task['mean_length']:.1f} tokens, correlation of log weights with exact ones "
        + ", ".join(f"{scope} {value:.2f}" for scope, value in task["agreement"].items())
        for name, task in tasks.items()
    ]
    return "\n\n".join(
        [
            f"Within-prompt variance of the gradient of all parameters relative to RLOO's on the same completions; mean ± standard deviation "
            f"over seeds ({settings['num_seeds']}) of {settings['num_prompts']} held-out prompts x {settings['num_completions']} completions, which are "
            "one batch.",
            markdown_table(["baseline", *(f"{name}, G = {size}" for name in tasks for size in sizes)], rows),
            "; ".join(described) + ".",
        ]
    )
