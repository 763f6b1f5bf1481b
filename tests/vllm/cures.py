"""What vLLM, DeepSpeed and accelerate need in order to do on CPU what they do on GPUs. Nothing of OBLR-PO is touched."""

import functools
import os

import torch


def cure_weight_sync() -> None:
    """vLLM's CPU backend prepacks linear weights, so that loading new ones fails, or, for the LM head, has no effect."""
    from vllm.model_executor.layers import utils

    def plain_linear(layer, remove_weight):
        layer.cpu_linear = torch.nn.functional.linear

    utils.dispatch_cpu_unquantized_gemm = plain_linear


def cure_precision() -> None:
    """TRL passes no dtype to the engine; only in float32 is a stale weight told apart from rounding."""
    from trl.generation import vllm_generation

    vllm_generation.LLM = functools.partial(vllm_generation.LLM, dtype="float32", enforce_eager=True)


def cure_deepspeed_world_size() -> None:
    """Accelerate reports one process on CPU although DeepSpeed has several."""
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    original = PartialState._prepare_backend

    def prepare_backend(self, *args, **kwargs):
        backend, distributed_type = original(self, *args, **kwargs)
        if backend is None and "LOCAL_RANK" in os.environ and os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
            return "gloo", DistributedType.MULTI_CPU
        return backend, distributed_type

    PartialState._prepare_backend = prepare_backend


def apply() -> None:
    cure_weight_sync()
    cure_precision()
    cure_deepspeed_world_size()
