"""Whole training steps on the GPU with TRL's defaults there, bfloat16 autocast and gradient checkpointing."""

import math
import os
from unittest.mock import patch

import pytest
import torch
from peft import LoraConfig
from trl import GRPOConfig, GRPOTrainer

from oblr_trl import OBLRPOConfig, OBLRPOTrainer
from oblr_trl.baselines import WeightsChoice
from oblr_trl.metrics import METRICS
from tests.gpu.device import DEVICE, TRAINING, reproducible
from tests.model_zoo import zoo_model
from tests.recording import Recording
from tests.tiny_models import OF_LAST_STEP, logged, tiny_model, train

LORA = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")


def parameters(trainer):
    return [parameter.detach().cpu() for parameter in trainer.model.parameters()]


def test_the_group_mean_without_adaptation_is_grpo_bit_for_bit(tmp_path):
    options = TRAINING | {"loss_type": "dr_grpo", "scale_rewards": "group", "max_steps": 4}
    options |= {"per_device_train_batch_size": 16, "gradient_accumulation_steps": 2}
    with reproducible():
        grpo = train(GRPOTrainer, GRPOConfig, tmp_path / "grpo", **options)
        control = {"baseline": "group_mean", "lr_adaptation": "none"}
        ours = train(OBLRPOTrainer, OBLRPOConfig, tmp_path / "ours", **control, **options)
    assert next(ours.model.parameters()).device.type == DEVICE.type
    for name in ("loss", "grad_norm", "learning_rate", "reward"):
        assert len(logged(grpo, name)) == 4
        assert logged(grpo, name) == logged(ours, name), name
    assert all(map(torch.equal, parameters(grpo), parameters(ours)))


@pytest.mark.parametrize(
    ("model", "options"),
    [
        ("qwen3", {}),
        ("qwen3", {"gradient_checkpointing": False, "score_method": "exact"}),
        ("qwen3", {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 8}),
        ("qwen3", {"steps_per_generation": 2, "per_device_train_batch_size": 16}),
        ("qwen3", {"cast_lm_head_to_fp32": True}),
        ("qwen3", {"loss_type": "grpo", "scale_rewards": "group"}),
        ("qwen3", {"num_generations": 1, "per_device_train_batch_size": 16}),
        ("qwen3", {"peft_config": LORA}),
        ("qwen3", {"peft_config": LORA, "num_generations": 1, "per_device_train_batch_size": 16}),
        ("Qwen3Moe", {}),
        ("GptOss", {}),
        ("Qwen3Next", {}),
        ("Gemma2", {}),
    ],
    ids=lambda value: value if isinstance(value, str) else ", ".join(value) or "defaults",
)
def test_the_trust_region_trains(tmp_path, model, options):
    model = tiny_model(num_layers=2) if model == "qwen3" else zoo_model(model, experts_implementation=None)
    options = TRAINING | {"lr_adaptation": "trust_region", "max_steps": 4} | options
    trainer = train(OBLRPOTrainer, OBLRPOConfig, tmp_path, model=model, **options)
    blank = [name for name in METRICS if name.startswith("variance_ratio")] if trainer.num_generations == 1 else []
    if "peft_config" in options:  # whose head is frozen
        blank.append("variance_ratio/lm_head_weights")
    for name in METRICS:
        values = logged(trainer, name)
        assert values, name
        if name in OF_LAST_STEP:
            values = values[1:]
        if name not in blank and "steps_per_generation" not in options:
            assert all(value is not None and not math.isnan(value) for value in values), (name, values)
    assert all(rate > 0 and math.isfinite(rate) for rate in logged(trainer, "learning_rate"))
    assert all(parameter.isfinite().all() for parameter in parameters(trainer))
    assert next(trainer.model.parameters()).device.type == DEVICE.type


