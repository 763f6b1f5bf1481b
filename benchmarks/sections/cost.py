"""Whole training steps of OBLR-PO against TRL's GRPO, as `make bench` and `make bench-vllm` measured them."""

from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.sections.tables import markdown_table

_COLUMNS = {"transformers": "random policy", "demo": "the demo's model", "vllm": "vLLM"}


def table(record: dict[str, Any]) -> str:
    """Ratios of whole steps and of the pass alone, median [quartiles]."""
    comparisons = {name: record["comparisons"][name] for name in _COLUMNS if name in record["comparisons"]}
    header = [""]
    for name in comparisons:
        header += [f"{_COLUMNS[name]}: step / GRPO's", "pass / GRPO's step"]
    rows = []
    for method, description in record["methods"].items():
        measured = [comparison for comparison in comparisons.values() if method in comparison["ratios"]]
        ratios = [comparison[kind][method] for comparison in measured for kind in ("ratios", "pass_over_control")]
        cells = [f"{ratio['median']:.2f} [{ratio['lower']:.2f}, {ratio['upper']:.2f}]" for ratio in ratios]
        if cells:
            rows.append([description, *cells])
    return markdown_table(header, rows)


def _conditions(record: dict[str, Any]) -> str:
    """The random policy, its batch, rounds, seed, and the seconds of the control's step."""
    settings = record["settings"]
    times = ", ".join(
        f"{median(comparison['seconds']['grpo']):.2f} s ({_COLUMNS[name]})"
        for name, comparison in record["comparisons"].items()
    )
    shape = f"hidden {settings['hidden_size']}, {settings['num_layers']} layers, vocabulary {settings['vocab_size']}"
    policy = f"The random policy is a Qwen3 ({shape}, float32)"
    if settings.get("model"):  # records of before lack it
        policy = f"In the place of the random policy is {Path(settings['model']).name} (float32)"
    return (
        f"{policy}, {settings['num_prompts']} prompts x {settings['num_generations']} completions of "
        f"{settings['prompt_length']} + {settings['completion_length']} tokens per step; median [quartiles] over {settings['rounds']} rounds, "
        f"seed {settings['seed']}. A GRPO step takes {times}."
    )


def markdown(record: dict[str, Any]) -> str:
    """The conditions, then the table."""
    if "vllm" in record["comparisons"]:
        return (
            f"`make bench-vllm`: as above, but completions come from vLLM {record['machine']['versions']['vllm']} in colocate mode on "
            "the CPU. All trainers take turns with one engine and load their weights into it in each step. TRL itself computes old "
            "log-probabilities in a forward pass then, whose place the scoring pass takes where the importance ratio allows it: the "
            f"pass may cost more than the step grows. {_conditions(record)}\n\n{table(record)}"
        )
    return (
        "`make bench`: real training steps (generation by transformers, rewards, scoring, backward, optimizer) of all trainers in "
        f"turn in one process with {record['machine']['num_threads']} thread. {_conditions(record)}\n\n{table(record)}"
    )
