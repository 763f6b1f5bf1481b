"""Records what a trainer computes from its generation batches, and plants faults that a test wants to see handled."""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from accelerate.utils import is_peft_model
from trl import GRPOTrainer
from trl.generation.vllm_generation import VLLMGeneration

from oblr_trl import OBLRPOTrainer, adaptive_rate
from oblr_trl.baselines import BaselineEstimator, WeightsChoice

BATCH_KEYS = (
    "prompt_ids",
    "prompt_mask",
    "completion_ids",
    "completion_mask",
    "old_per_token_logps",
    "sampling_per_token_logps",
    "importance_sampling_ratio",
)


class Probe:
    """
    Writes `rank-R.jsonl` (one line for each generation) and, from one process, `step-S.pt` (the batch, the scores that were
    used, and the weights of a model that is not partitioned).
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.weights: torch.Tensor | None = None  # squared score norms of the baseline, (N, G)
        self.sketches: torch.Tensor | None = None  # what the SNR sees, (N, G, k)

    def generate_and_score(self, original: Callable, trainer: Any, inputs: Any) -> Any:
        self.weights = self.sketches = None
        with counted_calls(decoder(trainer)) as calls:
            output = original(trainer, inputs)
        num_forwards = len(calls)
        accelerator = trainer.accelerator
        parameters = list(trainer.model.parameters())
        row = {
            "step": trainer.state.global_step,
            "num_processes": accelerator.num_processes,
            "zero_stage": accelerator.state.deepspeed_plugin.zero_stage if trainer.is_deepspeed_enabled else None,
            "num_elements": sum(getattr(p, "ds_numel", p.numel()) for p in parameters),
            "num_local_elements": sum(
                p.ds_tensor.numel() if hasattr(p, "ds_tensor") else p.numel() for p in parameters
            ),
            "num_forwards": num_forwards,
            "num_chunks": -(-output["prompt_ids"].size(0) // trainer.args.per_device_train_batch_size),
            "largest_logp_error": largest_logp_error(trainer, output),
            "fixed_logps": fixed_logps(trainer),
        }
        self.directory.mkdir(parents=True, exist_ok=True)
        with open(self.directory / f"rank-{accelerator.process_index}.jsonl", "a") as f:
            f.write(json.dumps(row) + "\n")
        if accelerator.num_processes == 1:
            batch = {key: output[key] for key in BATCH_KEYS if key in output}
            model = {key: value.clone() for key, value in trainer.model.state_dict().items()}
            used = {"weights": self.weights, "sketches": self.sketches, "model": model}
            torch.save(batch | used, self.directory / f"step-{trainer.state.global_step}.pt")
        return output

    def baselines(self, original: Callable, estimator: Any, batch: Any) -> Any:
        if self.weights is None:  # of the batch: afterwards others are compared with them
            self.weights = batch.weights
        return original(estimator, batch)

    def per_prompt_gradients(self, original: Callable, sketches: torch.Tensor, advantages: torch.Tensor) -> Any:
        self.sketches = sketches
        return original(sketches, advantages)


def record_end(directory: Path) -> None:
    """What the training script left behind."""
    end = {"process_group": torch.distributed.is_initialized()}
    (directory / f"end-{os.environ.get('RANK', '0')}.json").write_text(json.dumps(end))


def decoder(trainer: Any) -> torch.nn.Module:
    model = trainer.model
    return (model.get_base_model() if is_peft_model(model) else model).get_decoder()


@contextmanager
def counted_calls(module: torch.nn.Module) -> Iterator[list[None]]:
    calls: list[None] = []
    handle = module.register_forward_hook(lambda *args: calls.append(None))
    try:
        yield calls
    finally:
        handle.remove()


@torch.no_grad()
def largest_logp_error(trainer: Any, output: dict[str, Any]) -> float:
    """Largest distance, over the loss's tokens, between the old log-probabilities in use and those that TRL computes."""
    mask = output["completion_mask"] * output.get("tool_mask", 1)
    expected, _, _ = GRPOTrainer._get_per_token_logps_and_entropies(
        trainer,
        trainer.model,
        torch.cat([output["prompt_ids"], output["completion_ids"]], dim=1),
        torch.cat([output["prompt_mask"], output["completion_mask"]], dim=1),
        output["completion_ids"].size(1),
    )
    return ((output["old_per_token_logps"] - expected) * mask).abs().max().item()


@torch.no_grad()
def fixed_logps(trainer: Any) -> list[float]:
    """Log-probabilities of the same tokens at every step: they move as the weights do."""
    ids = torch.arange(2, 14, device=trainer.accelerator.device).unsqueeze(0)
    logps, _, _ = GRPOTrainer._get_per_token_logps_and_entropies(
        trainer, trainer.model, ids, torch.ones_like(ids), ids.size(1) - 1
    )
    return logps.squeeze(0).tolist()


def shift_logprobs(scale: float) -> Callable:
    """A sampler that disagrees with the model by up to `scale` nats on every token, reproducibly."""
    generator = torch.Generator().manual_seed(0)

    def generate(original: Callable, engine: Any, *args: Any, **kwargs: Any) -> Any:
        prompt_ids, completion_ids, logprobs, token_ids = original(engine, *args, **kwargs)
        shifted = [
            [[value + scale * float(2 * torch.rand((), generator=generator) - 1) for value in token] for token in row]
            for row in logprobs
        ]
        return prompt_ids, completion_ids, shifted, token_ids

    return generate


def load_once() -> Callable:
    """A weight sync that works for the start model and never again."""
    loaded: list[None] = []

    def sync_weights(original: Callable, engine: Any) -> None:
        if not loaded:
            original(engine)
        loaded.append(None)

    return sync_weights


@contextmanager
def installed(directory: Path, *, sync: bool = True, shift: float = 0.0, weights: str = "") -> Iterator[None]:
    """Record into `directory`. Without `sync` the engine keeps the start model; with `shift` its log-probabilities are off; `weights` are
    what is chosen for the baseline after the first batch."""
    probe = Probe(directory)

    def around(owner: Any, name: str, wrapper: Callable) -> Any:
        original = getattr(owner, name)
        return mock.patch.object(owner, name, lambda *args, **kwargs: wrapper(original, *args, **kwargs))

    with ExitStack() as stack:
        stack.enter_context(around(OBLRPOTrainer, "_generate_and_score_completions", probe.generate_and_score))
        stack.enter_context(around(BaselineEstimator, "__call__", probe.baselines))
        stack.enter_context(around(adaptive_rate, "per_prompt_gradients", probe.per_prompt_gradients))
        if shift:
            stack.enter_context(around(VLLMGeneration, "generate", shift_logprobs(shift)))
        if weights:
            stack.enter_context(mock.patch.dict(WeightsChoice.__init__.__kwdefaults__, warm_up=1))
            stack.enter_context(mock.patch.object(WeightsChoice, "_cheapest", return_value=weights))
        if not sync:
            stack.enter_context(around(VLLMGeneration, "sync_weights", load_once()))
        yield