@pytest.mark.parametrize("steps_per_generation", [1, 2])
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, steps_per_generation):
    options = TRAINING | {"max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    options |= {"lr_adaptation": "trust_region", "steps_per_generation": steps_per_generation}
    with reproducible():
        whole = train(OBLRPOTrainer, OBLRPOConfig, tmp_path / "whole", **options)
        resumed = train(
            OBLRPOTrainer,
            OBLRPOConfig,
            tmp_path / "resumed",
            resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"),
            **options,
        )
    assert all(map(torch.equal, parameters(whole), parameters(resumed)))
    for name in ("learning_rate", *METRICS):
        if name != "score/pass_time":
            assert logged(resumed, name) == logged(whole, name), name


class GivenCompletions(Recording):
    """Completions that depend on the step alone, and not on the device or its random numbers."""

    def _generate_single_turn(self, prompt_ids, *args, **kwargs):
        generator = torch.Generator().manual_seed(self.state.global_step)
        lengths = torch.randint(1, 7, (len(prompt_ids),), generator=generator).tolist()
        tokens = [torch.randint(3, 20, (length,), generator=generator).tolist() for length in lengths]
        return [[*row, 1] for row in tokens], None


@pytest.mark.parametrize("weights", ["all", "equal", "lm_head"])
def test_the_gpu_has_the_advantages_the_snr_and_the_rate_of_the_cpu(tmp_path, monkeypatch, weights):
    chosen = property(lambda choice: weights, lambda choice, value: None)
    monkeypatch.setattr(WeightsChoice, "value", chosen, raising=False)

    def run(name, use_cpu):
        options = {
            "use_cpu": use_cpu,
            "bf16": False,
            "lr_adaptation": "trust_region",
            "max_steps": 4,
            "score_min_prompts": 2,
        }
        # SGD: Adam's first step is the gradient's sign, also of entries that are 0 but for rounding.
        options |= {"optim": "sgd", "per_device_train_batch_size": 16, "gradient_accumulation_steps": 2}
        return train(GivenCompletions, OBLRPOConfig, tmp_path / name, **options)

    here, there = run("cpu", use_cpu=True), run("device", use_cpu=DEVICE.type == "cpu")
    assert next(there.model.parameters()).device.type == DEVICE.type
    for a, b in zip(here.batches, there.batches, strict=True):
        torch.testing.assert_close(b["advantages"].cpu(), a["advantages"], rtol=1e-4, atol=1e-5)
    assert set(logged(there, "score/fraction")) == {1.0 if weights == "all" else 0.5}
    for name in ("gradient_snr/signal", "gradient_snr/noise", "gradient_snr/rho", "learning_rate", "score/norm/mean"):
        assert logged(there, name) == pytest.approx(logged(here, name), rel=1e-4), name
    for a, b in zip(parameters(here), parameters(there), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("baseline", ["gradient_weighted", "group_mean"])
def test_a_compiled_model_has_the_advantages_of_one_that_is_not(tmp_path, baseline):
    def run(name, **options):
        options = TRAINING | {"bf16": False, "max_steps": 3, "optim": "sgd", "baseline": baseline} | options
        return train(GivenCompletions, OBLRPOConfig, tmp_path / name, **options)

    plain = run("plain")
    with patch.dict(os.environ):  # where transformers leaves the choice of a compiler
        compiled = run("compiled", torch_compile=True, torch_compile_backend="aot_eager")
    assert hasattr(compiled.model_wrapped, "_orig_mod")
    for a, b in zip(plain.batches, compiled.batches, strict=True):
        torch.testing.assert_close(b["advantages"], a["advantages"], rtol=1e-3, atol=1e-4)
    for name in ("loss", "gradient_snr/rho", "learning_rate"):
        # The loss is a sum of advantages that nearly cancel, and is as far off as they are.
        tolerance = 2e-5 if name == "loss" else 1e-6
        assert logged(compiled, name) == pytest.approx(logged(plain, name), rel=1e-3, abs=tolerance), name
