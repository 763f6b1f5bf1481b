"""The peak memory of the scoring pass alone, as `make bench-memory` measured it."""

from typing import Any


def table(record: dict[str, Any]) -> str:
    """Increments relative to training's, one row per case, and the largest of all scoring passes."""
    lines = ["| | `all` | `all`, tiled | `lm_head` | `lm_head`, tiled |", "|---|---|---|---|---|"]
    for case in record["cases"]:
        passes = case["passes"]
        ratios = [passes[scope]["ratios"][kind] for scope in ("all", "lm_head") for kind in ("increment", "floor")]
        label = "LoRA" if case["lora"] else "all parameters"
        label += ", gradient checkpointing" if case["checkpointing"] else ""
        lines.append(f"| {label} | " + " | ".join(f"{ratio:.2f}" for ratio in ratios) + " |")
    largest = max(
        result["ratios"]["increment"]
        for case in record["cases"]
        for result in case["passes"].values()
        if "ratios" in result
    )
    goal = f"(goal: at most {record['target']:.2f})"
    return "\n".join([*lines, "", f"Largest of all scopes: {largest:.2f} of training's {goal}."])


def markdown(record: dict[str, Any]) -> str:
    """The conditions, then the table."""
    settings, first = record["settings"], record["cases"][0]
    return (
        "`make bench-memory`: peak of the process during the scoring pass, as increment over the state before, relative to "
        f"training's forward and backward on the same micro-batch; random Qwen3, hidden {settings['hidden_size']}, "
        f"{settings['num_layers']} layers, vocabulary {settings['vocab_size']}, float32, {first['batch_size']} x "
        f"{first['sequence_length']} tokens, median of {settings['repeats']} processes. On a CPU TRL's output projection takes more "
        'memory than its GPU kernels would; "tiled" compares with training whose projection works in small tiles.\n\n'
        f"{table(record)}"
    )
