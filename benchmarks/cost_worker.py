"""One case of the cost study on several processes: what `torchrun` starts, and the function that starts it.

    torchrun --standalone --nproc_per_node 2 -m benchmarks.cost_worker REQUEST

`REQUEST` is a JSON file that [`run_processes`] writes. Every process has one thread.
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.cost_steps import interleave
from benchmarks.cost_trainers import Case, case_record, random_trainers, save_policy

_ROOT = Path(__file__).resolve().parent.parent
_TIMEOUT = 900  # seconds; processes that wait for a dead one wait for ever
_PLAIN = {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_NUM_THREADS": "1",
}


def run_processes(
    num_processes: int, case: Case, methods: list[str], directory: Path, *, rounds: int, seed: int
) -> dict[str, dict[str, list[float]]]:
    """
    Measure a case on so many processes under DDP, as [`~cost_steps.interleave`] does on one.

    Raises:
        `RuntimeError`: If the processes fail, with the end of their output.
    """
    directory.mkdir(parents=True, exist_ok=True)
    save_policy(case, directory / "policy", seed)
    request = directory / "request.json"
    request.write_text(
        json.dumps(
            {
                "case": case_record(case),
                "methods": methods,
                "rounds": rounds,
                "seed": seed,
                "num_processes": num_processes,
            }
        )
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node", str(num_processes), "-m", "benchmarks.cost_worker", str(request)]
    log = directory / "log.txt"
    with open(log, "w") as f:
        process = subprocess.Popen(
            command, cwd=_ROOT, env=os.environ | _PLAIN, stdout=f, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = process.wait(_TIMEOUT)
        except subprocess.TimeoutExpired:
            code = -signal.SIGALRM
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)  # torchrun passes it on to its workers
                process.wait()
    if code != 0:
        raise RuntimeError(f"{num_processes} processes ended with exit code {code}:\n{log.read_text()[-3000:]}")
    return json.loads((directory / "measured.json").read_text())


def main(request_file: str) -> None:
    """Measure in this process; the first one writes `measured.json` beside the request."""
    torch.set_num_threads(1)
    directory = Path(request_file).parent
    request: dict[str, Any] = json.loads(Path(request_file).read_text())
    methods, rounds = request["methods"], request["rounds"]
    trainers = random_trainers(Case(**request["case"]), methods, directory, rounds=rounds, seed=request["seed"])
    for trainer in trainers.values():
        # Some ways of launching start a single process and say nothing.
        assert trainer.accelerator.num_processes == request["num_processes"]
    with tqdm(disable=True) as progress:
        measured = interleave(trainers, rounds, progress)
    if trainers[methods[0]].accelerator.is_main_process:
        (directory / "measured.json").write_text(json.dumps(measured))
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
