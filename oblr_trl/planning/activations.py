"""What autograd keeps of one block, from a pass over fake tensors: shapes and dtypes of the real model, no memory."""

import copy
from contextlib import ExitStack

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from oblr_trl.planning.models import meta_model
from oblr_trl.planning.setup import Setup
from oblr_trl.scores.calls import Layout
from oblr_trl.scores.scopes import resolve_scope
from oblr_trl.scores.taps import frozen_parameters, tapped


def saved_block_bytes(setup: Setup, *, scoring: bool) -> int:
    """
    Bytes that autograd keeps of one sequence in one block, from forward to backward: exact for SDPA without fused kernels.

    The difference between batches of two sequences and one, from which weights and their copies drop out. In the scoring
    pass all parameters are frozen, and taps keep the inputs of trained layers. A mask makes SDPA repeat keys and values.
    """
    one_block = copy.deepcopy(setup.config)
    one_block.num_hidden_layers = 1
    dtype = torch.bfloat16 if setup.held_bytes == 2 else torch.float32
    model = meta_model(one_block, setup.peft_config, dtype)
    if setup.trained_bytes == 2:
        model.to(torch.bfloat16)  # adapters too, which PEFT keeps in float32
    base = model.model if setup.peft_config is None else model.get_base_model().model
    layers = resolve_scope(model, "auto", None).names
    length = setup.sequence_length

    def saved_bytes(batch_size: int) -> int:
        saved: dict[int, torch.UntypedStorage] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            saved[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
            return tensor

        hidden = torch.zeros(batch_size, length, one_block.hidden_size, dtype=dtype, requires_grad=True)
        rotary = base.rotary_emb(hidden, torch.arange(length).unsqueeze(0))
        mask = torch.ones(batch_size, 1, length, length, dtype=torch.bool) if setup.masked else None
        with ExitStack() as stack:
            if scoring:
                anchor = torch.zeros((), requires_grad=True)
                layout, ignore = Layout(batch_size, length), lambda *_: None
                taps = tapped(layers, anchor, ignore, layout=layout, is_active=lambda: True, on_unknown_layout=ignore)
                stack.enter_context(frozen_parameters(model))
                stack.enter_context(taps)
            stack.enter_context(torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor))
            stack.enter_context(torch.autocast("cpu", torch.bfloat16, enabled=setup.autocasts))
            base.layers[0](hidden, attention_mask=mask, position_embeddings=rotary)
        return sum(storage.nbytes() for storage in saved.values())

    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cpu")
        return saved_bytes(2) - saved_bytes(1)
