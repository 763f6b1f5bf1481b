"""One command for all scripts: `oblr-trl train ...` is `python -m oblr_trl.scripts.train ...`, and loads no other script.

Training on several GPUs: `accelerate launch -m oblr_trl.scripts.cli train ...`.
"""

import runpy
import sys

from oblr_trl.data.tasks import nearest

SCRIPTS = {
    "train": "train from a YAML recipe, by OBLR-PO or by its control GRPO",
    "evaluate": "evaluate a model on benchmarks with verifiable answers",
    "compare": "compare training runs or evaluations: table, figure, JSON",
    "plan": "calculate a recipe's memory per GPU and rollouts per step",
    "diagnose": "name the known failures that a run's log shows",
    "sweep": "launch a recipe for every combination of a grid and every seed",
}


def main() -> None:
    """Run the script that the first argument of the process names."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("-h", "--help"):
        lines = "".join(f"  {script:<9} {text}\n" for script, text in SCRIPTS.items())
        sys.stdout.write(
            f"usage: oblr-trl SCRIPT ...\n\n{lines}\n`oblr-trl SCRIPT --help` lists the arguments of a script.\n"
        )
        return
    if name not in SCRIPTS:
        raise SystemExit(f"oblr-trl: unknown script {name!r}{nearest(name, SCRIPTS)}; use one of {', '.join(SCRIPTS)}")
    del sys.argv[1]
    # Like `python -m`: the script finds itself as `__main__`, where pickle and new processes look for it.
    runpy.run_module(f"oblr_trl.scripts.{name}", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
