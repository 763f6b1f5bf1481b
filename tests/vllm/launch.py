"""`oblr_trl.scripts.train` with the cures and the probe applied: what `runs.py` starts, on one process or several.

    python -m tests.vllm.launch PLAN

`PLAN` is a JSON file, a list of runs of one process: `recipe` (path), `record` (directory) and `faults`, of which see
`probe.py`. Every run builds its own trainer; those after the first take over the engine, whose start is what costs time.
"""

import functools
import json
import os
import sys
from pathlib import Path

from tests.vllm import cures, probe


def keep_engine() -> None:
    """Build one engine per process. A run's first generation loads the run's weights into it, as after any step."""
    from trl.generation import vllm_generation

    vllm_generation.LLM = functools.cache(vllm_generation.LLM)


def main(plan_file: str) -> None:
    cures.apply()
    keep_engine()
    from accelerate.state import AcceleratorState

    from oblr_trl.scripts import train

    plan = json.loads(Path(plan_file).read_text())
    environment = dict(os.environ)
    for run in plan:
        os.environ.clear()
        os.environ.update(environment)  # a trainer with vLLM writes RANK and the like
        AcceleratorState._reset_state(reset_partial_state=True)
        with probe.installed(Path(run["record"]), **run["faults"]):
            train.main(*train.parse(["--config", run["recipe"]]))
        probe.record_end(Path(run["record"]))


if __name__ == "__main__":
    main(sys.argv[1])
