r"""True signal and noise of one policy from full gradients of all parameters: no sketch, no clamp.

The signal needs no sampling where only one completion of a problem earns a reward: \\( \nabla J = \sum_q p(q)\, \nabla
\pi(o^*_q | q) \\), summed over all problems, is the limit of infinitely many rollouts. The noise is that of rollouts
with the advantages that the trainer's baseline gives them, \\( \mathrm{tr}(H) \approx \overline{\|g_n\|^2} - \|\nabla
J\|^2 \\).

Shapes: P prompts, G completions per prompt, D parameters.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.completion_pool import Completions, answer_batch, sequence_logps

_CHUNK_SIZE = 64


class Problems(NamedTuple):
    """Different problems: their prompts, the answer of each, and their probabilities `(num_problems,)`."""

    prompts: list[str]
    answers: list[str]
    shares: Tensor


def count_problems(prompts: Sequence[str], answers: Sequence[str]) -> Problems:
    """The distribution that a very large draw stands for: every problem with its share of the draw."""
    counts = Counter(zip(prompts, answers, strict=True))
    shares = torch.tensor(list(counts.values())) / len(prompts)
    return Problems([prompt for prompt, _ in counts], [answer for _, answer in counts], shares)


def expected_gradient(model: Any, tokenizer: Any, problems: Problems) -> Tensor:
    r"""Gradient `(D,)` of the expected reward \\( \sum_q p(q) \pi(o^*_q | q) \\), in float64."""
    parameters = _trainable(model)
    gradient = torch.zeros(sum(parameter.numel() for parameter in parameters), dtype=torch.float64)
    for rows in torch.arange(len(problems.prompts)).split(_CHUNK_SIZE):
        batch = answer_batch(
            tokenizer, [problems.prompts[row] for row in rows], [problems.answers[row] for row in rows]
        )
        objective = (problems.shares[rows] * sequence_logps(model, *batch).exp()).sum()
        gradient += _flat_gradient(objective, parameters)
    return gradient


def squared_gradient_norms(model: Any, completions: Completions, advantages: Tensor) -> Tensor:
    r"""Squared norms `(P,)` of the full gradients \\( g_n = \frac{1}{G} \sum_i A_{n,i} s_i \\), one backward each."""
    parameters, num_completions = _trainable(model), advantages.size(1)
    norms = torch.zeros(len(advantages), dtype=torch.float64)
    for prompt, row in enumerate(tqdm(advantages, desc="exact gradients", mininterval=5)):
        rows = slice(prompt * num_completions, (prompt + 1) * num_completions)
        gradient = _flat_gradient((row * sequence_logps(model, *completions.inputs(rows))).mean(), parameters)
        norms[prompt] = gradient.double().square().sum()
    return norms


def _trainable(model: Any) -> list[Tensor]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _flat_gradient(objective: Tensor, parameters: list[Tensor]) -> Tensor:
    return torch.cat([part.flatten() for part in torch.autograd.grad(objective, parameters)])
