"""The scale document: up to date, honest about what was not measured, and its arithmetic."""

import json
from pathlib import Path

import pytest
from transformers import Qwen3Config

from benchmarks.scale import MODELS, flops_per_token, scale_document
from oblr_trl.planning.models import linear_layers, meta_model

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def in_repository(monkeypatch):
    monkeypatch.chdir(ROOT)


def test_the_flops_of_a_pass():
    # Without attention's own term (T = 0), head and sketches being small: forward 1, training 3, scoring 2 of 2 n.
    model = meta_model(
        Qwen3Config(
            vocab_size=1,
            hidden_size=256,
            intermediate_size=640,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            pad_token_id=None,
        )
    )
    n = sum(layer.weight.numel() for layer in linear_layers(model).values())
    flops = flops_per_token(model, length=0, sketch_dim=1, last_k=1, checkpointing=False)
    assert flops.train / (2 * n) == pytest.approx(3, rel=1e-2)
    assert flops.score_all / (2 * n) == pytest.approx(2, rel=2e-2)
    assert flops.score_last_k / (2 * n) == pytest.approx(1.5, rel=2e-2)
    checkpointed = flops_per_token(model, length=0, sketch_dim=1, last_k=1, checkpointing=True)
    assert checkpointed.train - flops.train == 2 * n


def test_the_largest_model_has_as_many_parameters_as_the_published_one():
    # The index of its safetensors files states 141107412992 bytes of bfloat16.
    assert MODELS["Llama-3-70B"].num_parameters() == 141_107_412_992 // 2


def test_the_sentences_on_the_gather_are_right():
    num_bytes, micro_batch = 1024 * 4096 * 4, 3 * 2 * MODELS["Qwen3-4B"].num_parameters()
    text = " ".join((ROOT / "docs/scale.md").read_text().split())
    assert f"at most {num_bytes / 1e6:.1f} MB however" in text
    assert f"the sketches are {num_bytes / micro_batch:.2%} of that" in text
    assert f"{512 * 16 * 4096 * 4 / 1e6:.1f} MB at N G = 8192" in text


def test_the_scale_document_is_up_to_date():
    assert (ROOT / "docs/scale.md").read_text() == scale_document(), "run: python -m benchmarks.scale"


def test_the_scale_document_takes_up_a_measured_gpu_and_tells_what_was_not_measured(tmp_path):
    case = {"shape": "Qwen3-4B", "sequence_length": 1024, "lora": False, "checkpointing": True}
    case["ratios"] = {"all": {"time": 0.71, "peak": 0.9}}
    (tmp_path / "gpu.json").write_text(json.dumps({"cases": [case]}))
    document = scale_document(tmp_path / "gpu.json")
    assert "| Qwen3-4B | 8 x 1024 | 0.71 (measured) | not measured | not measured | not measured |" in document
    assert "| Qwen3-8B | 8 x 4096 | not measured | not measured | not measured | not measured |" in document
