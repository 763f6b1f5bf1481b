"""Learning curves on SmolLM2-135M-Instruct."""

from statistics import mean
from typing import Any

import numpy as np

from benchmarks.record import spread
from benchmarks.sections.tables import markdown_table, plus_minus

_LABELS = {
    "ours": "OBLR-PO",
    "constant": "OBLR-PO's baseline alone",
    "grpo_kl": "GRPO's advantages, trust region",
    "grpo": "GRPO",
    "rloo": "RLOO",
}
_RIVALS = ("grpo", "rloo")
_SHOWN = (5, 10, 20, 30, 40)  # steps, and the last one


def gain(curve: list[float]) -> float:
    """Mean over the steps of the reward less that of the start."""
    return float(np.trapezoid(curve)) / (len(curve) - 1) - curve[0]


def _gains(curves: list[list[float]], best: float | None, difference: dict[str, float] | None) -> list[str]:
    if not all(map(all, curves)):
        return ["", "", ""]
    gains = spread([gain(curve) for curve in curves])
    paired = ""
    if difference is not None and len(curves) > 1:
        paired = f"{difference['mean']:+.3f} [{difference['low']:+.3f}, {difference['high']:+.3f}]"
    return [plus_minus(gains, ".3f"), "" if best is None else f"{gains['mean'] / best:.2f}", paired]


def _at(curves: list[list[float]], place: int) -> str:
    """Mean over the runs, where none of them is lost there and all of them come as far."""
    values = [curve[place] for curve in curves if len(curve) > place]
    if len(values) < len(curves):
        return ""
    return f"{mean(values):.3f}" if all(values) else "lost"


def markdown(record: dict[str, Any]) -> str:
    """The conditions, then a row for every method, group size and rate."""
    settings, rows = record["settings"], []
    last = settings["num_steps"]
    shown = [*(steps for steps in _SHOWN if steps < last and steps % settings["eval_steps"] == 0), last]
    for task, of_task in record["summary"].items():
        controls = [arm for arm in of_task["arms"].values() if arm["method"] in _RIVALS]
        gains = [mean(map(gain, curves)) for arm in controls for curves in arm["by_rate"].values()]
        best = max(gains, default=None)
        for arm in of_task["arms"].values():
            delta = arm.get("trust_region_kl")
            for rate, curves in sorted(arm["by_rate"].items(), key=lambda pair: float(pair[0])):
                of_ours = arm["learning_rate"] is None
                found = f"found: at most {max(arm['highest_rates']):.2g}, at last {mean(arm['last_rates']):.2g}"
                part, entropy = arm["movement"], arm["entropy_by_rate"][rate]
                rollouts = arm.get("rollouts_by_rate", {}).get(rate)
                rows.append(
                    [
                        task,
                        _LABELS[arm["method"]] + (f", delta = {delta:g}" if delta else ""),
                        f"{arm['num_prompts']} x {arm['num_generations']}",
                        found if of_ours else f"{float(rate):g}",
                        f"{curves[0][0]:.3f}",
                        *(_at(curves, steps // settings["eval_steps"]) for steps in shown),
                        *_gains(curves, best, arm.get("area_minus_strongest")),
                        "" if rollouts is None else plus_minus(spread(rollouts), ".3f"),
                        "" if entropy is None else f"{entropy:.2f}",
                        "" if part is None else f"{part['kl']:.4f} ({part['target']:.4f})",
                    ]
                )
    header = ["task", "method", "prompts x completions", "learning rate", "start"]
    header += [f"after {steps} steps" for steps in shown]
    header += ["gain: mean over the run less the start", "of the best control's", "less the best control's"]
    header += ["reward of the run's own rollouts"]
    header += ["entropy of a token at the end, nats", "KL of a step (target)"]
    filled = [i for i in range(len(header)) if any(row[i] for row in rows)]
    header, rows = [header[i] for i in filled], [[row[i] for i in filled] for row in rows]
    precision = "bfloat16 autocast" if settings.get("bf16", True) else "float32"
    seeds = (
        f"mean ± standard deviation over {settings['seeds']} seeds, differences paired, with bootstrap 95 % intervals"
    )
    return (
        f"All parameters, {precision}, AdamW, {settings['rollouts']} rollouts a step; mean reward of {settings['test_size']} held-out "
        f"prompts, answered four times each at temperature 1; {seeds if settings['seeds'] > 1 else 'one seed'}. *Lost*: a gradient that "
        "is NaN, and all weights after it.\n\n" + markdown_table(header, rows)
    )
