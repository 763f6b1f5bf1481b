"""What `make bench` measured of the scoring pass alone, relative to training's forward and backward."""

from typing import Any

RESULT = "score_pass.json"
TITLE = "The scoring pass alone: time"
_ROWS = {
    "sketching adds": "`all` / TRL's scoring forward with activation backward, no sketches",
    "sketching adds to our own head": "`all` / the same with our output projection, no sketches: the sketches alone",
    "all / training": "`all` / training",
    "last_k / training": "`last_k=1` / training",
    "lm_head / training": "`lm_head` / training",
    "exact / training": "exact norms / training",
    "per sequence / training": "one forward and backward per sequence (what other projects do) / training",
}


def markdown(record: dict[str, Any]) -> str:
    """A table of ratios, one column per case."""
    settings, cases = record["settings"], record["cases"]
    header = " | ".join(f"{case['batch_size']} x {case['sequence_length']} tokens" for case in cases)
    table = [f"| | {header} |", "|---|" + "---|" * len(cases)]
    for key, label in _ROWS.items():
        table.append(f"| {label} | " + " | ".join(f"{case['ratios'][key]['median']:.2f}" for case in cases) + " |")
    return "\n".join(
        [
            f"`python -m benchmarks.score_pass`: ratios measured in one run, median of {settings['rounds']} interleaved rounds; "
            f"random Qwen3, hidden {settings['hidden_size']}, {settings['num_layers']} layers, vocabulary "
            f'{cases[0]["vocab_size"]}, float32, {record["machine"]["num_threads"]} threads. "Training" is forward and backward of '
            "TRL's loss.",
            "",
            *table,
            "",
            "Small batches suit a CPU's cache, so CPU ratios do not carry over to GPUs, where 0.67 of training is the arithmetic "
            "limit of `all`. GPU: not measured (`make bench-gpu`).",
        ]
    )
