"""A pool of completions of held-out prompts with the exact inner products of their scores, for the studies of variance and fidelity.

Scores are full gradients of all parameters. They are reduced to the Gram matrix of each prompt as they come, so that memory
holds the gradients of one prompt at a time.

Shapes: P prompts, M completions of each, L tokens of prompt and completion, C of the completion.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.gradient_variance import Pool
from oblr_trl.scores import reference_scores, score_sketches

# Sequences per sampling and per scoring pass.
_SAMPLING_BATCH_SIZE = 256
_MICRO_BATCH_SIZE = 32


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
    for rows in torch.arange(len(repeated)).split(_SAMPLING_BATCH_SIZE):
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


def full_scores(model: PreTrainedModel, inputs: Sequence[Tensor]) -> Tensor:
    """
    Full gradients (M, D) of all parameters, one per sequence, in one pass: sketches as long as the parameters are many only
    turn the gradients by a rotation, so inner products are exact. [`oracle_difference`] compares them with autograd.
    """
    num_parameters = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return score_sketches(model, *inputs, scope="all", sketch_dim=num_parameters)


def score_gram(scores: Tensor) -> Tensor:
    """Inner products (M, M) of scores (M, D), in float64."""
    return (scores @ scores.T).double()


def oracle_difference(model: PreTrainedModel, completions: Completions, num_completions: int) -> float:
    """Greatest difference between inner products of [`full_scores`] and of the oracle's (one backward per sequence), over the
    first completions, in units of the product of the two norms."""
    inputs = [
        tensor[:num_completions]
        for tensor in (completions.input_ids, completions.attention_mask, completions.completion_mask)
    ]
    expected = score_gram(reference_scores(model, *inputs))
    norms = expected.diagonal().sqrt()
    return ((score_gram(full_scores(model, inputs)) - expected).abs() / (norms.unsqueeze(1) * norms)).max().item()


@torch.no_grad()
def logit_energies(model: PreTrainedModel, completions: Completions) -> Tensor:
    r"""
    Sum over the tokens of \\( \| e_{o_t} - \pi_t \|^2 = 1 - 2 \pi_t(o_t) + \sum_v \pi_t(v)^2 \\), the squared gradient of a token's
    log-probability with respect to its logits, `(P * M,)`: the proxy of a score's squared norm of the [Optimal Token
    Baseline](https://huggingface.co/papers/2602.07078), which uses its running sums in a baseline for every token.
    """
    energies = []
    num_tokens = completions.completion_mask.size(1)
    for rows in torch.arange(len(completions.input_ids)).split(_MICRO_BATCH_SIZE):
        ids = completions.input_ids[rows]
        inputs = {"input_ids": ids, "attention_mask": completions.attention_mask[rows]}
        logits = model(**inputs, logits_to_keep=num_tokens + 1).logits
        probabilities = logits[:, :-1].softmax(dim=-1)  # (B, C, V)
        chosen = probabilities.gather(-1, ids[:, -num_tokens:].unsqueeze(-1)).squeeze(-1)
        energy = 1 - 2 * chosen + probabilities.square().sum(dim=-1)
        energies.append((energy * completions.completion_mask[rows]).sum(dim=1))
    return torch.cat(energies)


def build_pool(
    model: PreTrainedModel,
    completions: Completions,
    rewards: Tensor,
    *,
    sketch_dim: int,
    seed: int,
) -> Pool:
    """
    Score every completion: exactly, by sketches of every scope, and by the energy of its logits.

    Args:
        model ([`~transformers.PreTrainedModel`]): The policy.
        completions ([`Completions`]): What it sampled.
        rewards (`torch.Tensor` of shape `(P, M)`): Their rewards.
        sketch_dim (`int`): Length of a sketch.
        seed (`int`): Seed of the projections.
    """
    inputs = (completions.input_ids, completions.attention_mask, completions.completion_mask)
    grams = []
    for rows in torch.arange(rewards.numel()).split(rewards.size(1)):
        grams.append(score_gram(full_scores(model, [tensor[rows] for tensor in inputs])))
    stacked = torch.stack(grams)

    def sketched(scope: str, last_k: int | None = None) -> Tensor:
        options = {"scope": scope, "last_k": last_k, "sketch_dim": sketch_dim, "seed": seed}
        sketches = score_sketches(model, *inputs, **options, micro_batch_size=_MICRO_BATCH_SIZE)
        return sketches.double().square().sum(dim=1).view_as(rewards)

    return Pool(
        rewards=rewards.double(),
        lengths=completions.completion_mask.sum(dim=1).view_as(rewards).double(),
        grams=stacked,
        weights={
            "exact": stacked.diagonal(dim1=1, dim2=2).clone(),
            "all": sketched("all"),
            "last_k": sketched("last_k", last_k=1),
            "lm_head": sketched("lm_head"),
            "logit_energy": logit_energies(model, completions).view_as(rewards).double(),
        },
    )
