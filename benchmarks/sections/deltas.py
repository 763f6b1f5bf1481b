"""Table of `benchmarks.deltas`."""

from typing import Any

from benchmarks.sections.tables import markdown_table, plus_minus


def markdown(record: dict[str, Any]) -> str:
    """A row per setting: the default's gain, and the others' as a share of it."""
    settings, others = record["settings"], [delta for delta in record["means"] if delta != record["default"]]
    rows = []
    for setting, part in record["parts"].items():
        shares = [part["shares"][delta] for delta in others]
        cells = [f"{share['mean']:.2f} [{share['low']:.2f}, {share['high']:.2f}]" for share in shares]
        rows.append([setting, plus_minus(part["gain"], ".3f"), *cells])
    rows.append(["**mean**", "", *(f"{record['means'][delta]:.2f}" for delta in others)])
    header = ["", f"gain, delta = {record['default']}", *(f"{delta}: share of it" for delta in others)]
    return (
        f"{settings['num_steps']} steps where the setting says nothing, {settings['evaluation_seeds']} seeds, "
        "the same for all. Gain: mean held-out accuracy (with graded rewards: reward) over the run less that of the start. Intervals: bootstrap, "
        "95 %, over as few seeds too narrow.\n\n" + markdown_table(header, rows)
    )
