"""Completions of held-out prompts with rewards and exact inner products of their scores.

Scores are full gradients of all parameters. They are reduced to the Gram matrix of each prompt as they come, so that
memory holds the gradients of one prompt at a time.

Shapes: P prompts, M completions of each, L tokens of prompt and completion, C of the completion.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from benchmarks.gradient_variance import Pool
from benchmarks.policies import LoadedPolicy
from oblr_trl.data.prompt_sets import DataArguments, load_prompts
from oblr_trl.scores import score_sketches

T = TypeVar("T")
# Sequences per sampling and per scoring pass.
_SAMPLING_BATCH_SIZE = 256
_MICRO_BATCH_SIZE = 32


class Completions(NamedTuple):
    """Sampled completions, padded on both sides, prompt by prompt."""

    input_ids: Tensor  # (P * M, L)
    attention_mask: Tensor  # (P * M, L)
    completion_mask: Tensor  # (P * M, C), up to and including the end-of-sequence token
    texts: list[str]

    def inputs(self, rows: Tensor | slice = slice(None)) -> tuple[Tensor, Tensor, Tensor]:
        """What a scoring pass takes, of all or some sequences."""
        return self.input_ids[rows], self.attention_mask[rows], self.completion_mask[rows]


def kept(path: Path, settings: dict[str, Any], make: Callable[[], T]) -> T:
    """The value of `make` for these `settings`: read from `path`, or made and kept there now."""
    if path.is_file():
        record = torch.load(path, weights_only=False)
        if record["settings"] == settings:
            return record["value"]
    value = make()
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    torch.save({"settings": settings, "value": value}, partial)
    partial.replace(path)  # an interrupted run leaves nothing that looks complete
    return value


def sample_with_rewards(
    policy: LoadedPolicy, *, num_prompts: int, num_completions: int, seed: int
) -> tuple[Completions, Tensor]:
    """Completions of held-out prompts, other ones for every `seed`, and their rewards `(P, M)` in float64."""
    settings = policy.settings
    data = DataArguments(
        task=settings.task_name, task_params=settings.task_params, train_size=1, test_size=(seed + 1) * num_prompts
    )
    rows: list[Any] = list(load_prompts(data)["test"])[-num_prompts:]
    set_seed(seed)
    completions = sample_completions(
        policy.model,
        policy.tokenizer,
        [row["prompt"] for row in rows],
        num_completions=num_completions,
        max_completion_length=settings.start_model().max_completion_length,
    )
    entries = [row["entry"] for row in rows for _ in range(num_completions)]
    rewards = settings.reward_function()(completions=completions.texts, entry=entries)
    return completions, torch.tensor(rewards, dtype=torch.float64).view(num_prompts, num_completions)


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


def answer_batch(tokenizer: Any, prompts: Sequence[str], answers: Sequence[str]) -> tuple[Tensor, Tensor, Tensor]:
    """`input_ids`, `attention_mask` and `completion_mask` of every prompt with its answer and the end of sequence."""
    tokenizer.padding_side = "left"
    batch = tokenizer(list(prompts), return_tensors="pt", padding=True, return_token_type_ids=False)
    completions = [torch.tensor([*tokenizer(answer)["input_ids"], tokenizer.eos_token_id]) for answer in answers]
    ids = nn.utils.rnn.pad_sequence(completions, batch_first=True, padding_value=tokenizer.pad_token_id)
    mask = nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in completions], batch_first=True)
    return torch.cat([batch["input_ids"], ids], dim=1), torch.cat([batch["attention_mask"], mask], dim=1), mask


def sequence_logps(model: Any, input_ids: Tensor, attention_mask: Tensor, completion_mask: Tensor) -> Tensor:
    """Log-probability of every completion given its prompt."""
    num_tokens = completion_mask.size(1)
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False}
    logits = model(**inputs, logits_to_keep=num_tokens + 1).logits
    logps = logits[:, :-1].log_softmax(dim=-1).gather(-1, input_ids[:, -num_tokens:].unsqueeze(-1)).squeeze(-1)
    return (logps * completion_mask).sum(dim=1)


def full_scores(model: PreTrainedModel, inputs: Sequence[Tensor]) -> Tensor:
    """
    Full gradients (M, D) of all parameters, one per sequence, in one pass: sketches as long as the parameters are
    many only turn the gradients by a rotation, so inner products are exact.
    """
    num_parameters = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return score_sketches(model, *inputs, scope="all", sketch_dim=num_parameters)


def gram_of_scores(model: PreTrainedModel, inputs: Sequence[Tensor]) -> Tensor:
    """Inner products (M, M) of [`full_scores`]."""
    scores = full_scores(model, inputs)
    return (scores @ scores.T).double()


def build_pool(
    model: PreTrainedModel,
    completions: Completions,
    rewards: Tensor,
    *,
    sketch_dim: int,
    seed: int,
    gram: Callable[[PreTrainedModel, Sequence[Tensor]], Tensor] = gram_of_scores,
) -> Pool:
    """Score every completion, exactly by `gram`, prompt by prompt, and by sketches of every scope; rewards are `(P, M)`."""
    by_prompt = torch.arange(rewards.numel()).split(rewards.size(1))
    grams = torch.stack([gram(model, completions.inputs(rows)) for rows in by_prompt])

    def sketched(scope: str, last_k: int | None = None) -> Tensor:
        options: dict[str, Any] = {"scope": scope, "last_k": last_k, "sketch_dim": sketch_dim, "seed": seed}
        sketches = score_sketches(model, *completions.inputs(), **options, micro_batch_size=_MICRO_BATCH_SIZE)
        return sketches.double().square().sum(dim=1).view_as(rewards)

    return Pool(
        rewards=rewards.double(),
        lengths=completions.completion_mask.sum(dim=1).view_as(rewards).double(),
        grams=grams,
        weights={
            "exact": grams.diagonal(dim1=1, dim2=2).clone(),
            "all": sketched("all"),
            "last_k": sketched("last_k", last_k=1),
            "lm_head": sketched("lm_head"),
        },
    )
