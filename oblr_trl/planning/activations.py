"""What autograd keeps from forward to backward, counted tensor by tensor as transformers' decoder blocks save them.

The counts are exact for SDPA and eager execution on one micro-batch without fused kernels
(`tests/test_plan.py` compares them with what `torch.autograd.graph.saved_tensors_hooks` sees); what a kernel needs while it
runs is an estimate and bears the name transient.

Letters: d hidden features, q query features, k key features (all heads together), i features of the MLP, e bytes of an
activation, T sequence length.
"""

from oblr_trl.planning.setup import Setup

# Tokens x vocabulary of TRL's fused output projection (`trl.kernels.chunked_logprob`, `trl.trainer.utils`).
TRL_TOKEN_TILE, TRL_VOCAB_TILE = 4096, 32768
# The same of the scoring pass (`oblr_trl.scores.head`).
SCORE_TOKEN_TILE, SCORE_VOCAB_TILE = 1024, 8192
_FLOAT32 = 4


def block_bytes_per_token(setup: Setup, *, scoring: bool = False) -> int:
    """
    Bytes that one block keeps of one token.

    Args:
        setup ([`Setup`]): The plan's input.
        scoring (`bool`, *optional*, defaults to `False`):
            For the scoring pass: parameters are frozen, and identity taps keep the inputs of the layers in scope.
    """
    shape, e = setup.shape, setup.compute_bytes
    d, i = shape.hidden_size, shape.intermediate_size
    # Two norms: their float32 input and the reciprocal root.
    total = 2 * (_FLOAT32 * d + _FLOAT32)
    total += _head_norms(setup, scoring)
    total += _attention(setup)
    total += 3 * e * i  # gate, its activation, up
    if setup.adapter is None:
        total += _residual_bytes(setup) * 2 * d  # normalised for the scale's gradient, or kept by a tap
        if scoring and _residual_bytes(setup) == _FLOAT32:
            total -= _FLOAT32 * 2 * d  # that tap's input is the float32 input counted above
        total += _linear_inputs(setup, scoring) * d + e * i
    else:
        total += _adapter_inputs(setup, scoring)
    return total


def _head_norms(setup: Setup, scoring: bool) -> int:
    shape = setup.shape
    if shape.model_type != "qwen3":
        return 0
    total = 0
    for features, heads in ((shape.query_size, shape.num_heads), (shape.kv_size, shape.num_kv_heads)):
        total += _FLOAT32 * features + _FLOAT32 * heads
        if setup.adapter is None and not (scoring and setup.compute_bytes == _FLOAT32):
            total += setup.compute_bytes * features
    return total


def _attention(setup: Setup) -> int:
    shape, e = setup.shape, setup.compute_bytes
    keys = shape.query_size if setup.masked_attention else shape.kv_size  # a mask makes SDPA repeat keys and values
    total = 2 * e * shape.query_size + 2 * e * keys + _FLOAT32 * shape.num_heads
    return total + (e * setup.sequence_length if setup.masked_attention else 0)


def _linear_inputs(setup: Setup, scoring: bool) -> int:
    """Bytes, over d, of the normalised hidden states that the linear layers keep: one tensor per norm, as the norm gives it;
    in training under autocast, one copy per layer in bfloat16."""
    if setup.autocasts and _residual_bytes(setup) == _FLOAT32 and not scoring:
        return 5 * setup.compute_bytes
    return 2 * _residual_bytes(setup)


def _residual_bytes(setup: Setup) -> int:
    """Bytes of a number of the residual stream: autocast leaves norms and sums in the parameters' dtype."""
    return setup.held_bytes if setup.autocasts else setup.compute_bytes


def _adapter_inputs(setup: Setup, scoring: bool) -> int:
    """Inputs of the adapters' two matrices. PEFT casts to the adapter's dtype and autocast inside of the layer to its own: a
    tap sees the tensor between the two, autograd the last one. Where nothing is cast, layers share their input."""
    assert setup.adapter is not None
    e, targets = setup.compute_bytes, setup.adapter.target_layers
    stored = e if setup.autocasts and not scoring else setup.trainable_bytes
    total = (e if setup.autocasts else setup.trainable_bytes) * setup.adapter.rank * len(targets)

    stream = _residual_bytes(setup)
    casts = setup.trainable_bytes != stream or (setup.autocasts and not scoring and stream != e)
    for layers in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")):
        num_inputs = sum(name in targets for name in layers)
        total += (num_inputs if casts else min(num_inputs, 1)) * stored * setup.shape.hidden_size

    casts = setup.trainable_bytes != e
    total += stored * setup.shape.query_size * ("o_proj" in targets and casts)  # else counted with the attention
    return total + stored * setup.shape.intermediate_size * ("down_proj" in targets)


def kept_bytes(setup: Setup, *, scoring: bool = False) -> int:
    """Bytes that all blocks keep of one micro-batch at the end of its forward pass; with checkpointing, their inputs."""
    num_blocks = setup.shape.num_layers
    if scoring:
        assert setup.scoring is not None
        num_blocks = {"all": num_blocks, "lm_head": 0}.get(setup.scoring.scope, setup.scoring.last_k or 0)
    per_token = block_bytes_per_token(setup, scoring=scoring)
    if setup.checkpointing:
        per_token = _residual_bytes(setup) * setup.shape.hidden_size
    return setup.num_tokens * per_token * num_blocks


def working_bytes(setup: Setup, *, scoring: bool = False) -> int:
    """Bytes that a block's backward pass needs beside what is kept: gradients of activations, about four of the MLP's width
    and two of the stream's, and with checkpointing the inside of the block."""
    e, shape = setup.compute_bytes, setup.shape
    gradients = setup.num_tokens * (4 * e * shape.intermediate_size + 2 * _FLOAT32 * shape.hidden_size)
    inside = setup.num_tokens * block_bytes_per_token(setup, scoring=scoring) if setup.checkpointing else 0
    return gradients + inside


def head_bytes(setup: Setup) -> int:
    """
    TRL's fused output projection in its backward pass: a tile of logits, the float32 gradients of hidden states and weight,
    and the weight's gradient once more in its own dtype.
    """
    shape, e = setup.shape, setup.compute_bytes
    positions = setup.schedule.micro_batch * setup.completion_length
    tile = min(positions, TRL_TOKEN_TILE) * min(shape.vocab_size, TRL_VOCAB_TILE) * e
    total = tile + positions * shape.hidden_size * (_FLOAT32 + e)
    if setup.adapter is None:
        total += shape.vocab_size * shape.hidden_size * (_FLOAT32 + setup.held_bytes)
    return total


def score_head_bytes(setup: Setup, row_width: int) -> int:
    """The scoring pass's sweep over the vocabulary: tiles of logits and probabilities, those of the tile before not yet
    freed; sums of weights and of projections."""
    shape, e = setup.shape, setup.compute_bytes
    positions = setup.schedule.micro_batch * setup.completion_length
    cells = min(positions, SCORE_TOKEN_TILE) * min(shape.vocab_size, SCORE_VOCAB_TILE)
    num_tiles = 1 if shape.vocab_size <= SCORE_VOCAB_TILE else 2
    tile = cells * num_tiles * (_FLOAT32 if e == _FLOAT32 else e + _FLOAT32)
    signed_projection = shape.vocab_size * row_width * _FLOAT32
    needs_hidden = setup.scoring is not None and setup.scoring.scope != "lm_head"
    return tile + signed_projection + positions * (e + _FLOAT32 * needs_hidden) * shape.hidden_size
