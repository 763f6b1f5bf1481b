"""Learning curves on SmolLM2-135M-Instruct."""

from statistics import mean
from typing import Any

import numpy as np

from benchmarks.sections.tables import markdown_table

_LABELS = {"ours": "OBLR-PO", "grpo": "GRPO", "rloo": "RLOO"}
_SHOWN = (5, 10, 20, 30, 40)  # steps


def gain(curves: list[list[float]]) -> float:
    """Mean over runs and steps of the reward less that of the start."""
    return mean(float(np.trapezoid(curve)) / (len(curve) - 1) - curve[0] for curve in curves)


def _gains(curves: list[list[float]], best: float) -> list[str]:
    if not all(map(all, curves)):
        return ["", ""]
    return [f"{gain(curves):.3f}", f"{gain(curves) / best:.2f}"]


def markdown(record: dict[str, Any]) -> str:
    """The conditions, then a row for every method, group size and rate."""
    settings, rows = record["settings"], []
    places = [steps // settings["eval_steps"] for steps in _SHOWN]
    for task, of_task in record["summary"].items():
        best = max(
            gain(curves)
            for arm in of_task["arms"].values()
            for curves in arm["by_rate"].values()
            if arm["learning_rate"]
        )
        for arm in of_task["arms"].values():
            for rate, curves in sorted(arm["by_rate"].items(), key=lambda pair: float(pair[0])):
                of_ours = arm["learning_rate"] is None
                found = f"found: at most {max(arm['highest_rates']):.2g}, at last {mean(arm['last_rates']):.2g}"
                # A run that is not finished, or shorter, has no value there.
                values = [[curve[place] for curve in curves if len(curve) > place] for place in places]
                part, entropy = arm["movement"], arm["entropy_by_rate"][rate]
                rows.append(
                    [
                        task,
                        _LABELS[arm["method"]],
                        f"{arm['num_prompts']} x {arm['num_generations']}",
                        found if of_ours else f"{float(rate):g}",
                        f"{curves[0][0]:.3f}",
                        *(", ".join(f"{v:.3f}" if v else "lost" for v in of_place) for of_place in values),
                        *_gains(curves, best),
                        "" if entropy is None else f"{entropy:.2f}",
                        "" if part is None else f"{part['kl']:.4f} ({part['target']:.4f})",
                    ]
                )
    header = ["task", "method", "prompts x completions", "learning rate", "start"]
    header += [f"after {steps} steps" for steps in _SHOWN] + [
        "gain: mean over the run less the start",
        "of the best control's",
    ]
    header += ["entropy of a token at the end, nats", "KL of a step (target)"]
    return (
        "`make gpu`: all parameters, bfloat16 autocast, AdamW, 64 rollouts a step; mean reward of 128 held-out prompts, answered four times "
        "each at temperature 1. *Lost*: a gradient that is NaN, and all weights after it. Several numbers in a cell are seeds.\n\n"
        + markdown_table(header, rows)
    )
