"""The keys of an evaluation recipe."""

import math
from dataclasses import dataclass, field

from oblr_trl.data.prompts import check_template
from oblr_trl.data.recipe_files import parse_json_object
from oblr_trl.data.tasks import nearest
from oblr_trl.evaluation.benchmarks import UNPARSABLE_ANSWERS
from oblr_trl.evaluation.grading import ANSWER_FORMATS

BACKENDS = ("auto", "vllm", "transformers")


@dataclass
class EvaluationArguments:
    """
    What to evaluate on which benchmarks, and how.

    Args:
        model_name_or_path (`str`, *optional*):
            Hub id or local directory of the model; an adapter's directory too, with the transformers backend.
        model_revision (`str`, *optional*):
            Revision of a hub model.
        dtype (`str`, *optional*, defaults to `"auto"`):
            Type of the weights, e.g. `"bfloat16"`; `"auto"` is that of the checkpoint.
        attn_implementation (`str`, *optional*):
            Attention of the transformers backend, e.g. `"flash_attention_2"`.
        backend (`str`, *optional*, defaults to `"auto"`):
            `"vllm"`, `"transformers"`, or `"auto"`: vLLM where it is installed.
        completions_file (`str`, *optional*):
            JSONL of completions to grade instead of generating any: rows `{"benchmark", "index", "completions"}`, where
            `index` is the row of the problem in its data set.
        output_dir (`str`, *optional*):
            Where records and results go; an evaluation of the same settings is continued there. Defaults to
            `runs/evaluation/` and the last part of the model's or file's name.
        benchmarks (`dict` or `str`, *optional*):
            Fields of [`~evaluation.benchmarks.Benchmark`] by name; on the command line a JSON object.
        only (`list[str]`, *optional*):
            Names of the benchmarks to evaluate on. Defaults to all.
        files (`dict` or `str`, *optional*):
            Local files with the same columns that take the place of data sets, by the benchmark's name; on the command line
            a JSON object.
        num_completions (`int`, *optional*, defaults to `1`):
            Completions per problem, for benchmarks that do not set their own.
        pass_at (`list[int]`, *optional*):
            The k of pass@k, for benchmarks that do not set their own.
        unparsable_answers (`str`, *optional*, defaults to `"error"`):
            Of problems whose reference answer math-verify cannot parse: `"error"` refuses them by row before a model is
            loaded, `"exclude"` leaves them out and counts them.
        answer_format (`str`, *optional*, defaults to `"any"`):
            `"any"` or `"latex"`, see [`~evaluation.grading.grade`].
        prompt_template (`str`, *optional*):
            Text around every string prompt, with `{prompt}` in it.
        conversational (`bool`, *optional*, defaults to `False`):
            Whether to turn every string prompt into a conversation, for models with a chat template.
        system_prompt (`str`, *optional*):
            System message put before every conversation.
        chat_template_kwargs (`dict` or `str`, *optional*):
            Further arguments of the chat template, e.g. `{"enable_thinking": false}`; on the command line a JSON object.
        like (`str`, *optional*):
            A training recipe whose prompts and endings are used: `prompt_template`, `conversational`, `system_prompt`,
            `chat_template_kwargs`, `stop_token_ids` and, for `max_new_tokens`, `max_completion_length` come from it, whatever
            this recipe says; those of the command line come first.
        temperature (`float`, *optional*, defaults to `1.0`):
            Temperature, at least 0; 0 is greedy.
        top_p (`float`, *optional*, defaults to `1.0`):
            Probability of the nucleus, in (0, 1].
        top_k (`int`, *optional*):
            Number of most likely tokens to sample from. Defaults to all.
        max_new_tokens (`int`, *optional*, defaults to `1024`):
            Longest completion, in tokens.
        stop_token_ids (`list[int]`, *optional*):
            Tokens that end a completion, in addition to the model's and the tokenizer's end of text.
        batch_size (`int`, *optional*, defaults to `64`):
            Completions generated, graded and recorded at once; a killed evaluation loses no more than these.
        seed (`int`, *optional*, defaults to `0`):
            Seed of sampling and of the bootstrap.
        vllm_tensor_parallel_size (`int`, *optional*, defaults to `1`):
            GPUs that share the model.
        vllm_gpu_memory_utilization (`float`, *optional*, defaults to `0.9`):
            Fraction of the GPU's memory that vLLM takes, in (0, 1].
        disable_tqdm (`bool`, *optional*, defaults to `False`):
            Whether to leave the progress bar out.
    """

    model_name_or_path: str | None = field(default=None, metadata={"help": "Hub id or directory of the model."})
    model_revision: str | None = field(default=None, metadata={"help": "Revision of a hub model."})
    dtype: str = field(default="auto", metadata={"help": "Type of the weights, e.g. `bfloat16`."})
    attn_implementation: str | None = field(default=None, metadata={"help": "Attention of the transformers backend."})
    backend: str = field(default="auto", metadata={"help": "`vllm`, `transformers`, or `auto`: vLLM where installed."})
    completions_file: str | None = field(default=None, metadata={"help": "JSONL of completions to grade instead."})
    output_dir: str | None = field(default=None, metadata={"help": "Where records and results go."})
    benchmarks: dict | str | None = field(default=None, metadata={"help": "Benchmarks by name, a JSON object."})
    only: list[str] | None = field(default=None, metadata={"help": "Names of the benchmarks to evaluate on."})
    files: dict | str | None = field(
        default=None, metadata={"help": "Local files in place of data sets, by benchmark: a JSON object."}
    )
    num_completions: int = field(default=1, metadata={"help": "Completions per problem: the k of avg@k."})
    pass_at: list[int] | None = field(default=None, metadata={"help": "The k of pass@k."})
    unparsable_answers: str = field(
        default="error", metadata={"help": "`error` or `exclude`: problems whose answer math-verify cannot parse."}
    )
    answer_format: str = field(default="any", metadata={"help": "`any`, or `latex` as TRL's accuracy_reward."})
    prompt_template: str | None = field(default=None, metadata={"help": "Text around every `{prompt}`."})
    conversational: bool = field(default=False, metadata={"help": "Whether to make every prompt a conversation."})
    system_prompt: str | None = field(default=None, metadata={"help": "System message before every conversation."})
    chat_template_kwargs: dict | str | None = field(
        default=None,
        metadata={"help": 'Arguments of the chat template, a JSON object, e.g. `{"enable_thinking": false}`.'},
    )
    like: str | None = field(
        default=None, metadata={"help": "Training recipe whose prompts and stop tokens are used."}
    )
    temperature: float = field(default=1.0, metadata={"help": "Temperature of sampling; 0 is greedy."})
    top_p: float = field(default=1.0, metadata={"help": "Probability of the nucleus."})
    top_k: int | None = field(default=None, metadata={"help": "Number of most likely tokens to sample from."})
    max_new_tokens: int = field(default=1024, metadata={"help": "Longest completion, in tokens."})
    stop_token_ids: list[int] | None = field(default=None, metadata={"help": "Further tokens that end a completion."})
    batch_size: int = field(default=64, metadata={"help": "Completions generated and recorded at once."})
    seed: int = field(default=0, metadata={"help": "Seed of sampling and of the bootstrap."})
    vllm_tensor_parallel_size: int = field(default=1, metadata={"help": "GPUs that share the model."})
    vllm_gpu_memory_utilization: float = field(default=0.9, metadata={"help": "Fraction of GPU memory for vLLM."})
    disable_tqdm: bool = field(default=False, metadata={"help": "Whether to leave the progress bar out."})

    def __post_init__(self):
        for name in ("benchmarks", "files", "chat_template_kwargs"):
            if isinstance(getattr(self, name), str):
                setattr(self, name, parse_json_object(name, getattr(self, name)))
        for name, values in (
            ("backend", BACKENDS),
            ("unparsable_answers", UNPARSABLE_ANSWERS),
            ("answer_format", ANSWER_FORMATS),
        ):
            value = getattr(self, name)
            if value not in values:
                raise ValueError(
                    f"`{name}` is {value!r}{nearest(str(value), values)}: use one of {', '.join(values)}."
                )
        for name in ("max_new_tokens", "batch_size", "num_completions", "vllm_tensor_parallel_size"):
            self._check_number(name, 1, math.inf, whole=True)
        if self.top_k is not None:
            self._check_number("top_k", 1, math.inf, whole=True)
        self._check_number("temperature", 0, math.inf)
        for name in ("top_p", "vllm_gpu_memory_utilization"):
            self._check_number(name, math.ulp(0), 1)
        check_template(self.prompt_template)

    def _check_number(self, name: str, low: float, high: float, *, whole: bool = False) -> None:
        value = getattr(self, name)
        # YAML takes `1e-1`, without a dot, for text.
        is_number = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
        if not is_number or not low <= value <= high or value == math.inf:
            kind = "a whole number" if whole else "a number"
            bounds = "at least 0" if low == 0 else "at least 1" if whole else "above 0 and at most 1"
            raise ValueError(f"`{name}` is {value!r}, but must be {kind}, {bounds}: correct it.")
