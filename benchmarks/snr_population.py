"""The problems of the task with their probabilities, the one completion of each that is rewarded, and a sketch of a gradient.

Differs from rollouts in that nothing is sampled but the problems, and of those so many that every one has its share.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from oblr_trl.scores.projections import Projections
from oblr_trl.scores.scopes import resolve_scope

_CHUNK_SIZE = 64


@dataclass
class Population:
    """
    Different problems.

    Args:
        prompts (`list[str]`): Prompts.
        answers (`list[str]`): The answer of each.
        shares (`torch.Tensor` of shape `(num_problems,)`): Their probabilities.
    """

    prompts: list[str]
    answers: list[str]
    shares: Tensor


def population(prompts: Sequence[str], answers: Sequence[str]) -> Population:
    """The population that a very large draw stands for: every problem with its share of the draw."""
    counts = Counter(zip(prompts, answers, strict=True))
    shares = torch.tensor(list(counts.values())) / len(prompts)
    return Population([prompt for prompt, _ in counts], [answer for _, answer in counts], shares)


def rewarded_chunks(
    tokenizer: PreTrainedTokenizerBase, problems: Population
) -> tuple[list[tuple[Tensor, Tensor, Tensor]], list[Tensor]]:
    """`input_ids`, `attention_mask` and `completion_mask` of prompt, answer and end of sequence, and shares, in chunks."""
    tokenizer.padding_side = "left"
    chunks, shares = [], []
    for rows in torch.arange(len(problems.prompts)).split(_CHUNK_SIZE):
        prompts = tokenizer([problems.prompts[row] for row in rows], return_tensors="pt", padding=True)
        answers = [tokenizer(problems.answers[row])["input_ids"] + [tokenizer.eos_token_id] for row in rows]
        width = max(map(len, answers))
        ids = torch.tensor([answer + [tokenizer.pad_token_id] * (width - len(answer)) for answer in answers])
        mask = torch.tensor([[1] * len(answer) + [0] * (width - len(answer)) for answer in answers])
        input_ids = torch.cat([prompts["input_ids"], ids], dim=1)
        chunks.append((input_ids, torch.cat([prompts["attention_mask"], mask], dim=1), mask))
        shares.append(problems.shares[rows])
    return chunks, shares


def sketched_gradient(model: Any, gradient: Tensor, *, sketch_dim: int, seed: int) -> Tensor:
    """
    The sketch, of shape `(sketch_dim,)`, of one gradient that is at hand in full, by the package's projections.

    Args:
        model ([`~transformers.PreTrainedModel`]): The policy, for names and shapes of its parameters.
        gradient (`torch.Tensor` of shape `(D,)`): The gradient, in the order of the parameters.
        sketch_dim (`int`): Length of the sketch.
        seed (`int`): Seed of the projections.
    """
    shapes = {name: tuple(part.shape) for name, part in model.named_parameters() if part.requires_grad}
    projections = Projections(
        shapes,
        tables=resolve_scope(model, "all", None).tables,
        sketch_dim=sketch_dim,
        seed=seed,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    total = projections.empty_sum(1)
    parts = gradient.float().split([torch.Size(shape).numel() for shape in shapes.values()])
    for (name, shape), part in zip(shapes.items(), parts, strict=True):
        matrix = part.view(shape)
        if len(shape) == 2:
            # Each axis is the last one of a tensor once: (C, R) to (C, r), then (r, C) to (r, c).
            projected = projections.project_rows(name, matrix.T.unsqueeze(0)).transpose(1, 2)
            projections.add_matrix(total, name, projections.project_columns(name, projected))
        else:
            projections.add_dense(total, name, part.unsqueeze(0))
    return projections.sketch(total)[0]
