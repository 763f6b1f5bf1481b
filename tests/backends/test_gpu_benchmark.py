"""The GPU benchmark's ZeRO-3 engine, on the CPU and in a process of its own: it joins a process group."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_every_pass_but_one_runs_inside_a_zero3_engine(tmp_path):
    output = tmp_path / "gpu.json"
    command = [
        sys.executable,
        "-m",
        "benchmarks.gpu",
        "--device",
        "cpu",
        "--shape",
        "tiny",
        "--sequence_lengths",
        "16",
    ]
    command += [
        "--batch_size",
        "2",
        "--rounds",
        "1",
        "--tuning",
        "full",
        "lora",
        "--checkpointing",
        "on",
        "--zero3",
        "true",
    ]
    finished = subprocess.run([*command, "--output", str(output)], cwd=ROOT, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    cases = json.loads(output.read_text())["cases"]
    assert [case["lora"] for case in cases] == [False, True]
    for case in cases:
        assert set(case["passes"]) == {"train", "old_logps", "all", "last_k", "lm_head"}
        assert all(result["seconds"] > 0 for result in case["passes"].values())
