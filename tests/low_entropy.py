"""Policies of ever lower entropy, and their squared score norms and rho in training precision."""

import copy
from contextlib import nullcontext

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from oblr_trl.gradient_snr import gradient_moments, rho
from oblr_trl.scores import ScorePass

# Dtype of the weights, of autocast, and of the output projection.
PRECISIONS = {
    "bf16 autocast": (torch.float32, torch.bfloat16, None),
    "bf16 model": (torch.bfloat16, None, None),
    "fp16 model": (torch.float16, None, None),
    "bf16 autocast, fp32 head": (torch.float32, torch.bfloat16, torch.float32),
    "bf16 model, fp32 head": (torch.bfloat16, None, torch.float32),
}
SCOPES = {"all": None, "last_k": 1, "lm_head": None}
VOCAB_SIZE, NUM_PROMPT_TOKENS, NUM_TOKENS, BATCH_SIZE = 97, 4, 16, 32


def sequences(batch_size, generator):
    """Numbers seven apart, modulo the vocabulary, of shape `(B, L)`."""
    starts = torch.randint(0, VOCAB_SIZE, (batch_size, 1), generator=generator)
    return (starts + 7 * torch.arange(NUM_TOKENS)) % VOCAB_SIZE


def log_probs(model, tokens):
    """Log-probabilities of the completions, of shape `(B, C)`."""
    logits = model(input_ids=tokens).logits[:, NUM_PROMPT_TOKENS - 1 : -1]
    return logits.log_softmax(-1).gather(-1, tokens[:, NUM_PROMPT_TOKENS:, None]).squeeze(-1)


def trained_policy(seed):
    """A policy that has learnt to count in sevens, with a mean 1 - p of about 4e-2."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "head_dim": 32}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}
    model = Qwen3ForCausalLM(Qwen3Config(vocab_size=VOCAB_SIZE, initializer_range=0.1, **sizes, **heads))
    with torch.no_grad():  # rows that share a direction, as those of pretrained models do
        model.model.embed_tokens.weight.add_(0.1 * torch.randn(model.config.hidden_size))
    optimizer, generator = torch.optim.AdamW(model.parameters(), lr=5e-4), torch.Generator().manual_seed(seed)
    for _ in range(60):
        optimizer.zero_grad()
        log_probs(model, sequences(64, generator)).mean().neg().backward()
        optimizer.step()
    return model.eval()


@torch.no_grad()
def sharpened(model, tokens, other_prob):
    """A copy of the policy whose logits are scaled until the mean 1 - p is `other_prob`."""
    low, high = 0.25, 8.0
    for _ in range(25):
        scaled, scale = copy.deepcopy(model), (low * high) ** 0.5
        scaled.model.norm.weight.mul_(scale)
        low, high = (scale, high) if log_probs(scaled, tokens).expm1().mean() < -other_prob else (low, scale)
    return scaled


def quantities(model, tokens, precision, scope):
    """Squared norms by method, and rho; in one of [`PRECISIONS`], or as the model is."""
    _, autocast, head = PRECISIONS[precision] if precision else (None, None, None)
    score_pass = ScorePass(model, scope=scope, last_k=SCOPES[scope], methods=("sketch", "exact"), head_dtype=head)
    targets = tokens[:, NUM_PROMPT_TOKENS:]
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    with torch.autocast("cpu", dtype=autocast) if autocast else nullcontext():
        output = score_pass(inputs, targets, torch.ones(targets.shape))
    ratio = rho(*gradient_moments(output.sketches), num_prompts=BATCH_SIZE)
    return {"sketch": output.sketches.square().sum(1), "exact": output.squared_norms, "rho": torch.tensor([ratio])}
