"""What `make demo-seeds` measured: OBLR-PO and TRL's GRPO on the demo, final held-out accuracy."""

from typing import Any

RESULT = "demo_seeds.json"
TITLE = "The demo: does it train?"


def markdown(record: dict[str, Any]) -> str:
    """A table of both methods, and whether their difference exceeds its spread."""
    ours, grpo = (record["methods"][name] for name in ("OBLR-PO", "GRPO"))
    rows = [
        ("held-out accuracy, start", "start_evaluation"),
        ("held-out accuracy, final", "final_evaluation"),
        ("seconds of training", "train_runtime"),
    ]
    table = ["| | OBLR-PO | GRPO |", "|---|---|---|"]
    for label, key in rows:
        digits = 1 if key == "train_runtime" else 3
        table.append(f"| {label} | {_spread(ours[key], digits)} | {_spread(grpo[key], digits)} |")
    table.append(f"| factor on the learning rate | {_spread(ours['lr_multiplier'], 3)} | |")
    differences = [
        a - b for a, b in zip(ours["final_evaluation"]["values"], grpo["final_evaluation"]["values"], strict=True)
    ]
    mean = sum(differences) / len(differences)
    signs = sum(difference > 0 for difference in differences)
    return "\n".join(
        [
            f"`make demo-seeds`: {ours['num_seeds']} seeds, {ours['steps']['mean']:.0f} steps of 16 prompts x 8 completions, mean ± "
            "standard deviation over seeds. Each method has a learning rate of its own, since the factor makes OBLR-PO's average "
            "step about GRPO's.",
            "",
            *table,
            "",
            f"OBLR-PO minus GRPO at the end: {mean:+.3f} on average, positive for {signs} of {len(differences)} seeds. That both "
            "learn is what the demo shows; which learns faster is the learning study's question.",
        ]
    )


def _spread(value: dict[str, Any], digits: int) -> str:
    return f"{value['mean']:.{digits}f} ± {value['std']:.{digits}f}"
