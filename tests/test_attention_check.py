"""The kernel of attention whose gradient is NaN: on a CPU there is none, so that its gradient is given."""

from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from oblr_trl.checks import attention

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def model_with(implementation):
    return SimpleNamespace(config=SimpleNamespace(_attn_implementation=implementation))


SDPA = model_with("sdpa")


def nan_where_cudnn(query, key, value, attn_mask):
    attended = scaled_dot_product_attention(query, key, value, attn_mask=attn_mask)
    return attended * (float("nan") if torch.backends.cuda.cudnn_sdp_enabled() else 1.0)


@pytest.fixture(autouse=True)
def as_before():
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(True)
    yield
    torch.backends.cuda.enable_cudnn_sdp(before)


def test_a_right_gradient_is_found_right():
    assert not attention.masked_attention_is_nan(CPU)


def test_the_question_asks_where_the_kernel_is_wrong(monkeypatch):
    asked = {}

    def record(query, key, value, attn_mask):
        asked.update(
            length=query.size(-2), sums=(query @ key.mT / query.size(-1) ** 0.5).logsumexp(-1), mask=attn_mask
        )
        return scaled_dot_product_attention(query, key, value, attn_mask=attn_mask)

    monkeypatch.setattr(attention, "scaled_dot_product_attention", record)
    attention.masked_attention_is_nan(CPU)
    assert asked["length"] % 128 == 64
    assert asked["mask"] is not None
    assert (asked["sums"] < -88.8).all()


def test_the_kernel_is_switched_off_where_its_gradient_is_nan(monkeypatch):
    monkeypatch.setattr(attention, "scaled_dot_product_attention", nan_where_cudnn)
    monkeypatch.setattr(
        attention, "masked_attention_is_nan", lambda device, ask=attention.masked_attention_is_nan: ask(CPU)
    )
    assert attention.masked_attention_is_nan(GPU)

    assert "enable_cudnn_sdp(False)" in attention.avoid_nan_attention(SDPA, GPU)
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    assert not attention.masked_attention_is_nan(GPU)
    assert attention.avoid_nan_attention(SDPA, GPU) is None  # once


@pytest.mark.parametrize(
    ("model", "device", "is_nan"),
    [(SDPA, GPU, False), (SDPA, CPU, True), (model_with("flash_attention_2"), GPU, True)],
    ids=["right on a GPU", "a CPU", "another kernel"],
)
def test_nothing_is_switched_off_without_a_reason(monkeypatch, model, device, is_nan):
    monkeypatch.setattr(attention, "masked_attention_is_nan", lambda device: is_nan)

    assert attention.avoid_nan_attention(model, device) is None
    assert torch.backends.cuda.cudnn_sdp_enabled()
