"""An untrained policy in place of the studies' own, rewarded for a property that its answers do have."""

import torch

from benchmarks import policies
from examples.tiny_qwen3.model import build_model, build_tokenizer


def save_tiny_policy(directory, *, num_layers=1, vocab_size=192):
    """An untrained model and its tokenizer."""
    torch.manual_seed(0)
    tokenizer = build_tokenizer(
        ["State the final answer to the following arithmetic problem: 6 + 2 + 0 ="], vocab_size=vocab_size
    )
    for part in (build_model(tokenizer, hidden_size=64, num_hidden_layers=num_layers), tokenizer):
        part.save_pretrained(directory)


def length_parity(completions, **kwargs):
    """Reward of an odd number of characters."""
    return [float(len(text) % 2) for text in completions]


def install_tiny_policy(monkeypatch, root, **sizes):
    """Make `tiny` the name of such a policy, below `root`."""
    save_tiny_policy(root / "tiny", **sizes)
    monkeypatch.setitem(policies.POLICIES, "tiny", policies.Policy("chain_sum", 0.3))
    monkeypatch.setattr(policies, "_ROOT", root)
    monkeypatch.setattr(policies, "make_start_model", lambda arguments: None)
    monkeypatch.setattr(policies, "task_reward", lambda task, params: length_parity)
