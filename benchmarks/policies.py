"""The policies of the studies: small Qwen3 models of several sizes, tasks and accuracies, each made from its own settings.

    python -m benchmarks.policies

makes those that are missing (each takes one to ten minutes). All are taught by supervised fine-tuning on answers of which a
part is wrong (`examples.tiny_qwen3`); that part decides how often the policy is right.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import disable_progress_bars

from examples.tiny_qwen3.start_model import StartModelArguments, make_start_model

# What a task needs of the start model beside its name.
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
    "products": {
        "task_params": {"min_terms": 3, "max_terms": 3, "min_digits": 1, "max_digits": 1},
    },
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
}


@dataclass(frozen=True)
class Policy:
    """
    Settings of a policy.

    Args:
        task (`str`): reasoning-gym task, a key of `TASKS`.
        wrong_answers (`float`): Fraction of supervised answers that are off.
        reward (`str`, *optional*, defaults to `"binary"`): `"binary"` (1 for the full score, else 0) or `"graded"` (the task's
            own score).
        hidden_size (`int`, *optional*, defaults to `128`): Width.
        num_hidden_layers (`int`, *optional*, defaults to `2`): Depth.
        max_steps (`int`, *optional*, defaults to `500`): Supervised steps.
        learning_rate (`float`, *optional*, defaults to `1e-3`): Supervised peak rate.
    """

    task: str
    wrong_answers: float
    reward: str = "binary"
    hidden_size: int = 128
    num_hidden_layers: int = 2
    max_steps: int = 500
    learning_rate: float = 1e-3

    @property
    def task_params(self) -> dict[str, Any]:
        """Parameters of the task."""
        params = self.start_model("").task_params
        assert isinstance(params, dict)
        return params

    @property
    def max_completion_length(self) -> int:
        """Tokens sampled at most."""
        return self.start_model("").max_completion_length

    def start_model(self, output_dir: str) -> StartModelArguments:
        """Arguments that make the policy in `output_dir`."""
        return StartModelArguments(
            output_dir=output_dir,
            task=self.task,
            wrong_answers=self.wrong_answers,
            hidden_size=self.hidden_size,
            num_hidden_layers=self.num_hidden_layers,
            max_steps=self.max_steps,
            learning_rate=self.learning_rate,
            min_accuracy=0.0,
            max_accuracy=1.0,
            **TASKS[self.task],
        )


# The first three are those of the learning study.
POLICIES = {
    "chain_sum": Policy("chain_sum", 0.3, max_steps=1200),
    "decimal_chain_sum": Policy("decimal_chain_sum", 0.3, max_steps=600),
    "spell_backward": Policy("spell_backward", 0.3, reward="graded"),
    "products": Policy("products", 0.3),
    "number_sorting": Policy("number_sorting", 0.3),
    "chain_sum-0.1M": Policy("chain_sum", 0.3, hidden_size=64, max_steps=700),
    "spell_backward-hard": Policy("spell_backward", 0.7),
    "products-3M-easy": Policy("products", 0.05, hidden_size=256, num_hidden_layers=4),
    "chain_sum-9M": Policy("chain_sum", 0.3, hidden_size=384, num_hidden_layers=5, max_steps=250),
}


def policy_directory(name: str, root: str = ".cache/policies") -> Path:
    """
    Directory of a policy and its tokenizer; makes it if it is missing.

    Raises:
        `ValueError`: If there is no policy of that name.
    """
    if name not in POLICIES:
        raise ValueError(f"There is no policy {name!r}. Choose one of: {', '.join(POLICIES)}.")
    directory = Path(root) / name
    make_start_model(POLICIES[name].start_model(str(directory)))
    return directory


def main() -> None:
    """Make every policy and say what it can do."""
    disable_progress_bars()
    for name, policy in POLICIES.items():
        record = make_start_model(policy.start_model(str(Path(".cache/policies") / name)))
        sys.stdout.write(f"{name}: {record['num_parameters']:,} parameters, {record['accuracy']:.3f} right\n")


if __name__ == "__main__":
    main()
