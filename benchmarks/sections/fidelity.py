"""What `python -m benchmarks.fidelity` measured: weights, baselines and rho of every scope and sketch size against exact ones."""

from typing import Any

from matplotlib.figure import Figure

RESULT = "fidelity.json"
TITLE = "Fidelity of scopes and sketches"


def markdown(record: dict[str, Any]) -> str:
    """A table of scopes by case at the trainer's sketch size, one of sketch sizes, and where `lm_head` fails."""
    settings, cases = record["settings"], record["cases"]
    shown = _shown_size(record)
    return "\n".join(
        [
            f"`python -m benchmarks.fidelity`: against one backward per sequence of all trained parameters; "
            f"{settings['num_seeds']} batches of {settings['num_prompts']} prompts x {settings['num_generations']} completions, "
            f"prior {settings['prior_strength']:g}, sketches of {shown} numbers. *Rank* is the correlation of the weights' ranks within "
            "groups (± standard deviation over batches); *b* the mean difference of the baselines in standard deviations of the "
            "reward; *excess* what the difference adds to mean w (r - b)², the variance's objective; *rho* the exact one and "
            "the difference of the sketched one under the same advantages (range: one batch left out).",
            "",
            *_scopes_table(record, shown),
            "",
            f"Sketch sizes of the scope `all`, median over {len(cases)} cases (worst): the median relative error of a squared norm, and "
            "the differences of the baseline and of rho.",
            "",
            *_sizes_table(record),
            "",
            _failures(record, shown),
        ]
    )


def summary(record: dict[str, Any]) -> str:
    """Sketch sizes, and where `lm_head` fails."""
    return "\n".join(
        [
            f"`python -m benchmarks.fidelity`, scope `all` against exact scores: median over {len(record['cases'])} cases (worst). "
            "Rank correlations and errors of every scope and case: [docs/results.md](docs/results.md).",
            "",
            *_sizes_table(record),
            "",
            _failures(record, _shown_size(record)),
        ]
    )


def _shown_size(record: dict[str, Any]) -> str:
    """The trainer's default where it was measured, else the longest sketch."""
    sizes = [str(size) for size in record["settings"]["sketch_dims"]]
    return "4096" if "4096" in sizes else sizes[-1]


def _scopes_table(record: dict[str, Any], size: str) -> list[str]:
    rows = ["| case | RLOO's excess | scope | rank | b | excess | rho |", "|" + "---|" * 7]
    for label, case in record["cases"].items():
        for index, (scope, by_size) in enumerate(case["scopes"].items()):
            figures, rho = by_size[size], by_size[size]["rho"]
            rank = figures["rank_correlation"]
            cells = (
                "" if index else label,
                "" if index else f"{case['rloo_objective']['mean'] - 1:+.0%}",
                f"`{scope}`",
                f"{rank['mean']:.2f} ± {rank['std']:.2f}",
                f"{figures['baseline_difference']['mean']:.3f}",
                f"{figures['objective']['mean'] - 1:+.1%}",
                f"{rho['exact']:.2f} {rho['difference']:+.2f} ({rho['min']:+.2f} to {rho['max']:+.2f})",
            )
            rows.append("| " + " | ".join(cells) + " |")
    return rows


def _sizes_table(record: dict[str, Any]) -> list[str]:
    rows = ["| numbers in a sketch | error of ‖z‖² | difference of b | difference of rho |", "|---|---|---|---|"]
    for size in map(str, record["settings"]["sketch_dims"]):
        measured = [case["scopes"]["all"][size] for case in record["cases"].values()]
        cells = (
            _median_and_worst([figures["norm_error"]["mean"] for figures in measured], ".1%"),
            _median_and_worst([figures["baseline_difference"]["mean"] for figures in measured], ".4f"),
            _median_and_worst([abs(figures["rho"]["difference"]) for figures in measured], ".3f"),
        )
        rows.append(f"| {size} | " + " | ".join(cells) + " |")
    return rows


def _median_and_worst(values: list[float], form: str) -> str:
    ordered = sorted(values)
    middle = (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2
    return f"{middle:{form}} ({ordered[-1]:{form}})"


def _failures(record: dict[str, Any], size: str) -> str:
    excesses = {
        label: (
            case["scopes"]["lm_head"][size]["objective"]["mean"] - 1,
            case["scopes"]["last_k=1"][size]["objective"]["mean"] - 1,
            case["scopes"]["lm_head"][size]["rank_correlation"]["mean"],
        )
        for label, case in record["cases"].items()
    }
    ordered = sorted(excesses, key=lambda label: excesses[label][0], reverse=True)
    worst, best = ordered[0], ordered[-1]
    return (
        f"`lm_head` does worst on {worst}: {excesses[worst][0]:+.1%} with a rank correlation of {excesses[worst][2]:.2f} "
        f"(`last_k=1`: {excesses[worst][1]:+.1%}), and best on {best}: {excesses[best][0]:+.1%}. "
        f"It adds more than 10 % in {sum(excess[0] > 0.1 for excess in excesses.values())} of {len(excesses)} cases, `last_k=1` in "
        f"{sum(excess[1] > 0.1 for excess in excesses.values())}."
    )


def figure(record: dict[str, Any]) -> Figure:
    """Left: rank correlation of the weights by case and scope. Right: error of a squared norm by sketch size."""
    drawn = Figure(figsize=(10, 4), layout="constrained")
    left, right = drawn.subplots(1, 2)
    size, labels = _shown_size(record), list(record["cases"])
    scopes = list(record["cases"][labels[0]]["scopes"])
    for index, scope in enumerate(scopes):
        figures = [record["cases"][label]["scopes"][scope][size]["rank_correlation"] for label in labels]
        left.errorbar(
            [figure["mean"] for figure in figures],
            [row + 0.16 * (index - (len(scopes) - 1) / 2) for row in range(len(labels))],
            xerr=[figure["std"] for figure in figures],
            fmt="o",
            markersize=4,
            capsize=2,
            label=scope,
        )
    left.set_yticks(range(len(labels)), [label.removesuffix(", as it is") for label in labels])
    left.invert_yaxis()
    left.set(xlabel="rank correlation with the exact weights, within groups")
    left.legend(fontsize=8)
    sizes = record["settings"]["sketch_dims"]
    for label in labels:
        by_size = record["cases"][label]["scopes"]["all"]
        right.plot(
            sizes,
            [max(by_size[str(size)]["norm_error"]["mean"], 1e-6) for size in sizes],
            marker="o",
            markersize=4,
            label=label.removesuffix(", as it is"),
        )
    right.set(
        xscale="log", yscale="log", xlabel="numbers in a sketch", ylabel="median relative error of ‖z‖², scope all"
    )
    right.set_xticks(sizes, [str(size) for size in sizes])
    right.minorticks_off()
    right.legend(fontsize=7)
    return drawn
