"""Table of `benchmarks.weights_choice`: what the automatic scope chooses for the baseline's weights."""

from statistics import mean
from typing import Any

from benchmarks.record import spread
from benchmarks.sections.tables import markdown_table, plus_minus


def markdown(record: dict[str, Any]) -> str:
    """Per policy and group size: what is predicted and what is left, and the choice."""
    settings = record["settings"]
    sizes = [str(size) for size in settings["num_generations"]]
    header = ["policy"]
    for size in sizes:
        header += [f"G = {size}: equal", "`lm_head`", "choice (share of batches)"]
    rows = []
    for name, policy in record["policies"].items():
        row = [name]
        for size in sizes:
            measured = policy[size]
            row += [
                f"{measured['variance'][weights]:.2f} ({measured['predicted'][weights]:.2f})"
                for weights in ("equal", "lm_head")
            ]
            row.append(f"`{measured['choice']}` ({measured['share_of_batches'][measured['choice']]:.2f})")
        rows.append(row)
    return "\n\n".join(
        [
            f"Variance with equal weights and with those of the output projection over that with the weights of all parameters, by exact gradients "
            f"(in parentheses: as the trainer's own averages predict it); and its choice after {settings['num_batches']} batches of 16 prompts, with the "
            f"share of the batches after the warm-up that it held in. Prior automatic, seed {settings['seed']}.",
            markdown_table(header, rows),
            f'Trained for {settings["num_steps"]} steps with the default and with `score_scope="all"`; RLOO scores a quarter of the prompts, or all. Mean ± standard '
            f"deviation over {settings['num_seeds']} seeds; the gain is the mean over the run less the start.",
            _trained(record["trained"]),
        ]
    )


def _trained(trained: dict[str, Any]) -> str:
    """By policy: what training gained with every scope, the share of the prompts that were scored, and the time."""
    rows = []
    for name, scopes in trained.items():
        row = [name, f"{mean(run['start'] for run in scopes['all']):.3f}"]
        for kind in ("final", "gain"):
            row += [plus_minus(spread([run[kind] for run in scopes[scope]]), ".3f") for scope in ("sample", "all")]
        seconds = [
            auto["cpu_seconds"] / all_["cpu_seconds"]
            for auto, all_ in zip(*map(scopes.get, ("sample", "all")), strict=True)
        ]
        row += [f"{mean(run['scored'] for run in scopes['sample']):.2f}", plus_minus(spread(seconds), ".2f")]
        rows.append(row)
    header = ["run", "start", "final: default", "`all`", "gain: default", "`all`"]
    return markdown_table([*header, "prompts scored by the default", "its processor time over that of `all`"], rows)
