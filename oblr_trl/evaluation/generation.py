"""Completions of transformers or vLLM, from seeds that do not depend on what was generated before.

A batch of problems has a seed of its own, made of the run's seed, the benchmark and the batch's first row, so that an
evaluation that is killed and continued at a batch gives the completions of an uninterrupted one.
"""

import functools
import hashlib
import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from oblr_trl.evaluation.arguments import EvaluationArguments
from oblr_trl.evaluation.benchmarks import Problem, ProblemSet
from oblr_trl.evaluation.records import Answer, Answers

# (token ids of prompts, completions of each prompt, seed) -> completions
Generate = Callable[[Sequence[list[int]], int, int], list[Answer]]


def model_answers(args: EvaluationArguments, backend: str, problem_sets: Sequence[ProblemSet]) -> Answers:
    """
    The completions of a model. Prompts are encoded and measured at once; the weights are loaded when the first
    completion is asked for, which a finished evaluation never does.

    Raises:
        `ValueError`: an adapter for vLLM, conversations without a chat template, completions beyond the context.
    """
    name, revision = str(args.model_name_or_path), args.model_revision
    base = _base_model(name)
    if backend == "vllm" and base != name:
        raise ValueError(
            f"`model_name_or_path` {name!r} holds an adapter, which `backend: vllm` does not load: set `backend: "
            "transformers`, or merge it into its model with peft's `merge_and_unload`."
        )
    tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, padding_side="left")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    problems = [problem for problem_set in problem_sets for problem in problem_set.problems]
    prompt_ids = {(p["benchmark"], p["index"]): encode_prompt(tokenizer, p["prompt"], args) for p in problems}
    longest = max(map(len, prompt_ids.values()))
    config = AutoConfig.from_pretrained(base, revision=revision).get_text_config()
    # Some call it otherwise (GPT-2, by `attribute_map`), and models without position embeddings have none.
    context = getattr(config, "max_position_embeddings", None)
    if context is not None and longest + args.max_new_tokens > context:
        raise ValueError(
            f"`max_new_tokens` is {args.max_new_tokens}, but the model's context is {context} tokens and the longest "
            f"prompt takes {longest} of them: set it to at most {context - longest}."
        )
    eos = eos_token_ids(base, tokenizer, args)
    load = {"vllm": load_vllm, "transformers": load_transformers}[backend]
    generator = functools.cache(lambda: load(args, tokenizer, eos, longest + args.max_new_tokens))

    def answers(problems: Sequence[Problem], num_completions: int) -> list[Answer]:
        keys = [(problem["benchmark"], problem["index"]) for problem in problems]
        return generator()([prompt_ids[key] for key in keys], num_completions, batch_seed(args.seed, *keys[0]))

    return answers


def batch_seed(seed: int, benchmark: str, first_index: int) -> int:
    """Seed of the batch of problems of a benchmark that begins with row `first_index`."""
    digest = hashlib.sha256(f"{seed}/{benchmark}/{first_index}".encode()).digest()
    return int.from_bytes(digest[:4], "big")


def choose_backend(wanted: str) -> str:
    """The backend asked for, or by `"auto"` vLLM where it is installed; `ValueError` where vLLM is missing."""
    installed = importlib.util.find_spec("vllm") is not None
    if wanted == "vllm" and not installed:
        raise ValueError("`backend` is 'vllm', which is not installed: install it, or set `backend: transformers`.")
    return wanted if wanted != "auto" else "vllm" if installed else "transformers"


def encode_prompt(tokenizer: Any, prompt: Any, args: EvaluationArguments) -> list[int]:
    """Token ids as TRL's trainers encode a prompt: text by the tokenizer, a conversation by its chat template."""
    if isinstance(prompt, str):
        return tokenizer(prompt).input_ids
    kwargs: Any = args.chat_template_kwargs or {}
    kwargs = {**kwargs, "add_generation_prompt": True, "tokenize": True, "return_dict": True}
    return tokenizer.apply_chat_template(prompt, **kwargs)["input_ids"]


