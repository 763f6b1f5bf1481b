"""The scale document: up to date, honest about what was not measured, and its arithmetic."""

import json
import math
from pathlib import Path

import pytest
from transformers import Qwen3Config

from benchmarks.scale import MODELS, flops_per_token, gather_bytes, scale_document
from oblr_trl.planning.models import linear_layers, meta_model

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def in_repository(monkeypatch):
    monkeypatch.chdir(ROOT)


def test_what_a_process_receives_in_the_gather():
    # 1024 completions x 4096 numbers x 4 bytes = 16 MiB, of which a quarter is its own.
    assert gather_bytes(1024, 4096, 4) == 12 * 2**20


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


def test_the_scale_document_is_up_to_date():
    assert (ROOT / "docs/scale.md").read_text() == scale_document(), "run: python -m benchmarks.scale"


def test_the_scale_document_tells_what_was_not_measured(tmp_path):
    assert scale_document(tmp_path).count("not measured") > math.prod((2, 2, 4))


def test_the_scale_document_takes_up_a_measured_gpu(tmp_path):
    case = {"shape": "Qwen3-4B", "sequence_length": 1024, "lora": False, "checkpointing": True}
    case["ratios"] = {"all": {"time": 0.71, "peak": 0.9}}
    (tmp_path / "gpu.json").write_text(json.dumps({"cases": [case]}))
    row = next(line for line in scale_document(tmp_path).splitlines() if line.startswith("| Qwen3-4B | 8 x 1024"))
    assert row == "| Qwen3-4B | 8 x 1024 | 0.71 (measured) | not measured | not measured | not measured |"
