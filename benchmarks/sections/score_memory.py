"""What `make bench-memory` measured: peak memory of the scoring pass relative to training's."""

from typing import Any

RESULT = "score_memory.json"
TITLE = "The scoring pass alone: memory"


def markdown(record: dict[str, Any]) -> str:
    """A table of ratios, one row per case."""
    settings, cases = record["settings"], record["cases"]
    table = ["| | `all` | `all`, tiled | `lm_head` | `lm_head`, tiled |", "|---|---|---|---|---|"]
    for case in cases:
        ratios = [
            case["passes"][scope]["ratios"][kind] for scope in ("all", "lm_head") for kind in ("increment", "floor")
        ]
        label = "LoRA" if case["lora"] else "all parameters"
        label += ", gradient checkpointing" if case["checkpointing"] else ""
        table.append(f"| {label} | " + " | ".join(f"{ratio:.2f}" for ratio in ratios) + " |")
    first = cases[0]
    return "\n".join(
        [
            "`make bench-memory`: peak of the process during the scoring pass, as increment over the state before, relative to "
            f"training's forward and backward on the same micro-batch; random Qwen3, hidden {settings['hidden_size']}, "
            f"{settings['num_layers']} layers, vocabulary {settings['vocab_size']}, float32, {first['batch_size']} x "
            f"{first['sequence_length']} tokens, median of {settings['repeats']} processes. On a CPU TRL's output projection takes more "
            'memory than its GPU kernels would; "tiled" compares with training whose projection works in small tiles.',
            "",
            *table,
        ]
    )
