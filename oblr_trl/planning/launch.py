"""Reads how a run is spread over GPUs from the file that `accelerate launch --config_file` takes."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

BACKENDS = {
    "none": "one process",
    "ddp": "DDP",
    "zero1": "ZeRO-1",
    "zero2": "ZeRO-2",
    "zero3": "ZeRO-3",
    "fsdp2": "FSDP 2",
}


@dataclass(frozen=True)
class Backend:
    """
    How the model is spread over processes.

    Args:
        kind (`str`): One of `BACKENDS`.
        num_processes (`int`): Processes, one GPU each.
        mixed_bf16 (`bool`): Whether it computes in bfloat16 whatever the parameters are kept in.
        offloads_optimizer (`bool`, *optional*, defaults to `False`): Whether optimizer states live in main memory.
        offloads_parameters (`bool`, *optional*, defaults to `False`): Whether parameters do.
        reshards (`bool`, *optional*, defaults to `True`): Whether FSDP 2 frees gathered parameters before the backward pass.
    """

    kind: str
    num_processes: int
    mixed_bf16: bool
    offloads_optimizer: bool = False
    offloads_parameters: bool = False
    reshards: bool = True

    @property
    def is_deepspeed(self) -> bool:
        """Whether DeepSpeed's engine holds the model."""
        return self.kind.startswith("zero")


def read_backend(path: str | None, *, num_gpus: int | None, bf16: bool) -> Backend:
    """
    The backend of a launch.

    Args:
        path (`str`, *optional*): The YAML file; without one, a single GPU, or DDP if `num_gpus` is larger.
        num_gpus (`int`, *optional*): Number of GPUs in place of the file's `num_processes`.
        bf16 (`bool`): Whether the recipe asks for bfloat16; the file's `mixed_precision` can too.

    Raises:
        `ValueError`: For a file that cannot be read or a backend that is not covered.
    """
    config = {} if path is None else _read_yaml(path)
    processes = num_gpus or int(config.get("num_processes", 1))
    mixed = bf16 or config.get("mixed_precision") == "bf16"
    kind = str(config.get("distributed_type", "NO"))
    match kind:
        case "NO" | "False" | "MULTI_GPU":  # YAML reads a bare NO as a boolean
            return Backend("ddp" if processes > 1 else "none", processes, mixed)
        case "DEEPSPEED":
            assert path is not None
            return _deepspeed(config.get("deepspeed_config", {}), Path(path).parent, processes, mixed)
        case "FSDP":
            return _fsdp(config.get("fsdp_config", {}), processes, mixed)
    raise ValueError(
        f"{path}: distributed_type {kind!r} is not covered by the planner; it knows NO, MULTI_GPU, DEEPSPEED and FSDP."
    )


def _read_yaml(path: str) -> dict[str, Any]:
    if not Path(path).is_file():
        raise ValueError(f"`--accelerate_config` names {path!r}, but there is no such file.")
    try:
        config = yaml.safe_load(Path(path).read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {error}.") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} must hold `key: value` lines, got {type(config).__name__}.")
    return config


def _deepspeed(settings: Mapping[str, Any], folder: Path, processes: int, mixed: bool) -> Backend:
    file = settings.get("deepspeed_config_file")
    if file is None:
        stage = settings.get("zero_stage", 2)  # accelerate's default
        optimizer, parameters = (settings.get(f"offload_{name}_device", "none") for name in ("optimizer", "param"))
    else:
        found = next((path for path in (Path(file), folder / file) if path.is_file()), None)
        if found is None:
            raise ValueError(f"deepspeed_config_file names {file!r}, but there is no such file.")
        zero = json.loads(found.read_text()).get("zero_optimization", {})
        stage = zero.get("stage", 0)
        optimizer, parameters = (
            zero.get(f"offload_{name}", {}).get("device", "none") for name in ("optimizer", "param")
        )
    if stage not in (1, 2, 3):
        raise ValueError(f"The planner covers ZeRO stages 1, 2 and 3, got {stage!r}.")
    offloaded = ("cpu", "nvme")
    return Backend(f"zero{stage}", processes, mixed, optimizer in offloaded, stage == 3 and parameters in offloaded)


def _fsdp(settings: Mapping[str, Any], processes: int, mixed: bool) -> Backend:
    if settings.get("fsdp_version", 1) != 2:
        raise ValueError("The planner covers FSDP 2 alone, as the scoring pass does: set fsdp_version: 2.")
    offloads = bool(settings.get("fsdp_offload_params", False))
    reshards = bool(settings.get("fsdp_reshard_after_forward", True))
    return Backend("fsdp2", processes, mixed, offloads, offloads, reshards)
