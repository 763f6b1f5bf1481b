"""Starts `launch.py` on real processes, and reads what they left behind."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

ROOT = Path(__file__).parents[2]
TIMEOUT = 600  # seconds, on a busy machine; an engine that waits for a dead peer waits indefinitely

# The algorithm is left at its defaults but for the learning rate, which is to be known.
RECIPE = {
    "lr_adaptation": "snr",
    "reward_funcs": ["tests.tiny_models.digit_reward"],
    "use_vllm": True,
    "vllm_max_model_length": 64,
    "num_generations": 4,
    "max_completion_length": 8,
    "per_device_train_batch_size": 8,
    "steps_per_generation": 2,
    "gradient_accumulation_steps": 2,
    "max_steps": 3,
    "lr_scheduler_type": "constant",
    "bf16": False,
    "gradient_checkpointing": False,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
}
ZERO_3 = {
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
}


@dataclass
class Run:
    """One training run that ended well."""

    directory: Path

    def logged(self, name: str) -> list[float]:
        """The values of one metric over the training steps."""
        history = json.loads((self.directory / "out" / "trainer_state.json").read_text())["log_history"]
        return [row[name] for row in history if name in row]

    def recorded(self, name: str, rank: int = 0) -> list[Any]:
        """One of the probe's values over the generations of one process."""
        lines = (self.directory / "record" / f"rank-{rank}.jsonl").read_text().splitlines()
        return [json.loads(line)[name] for line in lines]

    def left_process_group(self, rank: int = 0) -> bool:
        """Whether a process had a process group when the training script had returned."""
        return json.loads((self.directory / "record" / f"end-{rank}.json").read_text())["process_group"]

    def batches(self) -> list[dict[str, Any]]:
        """The generation batches of a run on one process, with the scores that were used and the weights of the model."""
        files = sorted((self.directory / "record").glob("step-*.pt"))
        return [torch.load(file) for file in files]


def start(
    directory: Path,
    plan: dict[str, dict[str, Any]],
    *,
    base: dict[str, Any],
    num_processes: int = 1,
    zero_3: bool = False,
) -> dict[str, Run]:
    """
    Carry out a plan and wait for its end.

    Args:
        directory (`Path`): Where recipes, records and outputs go, one folder for each run.
        plan (`dict`): For each run its name and what it adds to the recipe; the key `faults` goes to the probe.
        base (`dict`): What all runs add to [`RECIPE`]: model and prompts.
        num_processes (`int`): Number of processes.
        zero_3 (`bool`): Whether DeepSpeed partitions the parameters.
    """
    steps = []
    for name, changes in plan.items():
        folder = directory / name
        folder.mkdir()
        recipe = RECIPE | base | {"output_dir": str(folder / "out")} | changes
        faults = recipe.pop("faults", {})
        if (
            os.environ.get("VLLM_TESTS_BREAK") == "sync"
        ):  # to see the suite fail: `VLLM_TESTS_BREAK=sync make test-vllm`
            faults = faults | {"sync": False}
        # accelerate takes `use_cpu` as a wish for its own CPU backend, which knows no DeepSpeed
        recipe |= {"deepspeed": str(folder / "zero_3.json")} if zero_3 else {"use_cpu": True}
        (folder / "zero_3.json").write_text(json.dumps(ZERO_3))
        (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        steps.append({"recipe": str(folder / "recipe.yaml"), "record": str(folder / "record"), "faults": faults})
    plan_file = directory / "plan.json"
    plan_file.write_text(json.dumps(steps))
    _run_to_end(["-m", "tests.vllm.launch", str(plan_file)], directory / "log.txt", num_processes, zero_3)
    return {name: Run(directory / name) for name in plan}


def _run_to_end(module: list[str], log: Path, num_processes: int, zero_3: bool) -> None:
    command = [sys.executable, *module]
    if num_processes > 1:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc_per_node", str(num_processes), *module]
    environment = (
        os.environ
        | {
            "HF_HUB_OFFLINE": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "OMP_NUM_THREADS": "1",
            "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
            "VLLM_NO_USAGE_STATS": "1",
            "ACCELERATE_USE_DEEPSPEED": str(zero_3).lower(),
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",  # DeepSpeed's extension is built by ninja
        }
    )
    with open(log, "w") as f:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=f, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = process.wait(TIMEOUT)
        except subprocess.TimeoutExpired:
            code = f"none within {TIMEOUT} s"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # the processes of a run that hangs, or that lost one
            process.wait()
    assert code == 0, f"exit code {code}; the end of its output:\n{log.read_text()[-6000:]}"
