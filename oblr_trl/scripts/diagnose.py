"""Looks for known failures in training runs, by the logs that their trainers wrote.

```bash
python -m oblr_trl.scripts.diagnose runs/oblrpo
```
"""

import argparse
import sys
from collections.abc import Sequence

from oblr_trl.runs.diagnosis import Finding, diagnose, format_findings
from oblr_trl.runs.logs import RunLogError, read_methods


def make_parser() -> argparse.ArgumentParser:
    """The command line of this script."""
    parser = argparse.ArgumentParser(
        prog="python -m oblr_trl.scripts.diagnose",
        description="Look for the failure signatures of docs/troubleshooting.md in the trainer_state.json of runs.",
    )
    run = "an output_dir of a trainer, or a folder of such folders named seed-*; LABEL=RUN names it"
    parser.add_argument("runs", nargs="+", metavar="RUN", help=run)
    return parser


def main(argv: Sequence[str] | None = None) -> dict[str, list[Finding]]:
    """Read the runs, print what was found, and return it by the path of each run's log."""
    try:
        methods = read_methods(make_parser().parse_args(argv).runs)
    except RunLogError as error:
        raise SystemExit(f"diagnose: {error}") from error
    findings = {}
    for label, runs in methods.items():
        for run in runs:
            found = findings[str(run.path)] = diagnose(run.rows)
            sys.stdout.write(f"{label} ({run.path}, {run.num_steps} steps)\n\n{format_findings(found)}\n")
    return findings


if __name__ == "__main__":
    main()
