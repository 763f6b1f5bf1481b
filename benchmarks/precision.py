"""Squared score norms and rho in training precision against float64, on policies of ever lower entropy.

    python -m benchmarks.precision

One tiny Qwen3 learns to count in sevens, its last norm is scaled until 1 - p reaches each of `OTHER_PROBS`, and every
completion is the likeliest one. Numbers are relative to a float64 model with the same (rounded) weights and the same
seed: the median of the squared norms over completions, and rho where every completion is to become likelier. About 20
s on a CPU.
"""

import copy
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM
from trl import TrlParser

from benchmarks.record import machine, write_record
from benchmarks.sections.precision import markdown
from oblr_trl.gradient_snr import gradient_moments, rho
from oblr_trl.scores import ScorePass

# Mean 1 - p of the completions' tokens.
OTHER_PROBS = (3e-2, 1.5e-2, 4.8e-3, 1.5e-3, 4.2e-4)
# Dtype of the weights, of autocast, and of the output projection.
PRECISIONS: dict[str, tuple[torch.dtype, torch.dtype | None, torch.dtype | None]] = {
    "bf16 autocast": (torch.float32, torch.bfloat16, None),
    "bf16 model": (torch.bfloat16, None, None),
    "fp16 model": (torch.float16, None, None),
    "bf16 autocast, fp32 head": (torch.float32, torch.bfloat16, torch.float32),
    "bf16 model, fp32 head": (torch.bfloat16, None, torch.float32),
}
SCOPES: dict[str, int | None] = {"all": None, "last_k": 1, "lm_head": None}
_VOCAB_SIZE, _NUM_PROMPT_TOKENS, _NUM_TOKENS, _BATCH_SIZE = 97, 4, 16, 32


@dataclass
class PrecisionArguments:
    """Settings of the benchmark; fields are documented by their `help`."""

    seed: int = field(default=0, metadata={"help": "Seed of weights and training."})
    output: str = field(default="benchmarks/results/precision.json", metadata={"help": "Where the numbers go."})


def sequences(batch_size: int, generator: torch.Generator) -> Tensor:
    """Numbers seven apart, modulo the vocabulary, of shape `(B, L)`."""
    starts = torch.randint(0, _VOCAB_SIZE, (batch_size, 1), generator=generator)
    return (starts + 7 * torch.arange(_NUM_TOKENS)) % _VOCAB_SIZE


def log_probs(model: Qwen3ForCausalLM, tokens: Tensor) -> Tensor:
    """Log-probabilities of the completions, of shape `(B, C)`."""
    logits = model(input_ids=tokens).logits[:, _NUM_PROMPT_TOKENS - 1 : -1]
    return logits.log_softmax(-1).gather(-1, tokens[:, _NUM_PROMPT_TOKENS:, None]).squeeze(-1)


def trained_policy(seed: int) -> Qwen3ForCausalLM:
    """A policy with a mean 1 - p of about 4e-2."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "head_dim": 32}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}
    model = Qwen3ForCausalLM(Qwen3Config(vocab_size=_VOCAB_SIZE, initializer_range=0.1, **sizes, **heads))
    with torch.no_grad():  # rows that share a direction, as those of pretrained models do
        model.model.embed_tokens.weight.add_(0.1 * torch.randn(model.config.hidden_size))
    optimizer, generator = torch.optim.AdamW(model.parameters(), lr=5e-4), torch.Generator().manual_seed(seed)
    for _ in range(60):
        optimizer.zero_grad()
        log_probs(model, sequences(64, generator)).mean().neg().backward()
        optimizer.step()
    return model.eval()


@torch.no_grad()
def sharpened(model: Qwen3ForCausalLM, tokens: Tensor, other_prob: float) -> Qwen3ForCausalLM:
    """A copy of the policy whose logits are scaled until the mean 1 - p is `other_prob`."""
    low, high = 0.25, 8.0
    for _ in range(25):
        scaled, scale = copy.deepcopy(model), (low * high) ** 0.5
        scaled.model.norm.weight.mul_(scale)
        low, high = (scale, high) if log_probs(scaled, tokens).expm1().mean() < -other_prob else (low, scale)
    return scaled


def quantities(model: Qwen3ForCausalLM, tokens: Tensor, precision: str | None, scope: str) -> dict[str, Tensor]:
    """Squared norms by method, and rho; in one of [`PRECISIONS`], or as the model is."""
    _, autocast, head = PRECISIONS[precision] if precision else (None, None, None)
    score_pass = ScorePass(model, scope=scope, last_k=SCOPES[scope], methods=("sketch", "exact"), head_dtype=head)
    targets = tokens[:, _NUM_PROMPT_TOKENS:]
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    with torch.autocast("cpu", dtype=autocast) if autocast else nullcontext():
        output = score_pass(inputs, targets, torch.ones(targets.shape))
    assert output.sketches is not None
    assert output.squared_norms is not None
    ratio = rho(*gradient_moments(output.sketches), num_prompts=_BATCH_SIZE)
    return {"sketch": output.sketches.square().sum(1), "exact": output.squared_norms, "rho": torch.tensor([ratio])}


def measure(seed: int) -> list[dict[str, Any]]:
    """One row per precision, scope and quantity, with a ratio for each of [`OTHER_PROBS`]."""
    tokens = sequences(_BATCH_SIZE, torch.Generator().manual_seed(seed + 1))
    rows: dict[tuple[str, str, str], list[float]] = {}
    trained = trained_policy(seed)
    for policy in [sharpened(trained, tokens, other_prob) for other_prob in OTHER_PROBS]:
        for precision, (dtype, _, _) in PRECISIONS.items():
            model = copy.deepcopy(policy).to(dtype)
            for scope in SCOPES:
                truth = quantities(copy.deepcopy(model).double(), tokens, None, scope)
                for name, values in quantities(model, tokens, precision, scope).items():
                    rows.setdefault((precision, scope, name), []).append((values / truth[name]).median().item())
    return [{"precision": p, "scope": s, "quantity": q, "ratios": ratios} for (p, s, q), ratios in rows.items()]


def main(args: PrecisionArguments) -> None:
    """Measure, print and write."""
    started = machine()
    rows = measure(args.seed)
    record = {"other_probs": OTHER_PROBS, "rows": rows}
    print(markdown(record | {"settings": vars(args)}))
    write_record(args.output, args, started, record)


if __name__ == "__main__":
    (arguments,) = TrlParser([PrecisionArguments]).parse_args_and_config()
    main(arguments)
