"""An attention kernel whose gradient is wrong, found by asking it."""

from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

_LENGTH = 64  # any that is 64 modulo 128
_HEAD_DIM = 64
_LOGIT = -120.0  # below ln of the smallest normal float32: pretrained models have such heads


def masked_attention_is_nan(device: torch.device) -> bool:
    """
    Whether the gradient of attention with a mask is NaN on `device`, of sequences that are not: torch's default kernel on H100 and
    H200, cuDNN's, since torch 2.11 ([pytorch#196678](https://github.com/pytorch/pytorch/issues/196678)). It is where the batch's
    length is 64 modulo 128 and a query's logits are all below -88.
    """
    shape = (1, 1, _LENGTH, _HEAD_DIM)
    query, key = torch.zeros(2, *shape, device=device, dtype=torch.bfloat16)
    query[..., 0], key[..., 0] = 1.0, _LOGIT * _HEAD_DIM**0.5
    query.requires_grad_()
    value = torch.ones(shape, device=device, dtype=torch.bfloat16)
    mask = torch.ones(_LENGTH, _LENGTH, dtype=torch.bool, device=device).tril()
    attended = scaled_dot_product_attention(query, key, value, attn_mask=mask[None, None])
    (gradient,) = torch.autograd.grad(attended.sum(), query)
    return not bool(gradient.isfinite().all())


def avoid_nan_attention(model: Any, device: torch.device) -> str | None:
    """The line that says that cuDNN's attention has been switched off in this process, `None` where its gradient is right or the model does
    not use it. One such batch, and all weights are NaN."""
    # PyTorch chooses the kernel for `sdpa` alone.
    in_use = device.type == "cuda" and getattr(model.config, "_attn_implementation", None) == "sdpa"
    if not in_use or not torch.backends.cuda.cudnn_sdp_enabled() or not masked_attention_is_nan(device):
        return None
    torch.backends.cuda.enable_cudnn_sdp(False)
    return (
        "The gradient of cuDNN's attention with a mask is NaN on this GPU for batches of 64, 192, 320, ... tokens "
        "(https://github.com/pytorch/pytorch/issues/196678), which would end the run. It has been switched off in this process, "
        "by `torch.backends.cuda.enable_cudnn_sdp(False)`; `True`, after the trainer is made, switches it on."
    )
