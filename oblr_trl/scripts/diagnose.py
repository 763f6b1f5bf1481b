"""Looks for known failures in training runs, by the logs that their trainers wrote.

```bash
python -m oblr_trl.scripts.diagnose runs/oblrpo
```
"""

import argparse
import sys
from collections.abc import Sequence

from oblr_trl.data.recipe_files import parse_or_exit
from oblr_trl.runs.diagnosis import Finding, diagnose, format_findings
from oblr_trl.runs.logs import read_methods


def main(argv: Sequence[str] | None = None) -> dict[str, list[Finding]]:
    """Read the runs, print what was found, and return it by the path of each run's log."""
    parser = argparse.ArgumentParser(
        prog="python -m oblr_trl.scripts.diagnose",
        description="Look for the failure signatures of docs/troubleshooting.md in the trainer_state.json of runs.",
    )
    run = "an output_dir of a trainer, or a folder of such folders named seed-*; LABEL=RUN names it"
    parser.add_argument("runs", nargs="+", metavar="RUN", help=run)
    arguments = parser.parse_args(argv)
    findings = {}
    for label, runs in parse_or_exit(lambda: read_methods(arguments.runs), "diagnose").items():
        for run in runs:
            found = findings[str(run.path)] = diagnose(run.rows)
            sys.stdout.write(f"{label} ({run.path}, {run.num_steps} steps)\n\n{format_findings(found)}\n")
    return findings


if __name__ == "__main__":
    main()
