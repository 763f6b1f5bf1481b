"""The rate that the trust region finds where weights are in bfloat16 and the optimizer steps DeepSpeed's float32 copy of them.

Under ZeRO-2 with one process, on the CPU: what `benchmarks.learning_runs` trains, with an engine around it.
"""

import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

from benchmarks import learning_runs
from benchmarks.learning_runs import RunSpec
from oblr_trl import OBLRPOConfig, OBLRPOTrainer

PRECISIONS = ("float32", "bfloat16 weights")
_PROCESS = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "29533"}


def _train(spec: RunSpec) -> list[float]:
    """The rate of every step, in a process of its own."""
    os.environ |= _PROCESS | {"ACCELERATE_USE_DEEPSPEED": "true"}
    from tests.backends.launch import give_engines_a_cpu_process_group

    give_engines_a_cpu_process_group()
    half = spec.precision == "bfloat16 weights"
    engine: dict[str, Any] = dict.fromkeys(("train_micro_batch_size_per_gpu", "gradient_accumulation_steps"), "auto")
    engine |= {"zero_optimization": {"stage": 2}, "zero_force_ds_cpu_optimizer": False, "bf16": {"enabled": "auto"}}
    engine |= {"zero_allow_untested_optimizer": True, "gradient_clipping": "auto"}

    def config(*, use_cpu: bool, bf16: bool, **options: Any) -> OBLRPOConfig:
        # transformers lets bfloat16 without a GPU only where no engine may be.
        with patch("transformers.training_args.is_torch_bf16_gpu_available", lambda: True):
            return OBLRPOConfig(bf16=half, deepspeed=engine, **options)

    learning_runs._TRAINERS["oblrpo"] = (config, OBLRPOTrainer)  # type: ignore[assignment]
    learning_runs.prepare_process()
    with TemporaryDirectory() as folder:
        trainer, callback = learning_runs.prepared_trainer(replace(spec, precision="float32"), folder)
        trainer.train()
    assert str(next(trainer.model.parameters()).dtype) == ("torch.bfloat16" if half else "torch.float32")
    return callback.learning_rates


def found_rates(spec: RunSpec, num_search_steps: int, num_seeds: int) -> dict[str, list[float]]:
    """Median rate after the search, by precision and seed."""
    rates: dict[str, list[float]] = {precision: [] for precision in PRECISIONS}
    for seed in range(num_seeds):
        for precision in PRECISIONS:
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
                of_run = pool.submit(_train, replace(spec, precision=precision, seed=seed)).result()
            rates[precision].append(median(of_run[num_search_steps:]))
    return rates
