"""Tables and figure of `benchmarks.small_groups`."""

from typing import Any

from matplotlib.figure import Figure

from benchmarks.sections.tables import markdown_table, plus_minus

LABELS = {
    "ours": "OBLR-PO",
    "ours_scaled": "OBLR-PO, `scale_rewards: group`",
    "ours_no_memory": "OBLR-PO without memory",
    "mean_prior": "mean with the same prior",
    "rloo_kl": "RLOO, trust region",
    "grpo_kl": "GRPO, trust region",
    "rloo": "RLOO, best constant rate",
    "grpo": "GRPO, best constant rate",
}
CONTROLS = ("rloo_kl", "grpo_kl", "rloo", "grpo")
# Okabe and Ito's, as in the package's figure of runs.
_COLOURS = dict(
    zip(LABELS, ("#0072B2", "#F0E442", "#56B4E9", "#CC79A7", "#009E73", "#E69F00", "#000000", "#D55E00"), strict=True)
)


def markdown(record: dict[str, Any]) -> str:
    """A table per task."""
    settings = record["settings"]
    text = (
        f"{settings['num_steps']} steps of 64 rollouts; {settings['evaluation_seeds']} seeds; constant rates chosen with "
        f"{settings['tuning_seeds']} other seed(s) per rate; {settings['test_size']} held-out prompts. Graded rewards are measured by their "
        "mean over sampled completions, with the accuracy (of completely right answers) beside it. Rollouts: part of a run "
        "until what the strongest of RLOO and GRPO (bold) ends with, and its bootstrap 95 % interval. Time: the same in "
        "processor seconds, as a part of a whole run of the fastest control, which has no scoring pass. pass@8 there: at "
        "that point, bold at the end."
    )
    return "\n\n".join([text, *(_task_table(task, part) for task, part in record["summary"].items())])


def _task_table(task: str, part: dict[str, Any]) -> str:
    measure = part.get("measure", "accuracy")
    graded = measure != "accuracy"
    header = ["", "prompts x completions", f"final {measure}", "mean over the run", "rollouts", "time", "pass@8 there"]
    header += ["final accuracy"] * graded + ["live rollouts", "noise per rollout"]
    # The fastest control has no scoring pass: with a tuned rate none is needed.
    fastest = min(row["cpu_seconds"]["mean"] for row in part["rows"] if row["method"] in CONTROLS)
    rows = []
    for row in part["rows"]:
        strongest = [row["method"], row["group_size"]] == part["strongest"]
        until = 1.0 if strongest else row["part_of_rollouts"]["mean"]
        slower = row["cpu_seconds"]["mean"] / fastest
        mark = "**" * strongest
        rows.append(
            [
                f"{mark}{LABELS[row['method']]}{mark}",
                f"{64 // row['group_size']} x {row['group_size']}",
                f"{mark}{plus_minus(row['final'], '.3f')}{mark}",
                plus_minus(row["area"], ".3f"),
                "1" if strongest else _interval(row["part_of_rollouts"]),
                _number(None if until is None else until * slower, ".2f"),
                f"**{row['pass_at_8']['mean']:.3f}**" if strongest else _number(row["pass_at_8_there"], ".3f"),
                *([plus_minus(row["accuracy"], ".3f")] if graded else []),
                _number(row["logged"].get("advantage/live_fraction"), ".2f"),
                _number(row["logged"].get("gradient_snr/noise_per_rollout"), ".3g"),
            ]
        )
    return f"**{task}** (start {part['start']:.3f})\n\n{markdown_table(header, rows)}"


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _interval(value: dict[str, float | None]) -> str:
    mean, low, high = (">1" if value[name] is None else f"{value[name]:.2f}" for name in ("mean", "low", "high"))
    return mean if mean == low == high else f"{mean} [{low}, {high}]"


def figure(record: dict[str, Any]) -> Figure:
    """Held-out accuracy or mean reward over the rollouts, mean over seeds: every method at its best group size."""
    summary = record["summary"]
    columns = min(len(summary), 3)
    num_rows = -(-len(summary) // columns)
    canvas = Figure(figsize=(4.0 * columns, 3.0 * num_rows + 0.6), layout="constrained")
    axes = canvas.subplots(num_rows, columns, squeeze=False).flatten()
    num_rollouts = 64 * record["settings"]["num_steps"]
    handles: dict[str, Any] = {}
    for axis, (task, part) in zip(axes, summary.items(), strict=False):
        for method, label in LABELS.items():
            rows = [row for row in part["rows"] if row["method"] == method]
            if not rows:
                continue
            row = max(rows, key=lambda row: row["final"]["mean"])
            curve = row["curve"]
            rollouts = [i * num_rollouts / (len(curve) - 1) for i in range(len(curve))]
            (handles[label],) = axis.plot(
                rollouts, curve, color=_COLOURS[method], linewidth=2.2 if method == "ours" else 1.1
            )
            axis.annotate(
                f"G = {row['group_size']}", (rollouts[-1], curve[-1]), fontsize=6, color=_COLOURS[method], xytext=(2, 0),
                textcoords="offset points", va="center",
            )  # fmt: skip
        axis.set_title(task, fontsize=9)
        axis.set_xlabel("rollouts", fontsize=8)
        axis.set_ylabel(f"held-out {part.get('measure', 'accuracy')}", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes[len(summary) :]:
        axis.set_visible(False)
    canvas.legend(handles.values(), handles, loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    return canvas
