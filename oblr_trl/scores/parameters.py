"""Sketch of the parameters themselves: the difference of two is the sketch of what the optimizer did in between.

Sketches are linear, so `sketch(theta_new) - sketch(theta_old) = sketch(theta_new - theta_old)`, whose inner products with scores are
those of [`~scores.movement`]. Nothing is copied and nothing is run: every process projects the float32 entries that it holds, and
sketches add up.
"""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from oblr_trl.scores.score_pass import ScorePass


class LocalEntries(NamedTuple):
    """Entries of one parameter that this process holds, in the precision that the optimizer steps in."""

    values: Tensor  # (n,), consecutive entries of the flattened parameter
    start: int  # of the first one

    def share(self, index: int, num_copies: int) -> "LocalEntries":
        """The part of process `index` of all that hold the same entries."""
        size = -(-self.values.numel() // num_copies)
        return LocalEntries(self.values[index * size :][:size], self.start + index * size)


def local_entries(parameter: nn.Parameter) -> LocalEntries:
    """
    This process's part of a parameter: its shard of DeepSpeed's float32 master copy or of FSDP 2's parameter; where several processes
    hold the same entries (DDP) an equal share of them.

    Raises:
        `ValueError`: If the parameter is sharded in another way than along its first axis.
    """
    engine_parameter: Any = parameter
    if hasattr(parameter, "ds_id"):  # ZeRO-3: a flat shard, padded at the end
        shard = engine_parameter._z3_optimizer.get_local_fp32_param(parameter).flatten()
        start = dist.get_rank(engine_parameter.ds_process_group) * engine_parameter.ds_tensor.ds_numel
        return LocalEntries(shard[: max(engine_parameter.ds_numel - start, 0)], start)
    if hasattr(parameter, "_hp_mapping"):  # ZeRO-1, ZeRO-2: a fragment of the flattened group, or nothing
        mapping = engine_parameter._hp_mapping
        if mapping is None:
            return LocalEntries(torch.empty(0, device=parameter.device), 0)
        return LocalEntries(mapping.get_hp_fragment().flatten(), mapping.lp_fragment_address.start)
    if isinstance(engine_parameter, DTensor):
        return _of_dtensor(engine_parameter)
    entries = LocalEntries(parameter.detach().flatten(), 0)
    if dist.is_available() and dist.is_initialized():
        return entries.share(dist.get_rank(), dist.get_world_size())
    return entries


def _of_dtensor(parameter: DTensor) -> LocalEntries:
    """FSDP 2 gives process i of n the i-th of `torch.chunk`'s blocks of rows."""
    start, index, copies = 0, 0, 1
    for axis, placement in enumerate(parameter.placements):
        size, rank = parameter.device_mesh.size(axis), parameter.device_mesh.get_local_rank(axis)
        if placement.is_replicate():
            index, copies = index * size + rank, copies * size
        elif type(placement) is Shard and placement.dim == 0 and not start:
            rows = -(-parameter.size(0) // size)
            start = rank * rows * (parameter.numel() // parameter.size(0))
        else:
            raise ValueError(
                f"The trust region cannot read a parameter that is sharded as {parameter.placements}, only along its first "
                "axis, as FSDP 2 does. Use lr_adaptation='snr' or 'none'."
            )
    return LocalEntries(parameter.to_local().detach().flatten(), start).share(index, copies)


@torch.no_grad()
def local_parameter_sketch(score_pass: ScorePass, device: torch.device | None = None) -> Tensor:
    """
    This process's part of the sketch of the parameters in scope, one after another; the sum over processes is the sketch.

    In float64: an update is 1e-5 of the parameters, so that float32 would leave two digits of the difference of two sketches.

    Args:
        score_pass ([`~scores.score_pass.ScorePass`]): The pass whose projections are used.
        device (`torch.device`, *optional*):
            Where scores are computed, if parameters are not kept there (FSDP 2 with offloading). That of the output projection if not given.

    Returns:
        `torch.Tensor` of shape `(n,)`: In float64; at most k numbers for every matrix, and every entry of vectors and small matrices.
    """
    scoped = score_pass.scoped_parameters()
    parameters = dict(score_pass.model.named_parameters(remove_duplicate=False))
    projections = score_pass.projections(scoped, scoped.head.weight.device if device is None else device)
    projected = [
        projections.project_entries(name, *local_entries(parameters[name]), torch.float64) for name in scoped.shapes
    ]
    return torch.cat(projected)
