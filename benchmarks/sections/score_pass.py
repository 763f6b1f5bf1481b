"""The time of the scoring pass alone, as `make bench` measured it."""

from typing import Any

RESULT = "score_pass.json"
TITLE = "The scoring pass alone: time"
# Numerator, denominator, our upper goal for the ratio, and its row in the table.
RATIOS: dict[str, tuple[str, str, float | None, str]] = {
    "sketching adds": ("all", "no_taps", 1.20, "`all` / TRL's scoring forward with activation backward, no sketches"),
    "sketching adds to our own head": ("all", "no_taps_own_head", None, "`all` / the same with our output projection"),
    "no taps / training": ("no_taps", "train", None, "TRL's scoring forward with activation backward / training"),
    "all / training": ("all", "train", None, "`all` / training"),
    "last_k / training": ("last_k", "train", 0.60, "`last_k=1` / training"),
    "lm_head / training": ("lm_head", "train", 0.40, "`lm_head` / training"),
    "exact / training": ("exact", "train", None, "exact norms / training"),
    "per sequence / training": ("per_sequence", "train", None, "one forward and backward per sequence / training"),
}


def table(record: dict[str, Any]) -> str:
    """Medians of the ratios, one column per case, with our goal where there is one."""
    cases = record["cases"]
    header = " | ".join(f"{case['batch_size']} x {case['sequence_length']} tokens" for case in cases)
    lines = [f"| | {header} | goal, at most |", "|---|" + "---|" * len(cases) + "---|"]
    for key, (_, _, goal, label) in RATIOS.items():
        medians = " | ".join(f"{case['ratios'][key]['median']:.2f}" for case in cases)
        lines.append(f"| {label} | {medians} | {'' if goal is None else f'{goal:.2f}'} |")
    return "\n".join(lines)


def markdown(record: dict[str, Any]) -> str:
    """The conditions, then the table."""
    settings = record["settings"]
    return (
        f"`python -m benchmarks.score_pass`: ratios measured in one run, median of {settings['rounds']} interleaved rounds; random "
        f"Qwen3, hidden {settings['hidden_size']}, {settings['num_layers']} layers, vocabulary {record['cases'][0]['vocab_size']}, "
        f'float32, {record["machine"]["num_threads"]} threads. "Training" is forward and backward of TRL\'s loss.\n\n'
        f"{table(record)}\n\n"
        "Small batches suit a CPU's cache, so CPU ratios do not carry over to GPUs, where 0.67 of training is the arithmetic limit "
        "of `all`. GPU: not measured (`make bench-gpu`)."
    )
