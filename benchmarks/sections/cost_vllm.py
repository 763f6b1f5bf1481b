"""What `make bench-vllm` measured: whole training steps with vLLM's generation."""

from statistics import median
from typing import Any

from benchmarks.sections.cost import ratio_cell, shape_sentence

RESULT = "cost_vllm.json"
TITLE = "Cost of whole training steps with vLLM"


def markdown(record: dict[str, Any]) -> str:
    """The ratios of whole steps."""
    comparison, settings = record["comparisons"]["vllm"], record["settings"]
    table = ["| | step / GRPO's | pass / GRPO's step |", "|---|---|---|"]
    for method, ratio in comparison["ratios"].items():
        share = comparison["pass_over_control"][method]
        table.append(f"| {record['methods'][method]} | {ratio_cell(ratio)} | {ratio_cell(share)} |")
    return "\n".join(
        [
            f"`make bench-vllm`: as above, but completions come from vLLM {record['machine']['versions']['vllm']} in colocate mode on "
            f"the CPU: {shape_sentence(comparison['case'])}; median [quartiles] over {settings['rounds']} rounds, seed "
            f"{settings['seed']}. All trainers take turns with one engine and load their weights into it in each step. With vLLM, TRL "
            "itself computes old log-probabilities in a forward pass, whose place the scoring pass takes where the "
            "importance ratio allows it: the pass may cost more than the step grows. "
            f"A GRPO step takes {median(comparison['seconds']['grpo']):.2f} s.",
            "",
            *table,
        ]
    )
