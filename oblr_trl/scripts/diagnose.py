"""What `compare` does not say: which known failure a training run shows, by the log that its trainer wrote.

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
    parser.add_argument(
        "runs",
        nargs="+",
        metavar="RUN",
        help="an output_dir of a trainer, or a folder of such folders named seed-*; LABEL=RUN names it",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> dict[str, list[Finding]]:
    """Reads the runs, prints what was found, and returns it by the path of each run's log."""
    arguments = make_parser().parse_args(argv)
    try:
        methods = read_methods(arguments.runs)
    except RunLogError as error:
        raise SystemExit(f"diagnose: {error}") from error
    findings = {str(run.path): diagnose(run.rows) for runs in methods.values() for run in runs}
    for label, runs in methods.items():
        for run in runs:
            text = format_findings(findings[str(run.path)])
            sys.stdout.write(f"{label} ({run.path}, {run.num_steps} steps)\n\n{text}\n")
    return findings


if __name__ == "__main__":
    main()
