"""How a run is spread over GPUs, read from the file of `accelerate launch --config_file`."""

from dataclasses import dataclass

from oblr_trl.data.recipe_files import read_recipe_file


@dataclass(frozen=True)
class Backend:
    """How the model is spread over processes, one GPU each."""

    kind: str  # "one process", "DDP", "ZeRO-1", "ZeRO-2", "ZeRO-3" or "FSDP 2"
    num_processes: int
    mixed_bf16: bool  # `mixed_precision`
    offloads_optimizer: bool = False  # to main memory
    offloads_parameters: bool = False
    reshards: bool = True  # whether FSDP 2 frees gathered parameters before the backward pass

    @property
    def is_deepspeed(self) -> bool:
        """Whether DeepSpeed's engine holds the model."""
        return self.kind.startswith("ZeRO")


def read_backend(path: str | None, *, num_gpus: int | None = None) -> Backend:
    """
    The backend of a launch.

    Args:
        path (`str`, *optional*): The YAML file; without one, a single GPU, or DDP if `num_gpus` is larger.
        num_gpus (`int`, *optional*): Number of GPUs in place of the file's `num_processes`.

    Raises:
        `ValueError`: For a file that cannot be read or a backend that is not covered.
    """
    config = {} if path is None else read_recipe_file(path, flag="--accelerate_config")
    processes = num_gpus or int(config.get("num_processes", 1))
    mixed = config.get("mixed_precision") == "bf16"
    deepspeed, fsdp = config.get("deepspeed_config", {}), config.get("fsdp_config", {})
    match str(config.get("distributed_type", "NO")):
        case "NO" | "False" | "MULTI_GPU":  # YAML reads a bare NO as a boolean
            return Backend("DDP" if processes > 1 else "one process", processes, mixed)
        case "DEEPSPEED":
            stage = deepspeed.get("zero_stage", 2)  # accelerate's default
            if "deepspeed_config_file" in deepspeed or stage not in (1, 2, 3):
                raise ValueError(
                    f"{path}: the planner covers ZeRO stages 1, 2 and 3: write zero_stage and the offload devices into this file, "
                    "without a deepspeed_config_file."
                )
            optimizer = deepspeed.get("offload_optimizer_device", "none") != "none"
            parameters = stage == 3 and deepspeed.get("offload_param_device", "none") != "none"
            return Backend(f"ZeRO-{stage}", processes, mixed, optimizer, parameters)
        case "FSDP":
            if fsdp.get("fsdp_version", 1) != 2:
                raise ValueError(
                    f"{path}: the planner covers FSDP 2 alone, as the scoring pass does: set fsdp_version: 2."
                )
            offloads = fsdp.get("fsdp_offload_params", False)
            return Backend(
                "FSDP 2", processes, mixed, offloads, offloads, fsdp.get("fsdp_reshard_after_forward", True)
            )
        case kind:
            raise ValueError(
                f"{path}: the planner knows NO, MULTI_GPU, DEEPSPEED and FSDP, got distributed_type {kind!r}."
            )
