"""Bytes of an optimizer's states: how many numbers it keeps per parameter, and in which precision."""

import math
from collections.abc import Iterable

# Numbers kept per parameter, in the parameter's dtype, by what the name in `optim` begins with.
_STATES = {"adamw": 2, "adam": 2, "ademamix": 3, "sgd": 0, "lion": 1, "rmsprop": 1, "adagrad": 1}
# bitsandbytes: blocks of 256 share a float32 scale; smaller tensors and embeddings keep float32 states.
_BLOCK, _LEAST_NUMEL = 256, 4096


def is_known_optimizer(name: str) -> bool:
    """Whether the states of the optimizer are counted; any other is taken for AdamW."""
    return name.startswith("adafactor") or _prefix(name) is not None


def _prefix(name: str) -> str | None:
    return next((prefix for prefix in _STATES if name == prefix or name.startswith(f"{prefix}_")), None)


def num_states(name: str, *, momentum: bool) -> int:
    """Numbers per parameter; for an unknown optimizer, AdamW's two."""
    prefix = _prefix(name.removeprefix("paged_"))
    if prefix in ("sgd", "rmsprop"):
        return _STATES[prefix] + momentum
    return _STATES[prefix] if prefix is not None else 2


def state_bytes(
    shapes: Iterable[tuple[str, tuple[int, ...]]], name: str, *, parameter_bytes: int, momentum: bool = False
) -> int:
    """Bytes of all states, beside a step counter of 4 bytes a tensor."""
    states = num_states(name, momentum=momentum)
    if name.startswith("adafactor"):
        return sum(4 * (sum(sizes) if len(sizes) == 2 else math.prod(sizes)) for _, sizes in shapes)
    if "8bit" not in name:
        return sum(math.prod(sizes) for _, sizes in shapes) * states * parameter_bytes
    total = 0
    for parameter, sizes in shapes:
        numel = math.prod(sizes)
        if numel < _LEAST_NUMEL or "embed_tokens" in parameter:
            total += 4 * states * numel
        else:
            total += states * (numel + 4 * math.ceil(numel / _BLOCK))
    return total
