"""`oblr_trl.scripts.train` with the cures applied, once for every recipe in turn: `-m tests.vllm.launch_recipes RECIPE ...`."""

import os
import sys

from tests.vllm import cures
from tests.vllm.launch import keep_engine


def main(recipes: list[str]) -> None:
    cures.apply()
    keep_engine()
    from accelerate.state import AcceleratorState, PartialState

    from oblr_trl.scripts import train

    environment = dict(os.environ)
    PartialState.destroy_process_group = lambda self, group=None: None  # the engine lives in the group
    for recipe in recipes:
        os.environ.clear()
        os.environ.update(environment)  # a trainer with vLLM writes RANK and the like
        AcceleratorState._reset_state(reset_partial_state=True)
        train.main(*train.parse(["--config", recipe]))


if __name__ == "__main__":
    main(sys.argv[1:])
