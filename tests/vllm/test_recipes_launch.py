"""The recipes with colocated vLLM, through their own launch lines: ZeRO-3 on 2 CPU processes, and one process for one GPU.

Overridden are the model, the data, the precision, sizes and the number of processes. The recipes of a launch share its processes
and its engine. Server mode is missing: its weights are sent by NCCL, which needs GPUs.
"""

import json
import math

import pytest
import yaml

from tests import recipe_stand_ins
from tests.vllm import runs

RECIPES = runs.ROOT / "recipes"
STOP_TOKEN = 7  # vLLM refuses one that the model does not have
MATH = [
    f"{path.parent.parent.name}/{path.parent.name}/{path.stem}"
    for path in sorted(RECIPES.glob("*/*/config_math*.yaml"))
]
# Accelerate config, processes here, recipes.
LAUNCHES = {
    "zero3": ("zero3", 2, [stem for stem in MATH if not stem.endswith("server")]),
    "one_gpu": ("single_gpu", 1, ["Qwen3-0.6B-Base/oblrpo/config_gsm8k", "Qwen3-0.6B-Base/grpo/config_gsm8k"]),
    "one_gpu_lora": (
        "single_gpu",
        1,
        ["Qwen3-1.7B-Base/oblrpo/config_gsm8k_lora", "Qwen3-1.7B-Base/grpo/config_gsm8k_lora"],
    ),
}


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory):
    path = tmp_path_factory.mktemp("stand-ins")
    return recipe_stand_ins.write_model(path / "model"), recipe_stand_ins.write_datasets(path)


@pytest.mark.parametrize("name", LAUNCHES)
def test_two_steps_with_vllm_through_the_launch_line_of_the_recipe(name, stand_ins, tmp_path):
    config, processes, stems = LAUNCHES[name]
    outputs = []
    for number, stem in enumerate(stems):
        recipe, output_dir = RECIPES / f"{stem}.yaml", tmp_path / f"run-{number}"
        overrides = recipe_stand_ins.shrink(recipe, *stand_ins, str(output_dir))
        overrides |= {"per_device_train_batch_size": 8 // processes, "save_strategy": "no"}
        overrides["generation_kwargs"] = {"stop_token_ids": [STOP_TOKEN]}
        if processes == 1:
            overrides["use_cpu"] = True
        merged = recipe_stand_ins.read(recipe) | overrides
        (tmp_path / f"recipe-{number}.yaml").write_text(yaml.safe_dump(merged))
        outputs.append((merged, output_dir))
    launch = ["-m", "accelerate.commands.launch", "--config_file", str(RECIPES / f"accelerate_configs/{config}.yaml")]
    launch += ["--num_processes", str(processes), "--mixed_precision", "no", "--main_process_port", "0"]
    script = ["-m", "tests.vllm.launch_recipes", *(str(tmp_path / f"recipe-{i}.yaml") for i in range(len(stems)))]

    runs._run_to_end([*launch, *script], tmp_path / "log.txt", num_processes=1, zero_3=False)  # accelerate starts them

    for merged, output_dir in outputs:
        history = json.loads((output_dir / "trainer_state.json").read_text())["log_history"]
        steps = [row for row in history if "rewards/accuracy_reward/mean" in row]
        assert [row["step"] for row in steps] == [1, 2]
        assert [row["step"] for row in history if "eval_reward" in row] == [0, 2]
        assert max(row["sampling/sampling_logp_difference/mean"] for row in steps) < 2e-6  # the engine has the weights
        assert all(math.isfinite(row["grad_norm"]) and row["completions/max_length"] <= 8 for row in steps)
        for row in steps:
            assert row["learning_rate"] <= merged.get("learning_rate", math.inf)  # a trust region finds its own
            assert ("lr_multiplier" in row) == (merged.get("lr_adaptation") in ("snr", "trust_region"))
        assert list(output_dir.glob("*.safetensors"))
