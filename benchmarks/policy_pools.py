"""What the policies of `benchmarks.policies` sample on held-out prompts, with rewards, and work that is kept on disk.

Every seed draws other prompts. Nothing here scores or measures.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, set_seed

from benchmarks.completion_pool import Completions, sample_completions
from benchmarks.policies import POLICIES, Policy, policy_directory
from oblr_trl.data.prompt_sets import DataArguments, load_prompts
from oblr_trl.data.tasks import decode_entry, make_task

T = TypeVar("T")


@dataclass
class LoadedPolicy:
    """
    A policy in memory.

    Args:
        settings ([`Policy`]): Its settings.
        model ([`~transformers.PreTrainedModel`]): The model, in float32 and evaluation mode.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Its tokenizer.
    """

    settings: Policy
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    @property
    def num_parameters(self) -> int:
        """Parameters of the model; tied ones count once."""
        return sum(parameter.numel() for parameter in self.model.parameters())


def policy_identity(name: str) -> dict[str, Any]:
    """What tells a policy and its rewards from others, as plain values."""
    return {"start_model": asdict(POLICIES[name].start_model("")), "reward": POLICIES[name].reward}


def load_policy(name: str) -> LoadedPolicy:
    """Load a policy; make it if it is missing."""
    directory = policy_directory(name)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    return LoadedPolicy(POLICIES[name], model, AutoTokenizer.from_pretrained(directory))


def sample_with_rewards(
    policy: LoadedPolicy, *, num_prompts: int, num_completions: int, seed: int
) -> tuple[Completions, Tensor]:
    """
    Sample `num_completions` completions of `num_prompts` held-out prompts, other ones for every `seed`.

    Returns:
        [`Completions`] and their rewards, `torch.Tensor` of shape `(num_prompts, num_completions)` in float64.
    """
    settings = policy.settings
    data = DataArguments(
        task=settings.task, task_params=settings.task_params, train_size=1, test_size=(seed + 1) * num_prompts
    )
    rows = list(load_prompts(data)["test"])[-num_prompts:]
    set_seed(seed)
    completions = sample_completions(
        policy.model,
        policy.tokenizer,
        [row["prompt"] for row in rows],
        num_completions=num_completions,
        max_completion_length=settings.max_completion_length,
    )
    task = make_task(settings.task, settings.task_params, size=1, seed=0)
    entries = [decode_entry(row["entry"]) for row in rows for _ in range(num_completions)]
    scores = [float(task.score_answer(text, entry)) for text, entry in zip(completions.texts, entries, strict=True)]
    rewards = torch.tensor(scores, dtype=torch.float64).view(num_prompts, num_completions)
    return completions, (rewards >= 1).double() if settings.reward == "binary" else rewards


def kept(path: Path, settings: dict[str, Any], make: Callable[[], T]) -> T:
    """What `make` returned when it was last called with these `settings`, read from `path`, or made and kept there now."""
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
