"""The recipes' own launch lines: `accelerate launch --config_file`, with real DeepSpeed, FSDP 2 and DDP on 2 CPU processes.

Overridden are the model, the data, the precision, sizes and the number of processes; vLLM has its own tests. Each accelerate
config launches another recipe.
"""

import contextlib
import os
import socket
import subprocess
import sys

import pytest

from tests import recipe_stand_ins
from tests.backends import runs

RECIPES = runs.ROOT / "recipes"
CONFIGS = RECIPES / "accelerate_configs"

# By accelerate config: the recipe, the kind of process group that accelerate must report, and whether parameters are shared.
LAUNCHES = {
    "zero3": ("Qwen3-8B-Base/oblrpo/config_math_sgd", "DEEPSPEED", True),
    "zero3_offload": ("Qwen3-8B-Base/oblrpo/config_math", "DEEPSPEED", True),
    "multi_node_zero3": ("Qwen3-4B-Base/opo/config_math", "DEEPSPEED", True),
    "zero2": ("Qwen3-4B-Base/rloo/config_math_sgd", "DEEPSPEED", False),
    "fsdp2": ("Qwen3-4B-Base/oblrpo/config_math_server", "FSDP", True),
    "ddp": ("Qwen3-1.7B-Base/oblrpo/config_gsm8k_lora", "MULTI_CPU", False),
}


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory):
    path = tmp_path_factory.mktemp("stand-ins")
    return recipe_stand_ins.write_model(path / "model"), recipe_stand_ins.write_datasets(path)


def free_port():
    with contextlib.closing(socket.socket()) as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def commands(name, recipe, overrides):
    """The launch line, once for every machine."""
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / f"{name}.yaml")]
    launch += ["--num_processes", "2", "--mixed_precision", "no", "--main_process_port", str(free_port())]
    script = [str(runs.LAUNCHER), "--config", str(recipe), *recipe_stand_ins.flags(overrides)]
    if name == "multi_node_zero3":
        here = ["--main_process_ip", "127.0.0.1"]
        return [[*launch, *here, "--machine_rank", rank, *script] for rank in ("0", "1")]
    return [[*launch, *script]]


@pytest.mark.parametrize("name", LAUNCHES)
def test_two_steps_through_the_launch_line_of_the_recipe(name, stand_ins, tmp_path):
    stem, kind, shared = LAUNCHES[name]
    recipe = RECIPES / f"{stem}.yaml"
    overrides = recipe_stand_ins.shrink(recipe, *stand_ins, tmp_path / "output")
    overrides |= {"use_vllm": False, "generation_kwargs": "{}", "num_completions_to_print": 0}
    overrides |= {"per_device_train_batch_size": 4, "save_strategy": "no"}
    engine = {"DEEPSPEED": "deepspeed", "FSDP": "fsdp2"}.get(kind)
    if engine is None:
        overrides |= {"use_cpu": True, "ddp_backend": "gloo"}
    environment = runs.environment(
        tmp_path / "record", engine=engine, sampling=None, steps_per_batch=1, broken=None, fault=None
    )
    for variable in ("ACCELERATE_USE_DEEPSPEED", *runs._FSDP2):
        environment.pop(variable, None)  # `accelerate launch` has to set them
    with open(tmp_path / "log.txt", "w") as log:
        processes = [
            subprocess.Popen(command, cwd=runs.ROOT, env=environment, stdout=log, stderr=log, start_new_session=True)
            for command in commands(name, recipe, overrides)
        ]
    try:
        for process in processes:
            assert process.wait(runs.TIMEOUT) == 0, (tmp_path / "log.txt").read_text()[-5000:]
    finally:
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, 9)
    run = runs.read(tmp_path)

    assert len(run.records) == 2
    for rank in range(2):
        (start,), (end,) = run.lines("start", rank), run.lines("end", rank)
        assert start["num_processes"] == 2
        assert start["type"].endswith(kind)
        assert (end["partitioned"] > 0) == shared
    history = {row["step"]: row for row in run.history if "rewards/accuracy_reward/mean" in row}
    assert sorted(history) == [1, 2]
    assert [row["step"] for row in run.history if "eval_reward" in row] == [0, 2]
    rates = [history[step]["learning_rate"] for step in (1, 2)]
    written = recipe_stand_ins.read(recipe)
    multipliers = [history[step].get("lr_multiplier", 1.0) for step in (1, 2)]
    initial = written.get(
        "learning_rate", 1e-6
    )  # TRL's default, which the trust region leaves out of the size of a step
    assert run.learning_rates.tolist() == pytest.approx([initial * factor for factor in multipliers])
    assert run.learning_rates.tolist() == pytest.approx(rates)
    assert run.final_weights
