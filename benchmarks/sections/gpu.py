"""The scoring pass on a GPU, as `make gpu` measured it."""

from typing import Any

from benchmarks.sections.tables import markdown_table

_SCOPES = {
    "all": "`all`",
    "last_k": "`last_k` = 2",
    "lm_head": "`lm_head`",
    "lm_head_reusing_forward": "`lm_head` beyond the old-log-prob forward",
}


def _row(case: dict[str, Any]) -> list[str]:
    passes, ratios = case["passes"], case["ratios"]
    label = f"{case['shape']}, {'LoRA' if case['lora'] else 'all parameters'}, {case['batch_size']} x {case['sequence_length']}"
    limits, peaks = [], []
    for name in ("train", "all"):
        limit, planned, measured = case["limits"].get(name), case["planned"].get(name), passes[name]
        limits.append(f"{measured['seconds'] / limit:.2f}" if limit else "")
        peaks.append(f"{measured['peak'] / 1e9:.2f}" + (f" ({planned / 1e9:.2f})" if planned else ""))
    times = (f"{ratios[scope]['time']:.2f}" for scope in _SCOPES)
    return [label, f"{passes['train']['seconds']:.3f}", *times, *limits, *peaks]


def _goal(record: dict[str, Any], scope: str) -> str:
    goal = record["goals"].get(scope)
    return "" if goal is None else f" (goal {goal:.2f})"


def markdown(record: dict[str, Any]) -> str:
    """The conditions, then ratios, limits and peaks."""
    header = ["8 sequences, 3 of 4 tokens of the completion, gradient checkpointing", "training, s"]
    header += [f"{title}: time over training's{_goal(record, scope)}" for scope, title in _SCOPES.items()]
    header += ["training over the limit", "`all` over it", "GB, training (planned)", "GB, `all` (planned)"]
    return (
        f"`make gpu` on one {record['machine']['gpu']}: random Qwen3 in bfloat16, a micro-batch without padding; training is forward and backward of "
        f"TRL's loss. The limit is the time of the FLOPs at {record['product_rate'] / 1e12:.0f} TFLOP/s, the rate of one matrix product there.\n\n"
        + markdown_table(header, [_row(case) for case in record["cases"]])
    )
