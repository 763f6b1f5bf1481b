"""Runs of the training script in processes of their own, and what they recorded."""

import contextlib
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
LAUNCHER = HERE / "launch.py"
RECIPE = HERE / "recipe.yaml"
TIMEOUT = 300  # seconds; a hang is a failure, not a wait


# What `accelerate launch` makes of an FSDP2 configuration.
_FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "Qwen3DecoderLayer",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
}


@dataclass
class Run:
    """One finished run: the records of its processes and its output directory."""

    output_dir: Path
    records: list[list[dict]]  # by process
    returncode: int
    log: str

    def lines(self, kind, rank=0):
        return [line for line in self.records[rank] if line["kind"] == kind]

    @property
    def completions(self):
        return [line["completions"] for line in self.lines("batch")]

    @property
    def advantages(self):
        return torch.tensor([line["advantages"] for line in self.lines("batch")])

    @property
    def weights_of_scores(self):
        return torch.tensor([weight for line in self.lines("batch") for weight in line["weights"]])  # of samples fewer

    def numbers(self, name):
        return torch.tensor([line[name] for line in self.lines("batch")], dtype=torch.float64)

    @property
    def learning_rates(self):
        """The rate inside every optimizer step; an engine that steps in parts repeats it."""
        rates = {}
        for line in self.lines("step"):
            rates.setdefault(line["step"], set()).update(line["lrs"])
        assert all(len(values) == 1 for values in rates.values()), rates
        return torch.tensor([rates[step].pop() for step in sorted(rates)], dtype=torch.float64)

    @property
    def final_weights(self):
        files = sorted(self.output_dir.glob("*.safetensors"))
        assert len(files) == 1, files
        return load_file(files[0])

    @property
    def history(self):
        return json.loads((self.output_dir / "trainer_state.json").read_text())["log_history"]


def command(processes, output_dir, model, options):
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    settings = {"model_name_or_path": model, "output_dir": output_dir} | options
    flags = [part for key, value in settings.items() if value is not None for part in (f"--{key}", str(value))]
    return [*launcher, str(LAUNCHER), "--config", str(RECIPE), *flags]


def environment(record, *, engine, sampling, steps_per_batch, broken, fault):
    return os.environ | {
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TORCH_EXTENSIONS_DIR": str(ROOT / ".cache" / "torch_extensions"),
        "BACKENDS_RECORD": str(record),
        "BACKENDS_ENGINE": engine or "",
        "BACKENDS_SAMPLING": sampling or "",
        "BACKENDS_STEPS_PER_BATCH": str(steps_per_batch),
        # The whole suite can be run broken: `BACKENDS_BREAK=local_sketches make test-backends` must fail.
        "BACKENDS_BREAK": broken or os.environ.get("BACKENDS_BREAK", ""),
        "BACKENDS_FAULT": fault or "",
        **({"ACCELERATE_USE_DEEPSPEED": "true"} if engine == "deepspeed" else {}),
        **(_FSDP2 if engine == "fsdp2" else {}),
    }


def options_of_engine(engine, zero_stage, processes):
    if engine == "deepspeed":
        return {"deepspeed": HERE / f"zero{zero_stage}.json"}
    if engine == "fsdp2":
        return {}
    return {"use_cpu": True, "ddp_backend": "gloo" if processes > 1 else None}


def start(
    folder,
    model,
    *,
    processes=1,
    engine=None,
    zero_stage=3,
    sampling="rows",
    steps_per_batch=1,
    broken=None,
    fault=None,
    env=None,
    **options,
):
    """Start a run in `folder`; returns the process, which leads a process group of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    arguments = command(
        processes, folder / "output", model, options_of_engine(engine, zero_stage, processes) | options
    )
    variables = environment(
        folder / "record",
        engine=engine,
        sampling=sampling,
        steps_per_batch=steps_per_batch,
        broken=broken,
        fault=fault,
    )
    with open(folder / "log.txt", "a") as log:
        return subprocess.Popen(
            arguments,
            cwd=ROOT,
            env=variables | (env or {}),
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def finish(process, folder, *, expect_failure=False):
    """Wait for a started run and read what it recorded; a run that hangs is killed and fails the test."""
    try:
        returncode = process.wait(TIMEOUT)
    except subprocess.TimeoutExpired:
        kill(process)
        raise AssertionError(f"The run hung. End of its log:\n{(folder / 'log.txt').read_text()[-3000:]}") from None
    log = (folder / "log.txt").read_text()
    assert expect_failure == (returncode != 0), f"exit code {returncode}. End of the log:\n{log[-4000:]}"
    return read(folder, returncode)


def read(folder, returncode=0):
    paths = sorted(folder.glob("record.*.jsonl"))
    records = [[json.loads(line) for line in path.read_text().splitlines()] for path in paths]
    return Run(folder / "output", records, returncode, (folder / "log.txt").read_text())


def run(folder, model, *, expect_failure=False, **settings):
    return finish(start(folder, model, **settings), folder, expect_failure=expect_failure)


def kill(process):
    """SIGKILL to the launcher and to its workers, which torchrun starts in sessions of their own."""
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for member in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()
    psutil.wait_procs(family, timeout=TIMEOUT)
    process.wait()