def load_transformers(args: EvaluationArguments, tokenizer: Any, eos: list[int], max_length: int) -> Generate:
    """`model.generate` on `args.batch_size` sequences at a time, padded on the left, on the GPU if there is one."""
    model: Any = AutoModelForCausalLM.from_pretrained(
        str(args.model_name_or_path), revision=args.model_revision, dtype=args.dtype
    )
    model = model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    # Replaces the model's own, whose `top_k` or `repetition_penalty` would otherwise count too.
    model.generation_config = GenerationConfig(
        do_sample=args.temperature > 0,
        max_new_tokens=args.max_new_tokens,
        eos_token_id=eos,
        pad_token_id=tokenizer.pad_token_id,
        **(_sampling(args) if args.temperature > 0 else {}),
    )

    @torch.inference_mode()
    def generate(prompt_ids: Sequence[list[int]], num_completions: int, seed: int) -> list[Answer]:
        torch.manual_seed(seed)
        rows = [ids for ids in prompt_ids for _ in range(num_completions)]
        samples = []
        for start in range(0, len(rows), args.batch_size):
            batch = tokenizer.pad({"input_ids": rows[start : start + args.batch_size]}, return_tensors="pt")
            batch = batch.to(model.device)
            sequences = model.generate(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
            for ids in sequences[:, batch["input_ids"].size(1) :].tolist():
                end = next((position for position, token in enumerate(ids) if token in eos), None)
                text = tokenizer.decode(ids[:end], skip_special_tokens=True)
                samples.append((text, len(ids) if end is None else end + 1, end is None))
        return [_answer(samples[i : i + num_completions]) for i in range(0, len(samples), num_completions)]

    return generate


def load_vllm(args: EvaluationArguments, tokenizer: Any, eos: list[int], max_length: int) -> Generate:
    """`vllm.LLM`, with a seed of its own for every completion."""
    from vllm import LLM, SamplingParams

    engine = LLM(
        model=args.model_name_or_path,
        revision=args.model_revision,
        dtype=args.dtype,
        tensor_parallel_size=args.vllm_tensor_parallel_size,
        gpu_memory_utilization=args.vllm_gpu_memory_utilization,
        max_model_len=max_length,
        generation_config="vllm",  # not the model's own sampling parameters
        seed=args.seed,
    )
    settings = {**_sampling(args), "max_tokens": args.max_new_tokens, "stop_token_ids": eos}

    def generate(prompt_ids: Sequence[list[int]], num_completions: int, seed: int) -> list[Answer]:
        # vLLM gives completion j of a request the seed of the request plus j.
        seeds = range(seed, seed + len(prompt_ids) * num_completions, num_completions)
        parameters = [SamplingParams(n=num_completions, seed=first, **settings) for first in seeds]
        outputs = engine.generate([{"prompt_token_ids": ids} for ids in prompt_ids], parameters, use_tqdm=False)
        return [_answer([(c.text, len(c.token_ids), c.finish_reason == "length") for c in o.outputs]) for o in outputs]

    return generate


def _sampling(args: EvaluationArguments) -> dict[str, Any]:
    return {"temperature": args.temperature, "top_p": args.top_p, "top_k": args.top_k or 0}  # 0: of all tokens


def _answer(samples: Sequence[tuple[str, int, bool]]) -> Answer:
    texts, num_tokens, truncated = zip(*samples, strict=True)
    return {"completions": list(texts), "num_tokens": list(num_tokens), "truncated": list(truncated)}


def eos_token_ids(base_model: str, tokenizer: Any, args: EvaluationArguments) -> list[int]:
    """Tokens that end a completion: of the generation configuration, of the tokenizer, and `stop_token_ids`."""
    try:
        configured = GenerationConfig.from_pretrained(base_model, revision=args.model_revision or "main").eos_token_id
    except OSError:  # a model may come without one
        configured = None
    configured = configured if isinstance(configured, list) else [configured]
    return sorted({tokenizer.eos_token_id, *(args.stop_token_ids or []), *configured} - {None})


def _base_model(name: str) -> str:
    """The model itself, or the one that a local adapter belongs to."""
    if not (Path(name) / "adapter_config.json").is_file():
        return name
    return str(PeftConfig.from_pretrained(name).base_model_name_or_path)
