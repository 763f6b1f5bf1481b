"""The policies of the studies: small Qwen3 models of several sizes, tasks and accuracies.

    python -m benchmarks.policies

makes those that are missing (one to ten minutes each). All are trained by supervised fine-tuning on answers of which a
part is wrong (`examples.tiny_qwen3`); that part decides how often the policy is right.
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from datasets import disable_progress_bars
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples.tiny_qwen3.start_model import StartModelArguments, make_start_model
from oblr_trl.data.rewards import task_reward


def _copying(rows: int, columns: int) -> dict[str, Any]:
    """A matrix of digits is to be copied with one digit replaced by another: long answers that a small model learns."""
    size = {"min_rows": rows, "max_rows": rows, "min_cols": columns, "max_cols": columns}
    params = size | {"max_transforms": 1, "w_map": 100}
    return {"task": "manipulate_matrix", "task_params": params, "max_completion_length": 2 * rows * columns + 8}


# What a task needs of the start model in addition to its name, or with it where that is another.
TASKS: dict[str, dict[str, Any]] = {
    "chain_sum": {},
    "decimal_chain_sum": {
        "task_params": {
            "min_terms": 2,
            "max_terms": 2,
            "min_digits": 1,
            "max_digits": 1,
            "min_decimal_places": 1,
            "max_decimal_places": 1,
        },
    },
    "products": {"task_params": {"min_terms": 3, "max_terms": 3, "min_digits": 1, "max_digits": 1}},
    "spell_backward": {
        "task_params": {"min_word_len": 3, "max_word_len": 6},
        "letters_apart": True,
        "vocab_size": 110,
    },
    "number_sorting": {
        "task_params": {
            "min_numbers": 3,
            "max_numbers": 3,
            "min_decimals": 0,
            "max_decimals": 0,
            "min_value": 0,
            "max_value": 99,
        },
        "vocab_size": 384,
        "max_completion_length": 32,
    },
    "matrices of 3 x 5": _copying(3, 5),
    "matrices of 4 x 13": _copying(4, 13),
}


@dataclass(frozen=True)
class Policy:
    """Settings of a policy."""

    task: str  # a key of `TASKS`
    wrong_answers: (
        float  # fraction of supervised answers that are off; of the easiest prompts, where there is a next one
    )
    hardest_wrong_answers: float | None = None
    reward: str = "binary"  # 1 for the full score, else 0; or "graded", the task's own score
    hidden_size: int = 128
    num_hidden_layers: int = 2
    max_steps: int = 500  # of supervised fine-tuning

    def start_model(self, output_dir: str = "") -> StartModelArguments:
        """Arguments that make the policy in `output_dir`."""
        settings = {name: value for name, value in asdict(self).items() if name != "reward"}
        return StartModelArguments(
            output_dir=output_dir, min_accuracy=0.0, max_accuracy=1.0, **(settings | TASKS[self.task])
        )

    @property
    def task_name(self) -> str:
        """reasoning-gym's name of the task."""
        return self.start_model().task

    @property
    def task_params(self) -> dict[str, Any]:
        """Parameters of the task."""
        params = self.start_model().task_params
        assert isinstance(params, dict)
        return params

    def reward_function(self) -> Callable[..., list[float | None]]:
        """The task's scorer, for binary rewards 1 where it gives its full score and 0 elsewhere."""
        score = task_reward(self.task_name, self.task_params)
        if self.reward == "graded":
            return score

        def reward(**kwargs: Any) -> list[float | None]:
            return [float(value is not None and value >= 1) for value in score(**kwargs)]

        return reward


# The first three are those of the learning study.
POLICIES = {
    "chain_sum": Policy("chain_sum", 0.3, max_steps=1200),
    "decimal_chain_sum": Policy("decimal_chain_sum", 0.3, max_steps=600),
    "spell_backward": Policy("spell_backward", 0.3, reward="graded"),
    "products": Policy("products", 0.3),
    # From 0.95 to 0.05 right, by the prompt.
    "products-mixed": Policy("products", 0.05, hardest_wrong_answers=0.95, max_steps=700),
    "number_sorting": Policy("number_sorting", 0.3),
    "matrices-30": Policy("matrices of 3 x 5", 0.3, max_steps=1500),
    "matrices-104": Policy("matrices of 4 x 13", 0.3, max_steps=700),
    "chain_sum-0.1M": Policy("chain_sum", 0.3, hidden_size=64, max_steps=700),
    "spell_backward-hard": Policy("spell_backward", 0.7),
    "products-3M-easy": Policy("products", 0.05, hidden_size=256, num_hidden_layers=4),
    "chain_sum-9M": Policy("chain_sum", 0.3, hidden_size=384, num_hidden_layers=5, max_steps=250),
}
_ROOT = Path(".cache/policies")


class LoadedPolicy(NamedTuple):
    """A policy in memory: its settings, its model (float32, evaluation mode) and its tokenizer."""

    settings: Policy
    model: Any
    tokenizer: Any


def check_policies(field_name: str, names: list[str]) -> None:
    """Raise a `ValueError` that names the field where there is no policy of a name."""
    for name in names:
        if name not in POLICIES:
            raise ValueError(f"`{field_name}` has {name!r}, which does not exist. Choose from: {', '.join(POLICIES)}.")


def policy_directory(name: str) -> Path:
    """Directory of a policy and its tokenizer; makes it if it is missing."""
    make_start_model(POLICIES[name].start_model(str(_ROOT / name)))
    return _ROOT / name


def load_policy(name: str) -> LoadedPolicy:
    """Load a policy; make it if it is missing."""
    directory = policy_directory(name)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    return LoadedPolicy(POLICIES[name], model, AutoTokenizer.from_pretrained(directory))


def main() -> None:
    """Make every policy and say what it can do."""
    disable_progress_bars()
    for name, policy in POLICIES.items():
        record = make_start_model(policy.start_model(str(_ROOT / name)))
        sys.stdout.write(f"{name}: {record['num_parameters']:,} parameters, {record['accuracy']:.3f} right\n")


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()  # for `--help`
    main()
