"""Rollouts with score sketches, each different completion of a prompt scored once: equal completions have equal scores.

Shapes: P prompts, G completions per prompt, U different sequences, k numbers of a sketch.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.completion_pool import Completions, sample_completions
from oblr_trl.scores import score_sketches

_MICRO_BATCH_SIZE = 128


@dataclass
class Rollouts:
    """
    What was sampled of one policy.

    Args:
        input_ids (`torch.Tensor` of shape `(U, L)`): The different sequences, by ascending length.
        attention_mask (`torch.Tensor` of shape `(U, L)`): 1 for tokens.
        completion_mask (`torch.Tensor` of shape `(U, C)`): 1 for completion tokens.
        sequences (`torch.Tensor` of shape `(P, G)`): Which of the sequences each completion is.
        rewards (`torch.Tensor` of shape `(P, G)`): Rewards.
        sketches (`torch.Tensor` of shape `(U, k)`): Score sketches of the sequences.
    """

    input_ids: Tensor
    attention_mask: Tensor
    completion_mask: Tensor
    sequences: Tensor
    rewards: Tensor
    sketches: Tensor

    def trimmed(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`input_ids`, `attention_mask` and `completion_mask` of some sequences, without columns that none of them uses."""
        width = max(int(self.completion_mask[rows].sum(dim=1).max()), 1)
        unused = self.completion_mask.size(1) - width
        end = self.input_ids.size(1) - unused
        return self.input_ids[rows, :end], self.attention_mask[rows, :end], self.completion_mask[rows, :width]


def draw_rollouts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    score: Callable[[str, int], float],
    *,
    num_generations: int,
    max_completion_length: int,
    sketch_dim: int,
    projection_seed: int,
) -> Rollouts:
    """
    Sample, reward and sketch. The random state of the sampling is torch's global one.

    Args:
        model ([`~transformers.PreTrainedModel`]): The policy.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Its tokenizer.
        prompts (`Sequence[str]`): P prompts.
        score (`Callable[[str, int], float]`): Reward of a text as the completion of prompt number p.
        num_generations (`int`): Completions per prompt, G.
        max_completion_length (`int`): Tokens sampled at most.
        sketch_dim (`int`): Length of a sketch.
        projection_seed (`int`): Seed of the projections.
    """
    completions = sample_completions(
        model, tokenizer, prompts, num_completions=num_generations, max_completion_length=max_completion_length
    )
    rewards = [score(text, row // num_generations) for row, text in enumerate(completions.texts)]
    rollouts = _deduplicated(completions, torch.tensor(rewards).view(-1, num_generations))
    sketches = []
    for rows in torch.arange(rollouts.input_ids.size(0)).split(_MICRO_BATCH_SIZE):
        sketches.append(score_sketches(model, *rollouts.trimmed(rows), sketch_dim=sketch_dim, seed=projection_seed))
    rollouts.sketches = torch.cat(sketches)
    return rollouts


def _deduplicated(completions: Completions, rewards: Tensor) -> Rollouts:
    """Rollouts without sketches. Token 0 under a mask and token 0 in the text differ in the mask, which is compared too."""
    lengths = completions.completion_mask.sum(dim=1, keepdim=True)
    keys = torch.cat([lengths, completions.input_ids * completions.attention_mask, completions.attention_mask], dim=1)
    different, sequences = torch.unique(keys, dim=0, return_inverse=True)  # sorted by length, the first column
    num_columns = completions.input_ids.size(1)
    attention_mask = different[:, 1 + num_columns :]
    return Rollouts(
        input_ids=different[:, 1 : 1 + num_columns],
        attention_mask=attention_mask,
        completion_mask=attention_mask[:, -completions.completion_mask.size(1) :],
        sequences=sequences.view_as(rewards),
        rewards=rewards,
        sketches=torch.empty(0),
    )


def merged(draws: Sequence[Rollouts]) -> Rollouts:
    """All draws as one, prompts in the order of the draws; their prompts and completions must be padded alike."""
    offsets = torch.tensor([0] + [part.sketches.size(0) for part in draws[:-1]]).cumsum(dim=0)
    return Rollouts(
        input_ids=torch.cat([part.input_ids for part in draws]),
        attention_mask=torch.cat([part.attention_mask for part in draws]),
        completion_mask=torch.cat([part.completion_mask for part in draws]),
        sequences=torch.cat([part.sequences + offset for part, offset in zip(draws, offsets, strict=True)]),
        rewards=torch.cat([part.rewards for part in draws]),
        sketches=torch.cat([part.sketches for part in draws]),
    )
