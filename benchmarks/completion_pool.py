"""A pool of completions of held-out prompts with the exact inner products of their scores, for `benchmarks.variance`.

Scores are full gradients of all parameters by the oracle, one backward per sequence. They are reduced to the Gram matrix of
each prompt as they come, so that memory holds the gradients of one prompt at a time.

Shapes: P prompts, M completions of each, L tokens of prompt and completion, C of the completion.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.variance import Pool
from oblr_trl.scores import reference_scores, score_sketches

# Sequences per sampling or scoring pass.
_MICRO_BATCH_SIZE = 256


@dataclass
class Completions:
    """
    Sampled completions, padded on both sides.

    Args:
        input_ids (`torch.Tensor` of shape `(P * M, L)`): Prompts and completions, prompt by prompt.
        attention_mask (`torch.Tensor` of shape `(P * M, L)`): 1 for tokens.
        completion_mask (`torch.Tensor` of shape `(P * M, C)`): 1 for completion tokens up to the end-of-sequence token.
        texts (`list[str]`): Decoded completions.
    """

    input_ids: Tensor
    attention_mask: Tensor
    completion_mask: Tensor
    texts: list[str]


@torch.no_grad()
def sample_completions(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    num_completions: int,
    max_completion_length: int,
) -> Completions:
    """Sample from the policy itself: temperature 1, the whole vocabulary. The random state is torch's global one."""
    tokenizer.padding_side = "left"
    repeated = [prompt for prompt in prompts for _ in range(num_completions)]
    batch = tokenizer(repeated, return_tensors="pt", padding=True, return_token_type_ids=False)
    num_prompt_tokens = batch["input_ids"].size(1)
    pieces = []
    for rows in torch.arange(len(repeated)).split(_MICRO_BATCH_SIZE):
        ids = model.generate(
            input_ids=batch["input_ids"][rows],
            attention_mask=batch["attention_mask"][rows],
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_new_tokens=max_completion_length,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )[:, num_prompt_tokens:]
        padding = max_completion_length - ids.size(1)
        pieces.append(nn.functional.pad(ids, (0, padding), value=tokenizer.pad_token_id))
    completion_ids = torch.cat(pieces)
    ended = (completion_ids == tokenizer.eos_token_id).long()
    completion_mask = (ended.cumsum(dim=1) - ended == 0).long()  # up to and including the first end-of-sequence token
    return Completions(
        torch.cat([batch["input_ids"], completion_ids], dim=1),
        torch.cat([batch["attention_mask"], completion_mask], dim=1),
        completion_mask,
        tokenizer.batch_decode(completion_ids, skip_special_tokens=True),
    )


def build_pool(
    model: PreTrainedModel,
    completions: Completions,
    rewards: Tensor,
    *,
    sketch_dim: int,
    seed: int,
    on_prompt: Callable[[], object] = lambda: None,
) -> Pool:
    """
    Score every completion: exactly, by the trainer's default sketches, and by the output projection alone.

    Args:
        model ([`~transformers.PreTrainedModel`]): The policy.
        completions ([`Completions`]): What it sampled.
        rewards (`torch.Tensor` of shape `(P, M)`): Their rewards.
        sketch_dim (`int`): Length of a sketch.
        seed (`int`): Seed of the projections.
        on_prompt (`Callable`, *optional*): Called after every prompt.
    """
    inputs = (completions.input_ids, completions.attention_mask, completions.completion_mask)
    grams = []
    for rows in torch.arange(rewards.numel()).split(rewards.size(1)):
        scores = reference_scores(model, *(tensor[rows] for tensor in inputs)).double()
        grams.append(scores @ scores.T)
        on_prompt()
    stacked = torch.stack(grams)

    def sketched(scope: str) -> Tensor:
        sketches = score_sketches(
            model, *inputs, scope=scope, sketch_dim=sketch_dim, seed=seed, micro_batch_size=_MICRO_BATCH_SIZE
        )
        return sketches.double().square().sum(dim=1).view_as(rewards)

    return Pool(
        rewards=rewards.double(),
        lengths=completions.completion_mask.sum(dim=1).view_as(rewards).double(),
        grams=stacked,
        weights={
            "exact": stacked.diagonal(dim1=1, dim2=2).clone(),
            "sketch": sketched("all"),
            "lm_head": sketched("lm_head"),
        },
    )
