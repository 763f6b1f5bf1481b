"""Sampling n completions of each prompt by transformers or vLLM, from seeds that do not depend on what was done before.

A batch of problems has a seed of its own, made of the run's seed, the benchmark and the batch's first row, so that an
evaluation that is killed and resumed at a batch gives the completions of an uninterrupted one.
"""

import hashlib
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, Protocol

import torch
from peft import PeftConfig
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from oblr_trl.evaluation.arguments import EvaluationArguments


@dataclass(frozen=True)
class Completion:
    """What a model said: the text, its number of tokens, and whether it was cut off at `max_new_tokens`."""

    text: str
    num_tokens: int | None = None
    truncated: bool | None = None


class Generator(Protocol):
    """Whatever answers prompts."""

    def generate(self, prompt_ids: Sequence[list[int]], *, num_completions: int, seed: int) -> list[list[Completion]]:
        """`num_completions` completions of each prompt."""


def batch_seed(seed: int, benchmark: str, first_index: int) -> int:
    """Seed of the batch of problems of a benchmark that begins with row `first_index`."""
    digest = hashlib.sha256(f"{seed}/{benchmark}/{first_index}".encode()).digest()
    return int.from_bytes(digest[:4], "big")


def choose_backend(wanted: str) -> str:
    """
    vLLM where it is installed, else transformers, unless one of them is asked for.

    Raises:
        `ValueError`: vLLM is asked for and not installed.
    """
    installed = importlib.util.find_spec("vllm") is not None
    if wanted == "vllm" and not installed:
        raise ValueError(
            "`backend` is 'vllm', which is not installed: `pip install 'oblr_trl[vllm]'`, or set `backend: transformers`."
        )
    if wanted == "auto":
        return "vllm" if installed else "transformers"
    return wanted


def check_adapter(args: EvaluationArguments, backend: str) -> None:
    """Refuse an adapter for vLLM; transformers loads it with its model."""
    name = str(args.model_name_or_path).rstrip("/")
    if backend == "vllm" and _base_model(args) != args.model_name_or_path:
        raise ValueError(
            f"`model_name_or_path` {name!r} holds an adapter, which `backend: vllm` does not load: set `backend: transformers`, or "
            f"merge it into its model and evaluate {name + '-merged'!r}:\n"
            'python -c "from peft import AutoPeftModelForCausalLM as M; from transformers import AutoTokenizer as T; '
            f"M.from_pretrained('{name}', dtype='auto').merge_and_unload().save_pretrained('{name}-merged'); "
            f"T.from_pretrained('{name}').save_pretrained('{name}-merged')\""
        )


def load_tokenizer(args: EvaluationArguments) -> Any:
    """The model's tokenizer, padding on the left."""
    tokenizer = AutoTokenizer.from_pretrained(
        args.model_name_or_path, revision=args.model_revision, padding_side="left"
    )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def encode_prompts(
    tokenizer: Any, prompts: Sequence[Any], chat_template_kwargs: dict[str, Any] | None = None
) -> list[list[int]]:
    """
    Token ids of prompts as TRL's trainers encode them: text by the tokenizer, conversations through its chat template.

    Raises:
        `ValueError`: conversations without a chat template.
    """
    if isinstance(prompts[0], str):
        return [tokenizer(prompt).input_ids for prompt in prompts]
    if tokenizer.chat_template is None:
        raise ValueError(
            "The prompts are conversations, but the tokenizer has no chat template: set `conversational: false`, or "
            "evaluate a model whose tokenizer has one."
        )
    encoded = tokenizer.apply_chat_template(
        list(prompts), add_generation_prompt=True, tokenize=True, return_dict=True, **(chat_template_kwargs or {})
    )
    return encoded["input_ids"]


def check_lengths(args: EvaluationArguments, longest_prompt: int) -> None:
    """Refuse completions that would leave the model's context; reads the configuration, not the weights."""
    config = AutoConfig.from_pretrained(_base_model(args), revision=args.model_revision).get_text_config()
    # Models without position embeddings, such as Mamba, have no such limit.
    context = getattr(config, "max_position_embeddings", None)
    if context is not None and longest_prompt + args.max_new_tokens > context:
        raise ValueError(
            f"`max_new_tokens` is {args.max_new_tokens}, but the model's context is {context} tokens and the longest prompt "
            f"takes {longest_prompt} of them: set it to at most {context - longest_prompt}."
        )


def load_generator(args: EvaluationArguments, tokenizer: Any, backend: str, *, longest_prompt: int) -> Generator:
    """Load the model; `longest_prompt` is in tokens."""
    if backend == "vllm":
        return VLLMGenerator(args, tokenizer, max_model_len=longest_prompt + args.max_new_tokens)
    return TransformersGenerator(args, tokenizer)


