"""The dearest operations of the scoring pass, and of training's forward and backward."""

from pathlib import Path
from typing import Any

from benchmarks.sections.tables import markdown_table


def markdown(record: dict[str, Any]) -> str:
    """The conditions and sums, then the operations side by side."""
    settings, passes = record["settings"], record["passes"]
    sums = "; ".join(
        f"{name}: {of['seconds']:.1f} s, {of['gflop']:.0f} GFLOP of products" for name, of in passes.items()
    )
    columns = [
        [
            f"{name}, {seconds / of['profiled_seconds']:.1%} in {calls} calls"
            for name, seconds, calls in of["operations"]
        ]
        for of in passes.values()
    ]
    rows = [[str(place), *cells] for place, cells in enumerate(zip(*columns, strict=True), 1)]
    return (
        f"`python -m benchmarks.pass_profile`: {Path(settings['model']).name}, float32, {record['machine']['num_threads']} thread, "
        f"{settings['num_sequences']} sequences of {settings['prompt_length']} + {settings['completion_length']} tokens. {sums}. Below, "
        f"operations by the time that they take themselves.\n\n{markdown_table(['', *passes], rows)}"
    )
