"""Learning curves on SmolLM2-135M-Instruct."""

from typing import Any

from benchmarks.sections.tables import markdown_table

_LABELS = {"ours": "OBLR-PO", "grpo": "GRPO", "rloo": "RLOO"}
_SHOWN = (10, 20, 30, 60)  # steps


def markdown(record: dict[str, Any]) -> str:
    """The conditions, then a row for every method, group size and rate."""
    settings, rows = record["settings"], []
    places = [steps // settings.get("eval_steps", 10) for steps in _SHOWN]
    for task, of_task in record["summary"].items():
        for arm in of_task["arms"].values():
            for rate, curves in sorted(arm["by_rate"].items(), key=lambda pair: float(pair[0])):
                found = ", ".join(f"{last:.2g}" for last in arm["last_rates"]) if arm["learning_rate"] is None else ""
                if found and "highest_rates" in arm:
                    found = f"at most {max(arm['highest_rates']):.2g}, at last {found}"
                # A run that is not finished, or shorter, has no value there.
                values = [[curve[place] for curve in curves if len(curve) > place] for place in places]
                part = arm["movement"]
                rows.append(
                    [
                        task,
                        _LABELS[arm["method"]] + arm.get("note", ""),
                        f"{arm['num_prompts']} x {arm['num_generations']}",
                        f"found: {found}" if found else f"{float(rate):g}",
                        f"{curves[0][0]:.3f}",
                        *(", ".join(f"{v:.3f}" if v else "lost" for v in of_place) for of_place in values),
                        "" if part is None else f"{part['kl']:.4f} ({part['target']:.4f})",
                    ]
                )
    header = ["task", "method", "prompts x completions", "learning rate", "start"]
    header += [f"after {steps} steps, by seed" for steps in _SHOWN] + ["KL of a step (target)"]
    return (
        "`make gpu`: all parameters, bfloat16 autocast (float32 on a CPU), AdamW, 64 rollouts a step; mean reward of 128 held-out prompts, answered "
        "once each at temperature 1. *Lost*: the sampler met a value that is no probability.\n\n"
        + markdown_table(header, rows)
    )
