"""vLLM on a CPU for the cost study: one engine that all trainers of the process take turns with.

Every trainer loads its weights into the engine at the start of each of its steps, as in any run, so none profits from another
one's. vLLM's CPU backend cannot take new weights by itself; the cure is that of the tests.
"""

import importlib.util
import os
from importlib.metadata import packages_distributions, version


def prepare() -> str:
    """
    Let vLLM run on this machine, and return its version.

    Raises:
        `ValueError`: If vLLM is not installed.
    """
    if importlib.util.find_spec("vllm") is None:
        raise ValueError(
            "`vllm` needs vLLM, which is not installed in this environment. Run `make bench-vllm`, or leave the option out."
        )
    os.environ |= {"VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1"}
    from tests.vllm import cures
    from tests.vllm.launch import keep_engine

    cures.cure_weight_sync()
    cures.cure_precision()
    keep_engine()
    return version(packages_distributions()["vllm"][0])