class TransformersGenerator:
    """`model.generate` on batches padded on the left, `args.batch_size` sequences at a time, on the GPU if there is one."""

    def __init__(self, args: EvaluationArguments, tokenizer: Any):
        assert args.model_name_or_path is not None
        self.args, self.tokenizer = args, tokenizer
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model: Any = AutoModelForCausalLM.from_pretrained(
            args.model_name_or_path,
            revision=args.model_revision,
            dtype=args.dtype,
            attn_implementation=args.attn_implementation,
        )
        self.model = model.to(device).eval()
        self.eos_token_ids = eos_token_ids(args, tokenizer)
        greedy = args.temperature == 0
        # Replaces the model's own, whose `top_k` or `repetition_penalty` would otherwise count too.
        self.model.generation_config = GenerationConfig(
            do_sample=not greedy,
            temperature=None if greedy else args.temperature,
            top_p=None if greedy else args.top_p,
            top_k=None if greedy else (args.top_k or 0),
            max_new_tokens=args.max_new_tokens,
            eos_token_id=self.eos_token_ids,
            pad_token_id=tokenizer.pad_token_id,
        )

    @torch.inference_mode()
    def generate(self, prompt_ids: Sequence[list[int]], *, num_completions: int, seed: int) -> list[list[Completion]]:
        torch.manual_seed(seed)
        rows = [ids for ids in prompt_ids for _ in range(num_completions)]
        completions: list[Completion] = []
        for start in range(0, len(rows), self.args.batch_size):
            batch = self.tokenizer.pad({"input_ids": rows[start : start + self.args.batch_size]}, return_tensors="pt")
            batch = batch.to(self.model.device)
            ids = self.model.generate(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
            completions.extend(self._completion(row) for row in ids[:, batch["input_ids"].size(1) :].tolist())
        return [completions[i : i + num_completions] for i in range(0, len(completions), num_completions)]

    def _completion(self, ids: list[int]) -> Completion:
        end = next((position for position, token in enumerate(ids) if token in self.eos_token_ids), None)
        return Completion(
            text=self.tokenizer.decode(ids[:end], skip_special_tokens=True),
            num_tokens=len(ids) if end is None else end + 1,
            truncated=end is None,
        )


class VLLMGenerator:
    """`vllm.LLM`, every completion with a seed of its own."""

    def __init__(self, args: EvaluationArguments, tokenizer: Any, *, max_model_len: int):
        from vllm import LLM

        self.args = args
        self.eos_token_ids = eos_token_ids(args, tokenizer)
        self.engine = LLM(
            model=args.model_name_or_path,
            revision=args.model_revision,
            dtype=args.dtype,
            tensor_parallel_size=args.vllm_tensor_parallel_size,
            gpu_memory_utilization=args.vllm_gpu_memory_utilization,
            max_model_len=max_model_len,
            generation_config="vllm",  # not the model's own sampling parameters
            seed=args.seed,
        )

    def generate(self, prompt_ids: Sequence[list[int]], *, num_completions: int, seed: int) -> list[list[Completion]]:
        from vllm import SamplingParams

        seeds = count(seed, num_completions)  # vLLM gives completion j of a request the seed of the request plus j
        parameters = [
            SamplingParams(
                n=num_completions,
                temperature=self.args.temperature,
                top_p=self.args.top_p,
                top_k=self.args.top_k or 0,
                max_tokens=self.args.max_new_tokens,
                stop_token_ids=self.eos_token_ids,
                seed=next(seeds),
            )
            for _ in prompt_ids
        ]
        prompts = [{"prompt_token_ids": ids} for ids in prompt_ids]
        outputs = self.engine.generate(prompts, parameters, use_tqdm=False)
        return [
            [
                Completion(
                    text=sample.text, num_tokens=len(sample.token_ids), truncated=sample.finish_reason == "length"
                )
                for sample in output.outputs
            ]
            for output in outputs
        ]


def eos_token_ids(args: EvaluationArguments, tokenizer: Any) -> list[int]:
    """The tokens that end a completion: those of the generation configuration, of the tokenizer, and `stop_token_ids`."""
    try:
        configured = GenerationConfig.from_pretrained(
            _base_model(args), revision=args.model_revision or "main"
        ).eos_token_id
    except OSError:  # a model may come without one
        configured = None
    found = {
        tokenizer.eos_token_id,
        *(args.stop_token_ids or []),
        *(configured if isinstance(configured, list) else [configured]),
    }
    return sorted(found - {None})


def _base_model(args: EvaluationArguments) -> str:
    """The model itself, or the one that a local adapter belongs to."""
    assert args.model_name_or_path is not None
    if not (Path(args.model_name_or_path) / "adapter_config.json").is_file():
        return args.model_name_or_path
    base = PeftConfig.from_pretrained(args.model_name_or_path).base_model_name_or_path
    assert base is not None
    return base
