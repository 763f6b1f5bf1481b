"""Keys of an evaluation recipe; prompts are shaped by the keys of a training recipe."""

# `option` returns a `dataclasses.field`, so nothing is shared between instances.
# ruff: noqa: RUF009
import math
from dataclasses import dataclass
from typing import Any

from oblr_trl.data.prompts import PromptArguments
from oblr_trl.data.recipe_files import option, parse_json_object
from oblr_trl.data.tasks import nearest

BACKENDS = ("auto", "vllm", "transformers")
COUNTS = ("max_new_tokens", "batch_size", "num_completions", "vllm_tensor_parallel_size")
FRACTIONS = ("top_p", "vllm_gpu_memory_utilization")


def is_count(value: Any) -> bool:
    """Whether `value` is a whole number, at least 1."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_number(value: Any) -> bool:
    """YAML reads `1e-1`, without a dot, as text, and `yes` as true."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


@dataclass
class EvaluationArguments(PromptArguments):
    """What to evaluate on which benchmarks, and how; fields are documented by their `help`."""

    model_name_or_path: str | None = option(None, "Hub id or directory; with transformers also of an adapter.")
    model_revision: str | None = option(None, "Revision of a hub model.")
    dtype: str = option("auto", "Type of the weights, e.g. `bfloat16`; `auto` is that of the checkpoint.")
    backend: str = option("auto", "`vllm`, `transformers`, or `auto`: vLLM where it is installed.")
    output_dir: str | None = option(None, "Records and results. Defaults to `runs/evaluation/` and the model's name.")
    benchmarks: dict | str | None = option(None, "Benchmarks by name, see docs/evaluation.md; here a JSON object.")
    only: list[str] | None = option(None, "Names of the benchmarks to evaluate on. Defaults to all.")
    files: dict | str | None = option(None, "Local files in place of datasets, by benchmark; here a JSON object.")
    num_completions: int = option(1, "Completions per problem (k of avg@k), where a benchmark does not set its own.")
    pass_at: list[int] | None = option(None, "The k of pass@k, where a benchmark does not set its own.")
    chat_template_kwargs: dict | str | None = option(
        None, 'Arguments of the chat template, e.g. `{"enable_thinking": false}`; here a JSON object.'
    )
    temperature: float = option(1.0, "Temperature of sampling, at least 0; 0 is greedy.")
    top_p: float = option(1.0, "Probability of the nucleus, in (0, 1].")
    top_k: int | None = option(None, "Number of most likely tokens to sample from. Defaults to all.")
    max_new_tokens: int = option(1024, "Longest completion, in tokens.")
    stop_token_ids: list[int] | None = option(None, "Tokens that end a completion, in addition to the end of text.")
    batch_size: int = option(64, "Completions generated and recorded at once; a kill loses no more than these.")
    seed: int = option(0, "Seed of sampling and of the bootstrap.")
    vllm_tensor_parallel_size: int = option(1, "GPUs that share the model.")
    vllm_gpu_memory_utilization: float = option(0.9, "Fraction of the GPU's memory that vLLM takes, in (0, 1].")
    disable_tqdm: bool = option(False, "Whether to leave the progress bar out.")

    def __post_init__(self):
        values = vars(self)
        for name in ("benchmarks", "files", "chat_template_kwargs"):
            if isinstance(values[name], str):
                values[name] = parse_json_object(name, values[name])
        if self.backend not in BACKENDS:
            near = nearest(str(self.backend), BACKENDS)
            raise ValueError(f"`backend` is {self.backend!r}{near}: use one of {', '.join(BACKENDS)}.")
        checks = {name: (is_count(values[name]), "a whole number, at least 1") for name in COUNTS}
        checks["top_k"] = (self.top_k is None or is_count(self.top_k), "a whole number, at least 1")
        checks["temperature"] = (_is_number(self.temperature) and self.temperature >= 0, "a number, at least 0")
        for name in FRACTIONS:
            checks[name] = (_is_number(values[name]) and 0 < values[name] <= 1, "a number, above 0 and at most 1")
        for name, (is_valid, wanted) in checks.items():
            if not is_valid:
                raise ValueError(f"`{name}` is {values[name]!r}, but must be {wanted}: correct it.")
        super().__post_init__()
