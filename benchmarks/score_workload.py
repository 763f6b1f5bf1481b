"""The model, the micro-batch and the passes over it that `score_memory` and `gpu` measure.

Models are random, float32 on a CPU and bfloat16 on a GPU. The micro-batch has no padding, and the last three quarters of every
sequence are the completion.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig, Qwen3Config
from trl.trainer.utils import add_fused_lm_head

from oblr_trl.scores import ScoreOutput, ScorePass

CPU = torch.device("cpu")
COMPLETION_SHARE = 3 / 4
# TRL's trainer always asks for the entropy too.
_TRAINER_OUTPUTS = ("log_probs", "entropy")


@dataclass
class WorkloadArguments:
    """Settings that both benchmarks share; fields are documented by their `help`."""

    batch_size: int = field(default=8, metadata={"help": "Sequences of the micro-batch."})
    lora_r: int = field(default=16, metadata={"help": "Rank of the adapter on all linear layers."})
    sketch_dim: int = field(default=4096, metadata={"help": "Length of a sketch."})
    seed: int = field(default=0, metadata={"help": "Seed of weights, tokens and projections."})
    attention: str = field(
        default="sdpa",
        metadata={"help": "Implementation of attention.", "choices": ["sdpa", "eager", "flash_attention_2"]},
    )


class Case(NamedTuple):
    """Tokens per sequence, and whether an adapter is trained instead of all parameters, with gradient checkpointing."""

    sequence_length: int
    lora: bool = False
    checkpointing: bool = False


def scopes(last_k: int) -> dict[str, dict[str, Any]]:
    """Settings of a scoring pass for each scope."""
    return {"all": {}, "last_k": {"scope": "last_k", "last_k": last_k}, "lm_head": {"scope": "lm_head"}}


def qwen3_config(hidden_size: int, num_layers: int, vocab_size: int) -> Qwen3Config:
    """A Qwen3 with heads of 64, an MLP of 3 times the hidden size and tied embeddings."""
    num_heads = max(hidden_size // 64, 1)
    return Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=3 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=max(num_heads // 2, 1),
        head_dim=64,
        tie_word_embeddings=True,
    )


def build_model(config: PretrainedConfig, seed: int, device: torch.device, attention: str = "sdpa") -> Any:
    """A model of that shape with random weights, made on the device and in its dtype."""
    torch.manual_seed(seed)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with device:
        return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention).train()


class Workload:
    """
    A model and a micro-batch, and every pass over them by its name.

    Args:
        args ([`WorkloadArguments`]): Settings.
        config ([`~transformers.PretrainedConfig`]): Shape of the model.
        case ([`Case`]): What is trained, and how.
        scores (`dict[str, dict]`): Settings of the scoring passes by their names.
        device (`torch.device`, *optional*, defaults to the CPU): Where it runs.
    """

    def __init__(
        self,
        args: WorkloadArguments,
        config: PretrainedConfig,
        case: Case,
        scores: dict[str, dict[str, Any]],
        device: torch.device = CPU,
    ) -> None:
        model = self._decoder = build_model(config, args.seed, device, args.attention)
        if case.lora:
            adapter = LoraConfig(r=args.lora_r, target_modules="all-linear")
            model = get_peft_model(model, adapter, autocast_adapter_dtype=False)
        if case.checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            if case.lora:
                model.enable_input_require_grads()
        self.model = model
        size = (args.batch_size, case.sequence_length)
        generator = torch.Generator().manual_seed(args.seed)
        self.input_ids = torch.randint(0, config.vocab_size, size, generator=generator).to(device)
        common = {"sketch_dim": args.sketch_dim, "seed": args.seed}
        self._settings = {name: common | settings for name, settings in scores.items()}
        self._score_passes: dict[str, ScorePass] = {}
        self._passes: dict[str, Callable[[], object]] = {
            "train": self.train,
            "old_logps": self.old_logps,
            "per_sequence": self.per_sequence,
        }

    def run(self, name: str) -> object:
        """The pass of that name; what the caller would keep is returned."""
        return self._passes[name]() if name in self._passes else self.score(name)

    def score(self, name: str) -> ScoreOutput:
        """Our scoring pass with the settings of that name; its first run draws the projections."""
        if name not in self._score_passes:
            self._score_passes[name] = ScorePass(self.model, **self._settings[name])
        targets = self.input_ids[:, -_num_completion_tokens(self.input_ids) :]
        inputs = {"input_ids": self.input_ids, "attention_mask": torch.ones_like(self.input_ids)}
        return self._score_passes[name](inputs, targets, torch.ones(targets.shape, device=targets.device))

    def forget_projections(self) -> None:
        """Let the next run of every scoring pass draw its projections again."""
        self._score_passes.clear()

    def train(self) -> None:
        """A training step before the optimizer: forward and backward of TRL's loss."""
        self._objective(_TRAINER_OUTPUTS, self.input_ids).backward()

    @torch.no_grad()
    def old_logps(self) -> Tensor:
        """The old-log-prob forward, which a scoring pass may replace."""
        return self._objective(_TRAINER_OUTPUTS, self.input_ids)

    def per_sequence(self) -> list[Tensor]:
        """Squared norms by one forward and backward per sequence."""
        trainable = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        norms = []
        for row in self.input_ids.split(1):
            gradients = torch.autograd.grad(self._objective(("log_probs",), row), trainable)
            norms.append(torch.stack([gradient.float().square().sum() for gradient in gradients]).sum())
        return norms

    def _objective(self, outputs: tuple[str, ...], input_ids: Tensor) -> Tensor:
        """Summed log-probability of the completions by TRL's fused output projection."""
        num_tokens = _num_completion_tokens(input_ids)
        labels = input_ids.clone()
        labels[:, :-num_tokens] = -100
        inputs = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), "labels": labels}
        with _fused_head(self._decoder, outputs):
            log_probs = self.model(**inputs, fused_lm_head=True, use_cache=False).log_probs
        return log_probs[:, -num_tokens:].sum()


def _num_completion_tokens(input_ids: Tensor) -> int:
    return int(input_ids.size(1) * COMPLETION_SHARE)


@contextmanager
def _fused_head(model: Any, outputs: tuple[str, ...]) -> Iterator[None]:
    plain_forward = model.forward
    add_fused_lm_head(model, outputs=outputs)
    try:
        yield
    finally:
        model.forward = plain_forward
