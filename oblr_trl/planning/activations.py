"""What autograd keeps of one block, from a pass over fake tensors: shapes and dtypes of the real model, no memory."""

from contextlib import ExitStack

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from oblr_trl.planning.models import meta_model
from oblr_trl.planning.setup import Setup
from oblr_trl.scores.scopes import resolve_scope
from oblr_trl.scores.taps import frozen_parameters, tapped

_DTYPES = {2: torch.bfloat16, 4: torch.float32}


def saved_block_bytes(setup: Setup, *, scoring: bool) -> int:
    """
    Bytes that autograd keeps of one micro-batch in one block, from forward to backward: exact for SDPA without fused kernels.

    B times the difference between batches of two sequences and one, from which weights and their copies drop out. In the scoring
    pass all parameters are frozen, and taps keep the inputs of trained layers. A mask makes SDPA repeat keys and values.
    """
    fields = {
        name: value for name, value in setup.config.to_dict().items() if name != "layer_types"
    }  # one for every block
    one_block = type(setup.config).from_dict({**fields, "num_hidden_layers": 1})
    dtype = _DTYPES[setup.stream_bytes]
    model = meta_model(one_block, setup.peft_config, dtype)
    if setup.peft_config is not None:
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(_DTYPES[setup.trained_bytes])
    base = model.model if setup.peft_config is None else model.get_base_model().model
    layers = resolve_scope(model, "all", None).names
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
                taps = tapped(layers, anchor, lambda *_: None, batch_size=batch_size, is_active=lambda: True)
                stack.enter_context(frozen_parameters(model))
                stack.enter_context(taps)
            stack.enter_context(torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor))
            stack.enter_context(torch.autocast("cpu", torch.bfloat16, enabled=setup.autocasts))
            base.layers[0](hidden, attention_mask=mask, position_embeddings=rotary)
        return sum(storage.nbytes() for storage in saved.values())

    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cpu")
        return setup.args.per_device_train_batch_size * (saved_bytes(2) - saved_bytes(1))
