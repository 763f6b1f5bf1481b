"""Where these tests run: the GPU, or the CPU where `OBLR_GPU_REHEARSAL=1` rehearses them."""

import os
from contextlib import ExitStack, contextmanager

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

REHEARSES = os.environ.get("OBLR_GPU_REHEARSAL") == "1" and not torch.cuda.is_available()
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# On a GPU TRL's own defaults hold: bfloat16 autocast and gradient checkpointing.
TRAINING = {"use_cpu": DEVICE.type == "cpu", "bf16": True, "max_completion_length": 6}


@contextmanager
def reproducible():
    """The same bits from the same numbers: attention's fast kernels and atomic additions of a GPU do not give them."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    with ExitStack() as stack:
        stack.callback(torch.use_deterministic_algorithms, before[0], warn_only=before[1])
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        yield


@contextmanager
def tf32(allowed):
    """Whether float32 products may be rounded to ten bits of mantissa."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if allowed else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def to_device(tensors):
    return [tensor.to(DEVICE) for tensor in tensors]
