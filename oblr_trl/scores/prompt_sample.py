"""A sample of the prompts of a generation batch, for what needs no score of every completion."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

_SHARE = 0.25


@dataclass(frozen=True)
class PromptSample:
    """Evenly spaced prompts of a generation batch, the same ones however many processes hold its rows."""

    groups: Tensor  # (n,), indices of the sampled prompts
    rows: Tensor  # (m,), rows of this process that are scored: those of sampled prompts, and others until all processes have m
    gathered: Tensor  # (n G,), where the rows of sampled prompts are among the gathered `rows` of all processes


def sample_prompts(
    num_prompts: int, num_generations: int, *, at_least: int, process_index: int, num_processes: int
) -> PromptSample | None:
    """A quarter of `num_prompts` prompts, of `num_generations` completions each, and `at_least` so many; `None` where these are all."""
    size = max(math.ceil(_SHARE * num_prompts), min(at_least, num_prompts))
    if size >= num_prompts:
        return None
    groups = torch.arange(size) * num_prompts // size
    sampled = torch.zeros(num_prompts, dtype=torch.bool)
    sampled[groups] = True
    by_process = sampled.repeat_interleave(num_generations).view(num_processes, -1)
    most = int(by_process.sum(dim=1).max())
    rows = by_process.int().argsort(dim=1, descending=True, stable=True)[:, :most].sort(dim=1).values
    return PromptSample(groups, rows[process_index], by_process.gather(1, rows).flatten().nonzero().squeeze(1))
