"""Whole training steps with vLLM's generation, as `make bench-vllm` measured them."""

from typing import Any

from benchmarks.sections.cost import conditions, table

RESULT = "cost_vllm.json"
TITLE = "Cost of whole training steps with vLLM"

__all__ = ["RESULT", "TITLE", "markdown", "table"]


def markdown(record: dict[str, Any]) -> str:
    """The conditions, then the table."""
    return (
        f"`make bench-vllm`: as above, but completions come from vLLM {record['machine']['versions']['vllm']} in colocate mode on the "
        "CPU. All trainers take turns with one engine and load their weights into it in each step. TRL itself computes old "
        "log-probabilities in a forward pass then, whose place the scoring pass takes where the importance ratio allows it: the "
        f"pass may cost more than the step grows. {conditions(record, 'vllm')}\n\n{table(record)}"
    )
