"""The trainers that the cost study compares: TRL's control and OBLR-PO's scopes, equal in everything but the algorithm."""

import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, PrinterCallback
from trl import GRPOConfig, GRPOTrainer

from benchmarks.score_pass import ScorePassArguments, build_model
from oblr_trl import OBLRPOConfig, OBLRPOTrainer
from oblr_trl.data.prompt_sets import DataArguments, load_prompts
from oblr_trl.data.rewards import task_reward
from oblr_trl.scores import ScoreOutput, reference_scores

METHODS = {
    "grpo": "TRL's `GRPOTrainer`",
    "all": "scope `all`, sketches (the default)",
    "baseline_only": "the same without the SNR learning rate",
    "last_k": "scope `last_k`, 1 block",
    "lm_head": "scope `lm_head`",
    "exact": "scope `all`, exact norms beside the sketches",
    "per_sequence": "one forward and backward per sequence, norms alone",
}
OPTIONS: dict[str, dict[str, Any]] = {
    "all": {},
    "baseline_only": {"lr_adaptation": "none"},
    "last_k": {"score_scope": "last_k", "score_last_k": 1},
    "lm_head": {"score_scope": "lm_head"},
    "exact": {"score_method": "exact"},
    "per_sequence": {"lr_adaptation": "none"},
}
DEMO_MODEL = ".cache/tiny-Qwen3-chain_sum"
DEMO_TASK = {"min_terms": 3, "max_terms": 3, "min_digits": 1, "max_digits": 1}


@dataclass(frozen=True)
class Case:
    """
    One policy and the shape of its generation batch.

    Args:
        hidden_size (`int`): Hidden features d; the MLP has 3 d, heads have 64.
        num_layers (`int`): Decoder blocks.
        vocab_size (`int`): Vocabulary.
        prompt_length (`int`): Tokens of every prompt.
        completion_length (`int`): Tokens of every completion: no end-of-sequence token is sampled.
        num_prompts (`int`): Prompts per step and process.
        num_generations (`int`): Completions per prompt, G.
    """

    hidden_size: int
    num_layers: int
    vocab_size: int
    prompt_length: int
    completion_length: int
    num_prompts: int
    num_generations: int


class PerSequenceTrainer(OBLRPOTrainer):
    """OBLRPOTrainer whose score norms come from one forward and backward per sequence, as other projects take them."""

    def _score_completions(self, output: dict[str, Any], loss_mask: Tensor) -> ScoreOutput:
        start = time.perf_counter()
        input_ids = torch.cat([output["prompt_ids"], output["completion_ids"]], dim=1)
        attention_mask = torch.cat([output["prompt_mask"], output["completion_mask"]], dim=1)
        rows = zip(input_ids.split(1), attention_mask.split(1), loss_mask.split(1), strict=True)
        norms = self.accelerator.gather(
            torch.cat(
                [reference_scores(self.model, *row, temperature=self.temperature).square().sum(1) for row in rows]
            )
        )
        self._log_train_metrics({"score/pass_time": time.perf_counter() - start})
        # One number per sequence serves the baseline; its SNR would mean nothing, and no learning rate follows it here.
        return ScoreOutput(torch.empty(0), sketches=norms.sqrt().unsqueeze(1), squared_norms=norms)


def word_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """Words `w3`, `w4`, ... beside three special tokens."""
    words = ["<pad>", "<eos>", "<unk>", *(f"w{i}" for i in range(3, vocab_size))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left"
    )


def random_prompts(case: Case, size: int, seed: int) -> Dataset:
    """Prompts of random words, all of one length."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(3, case.vocab_size, (size, case.prompt_length), generator=generator)
    return Dataset.from_dict({"prompt": [" ".join(f"w{token}" for token in row) for row in tokens.tolist()]})


def word_reward(completions: list[str], **kwargs: Any) -> list[float]:
    """Share of sevens among the characters: cheap, and different for every completion."""
    return [completion.count("7") / max(len(completion), 1) for completion in completions]


def save_policy(case: Case, directory: Path, seed: int) -> None:
    """Write a random Qwen3 and its tokenizer where every trainer, and vLLM, can load them from."""
    arguments = ScorePassArguments(hidden_size=case.hidden_size, num_layers=case.num_layers, seed=seed)
    model = build_model(arguments, case.vocab_size, torch.device("cpu"))
    model.save_pretrained(directory)
    word_tokenizer(case.vocab_size).save_pretrained(directory)


def random_trainers(
    case: Case, methods: list[str], directory: Path, *, rounds: int, seed: int, use_vllm: bool = False
) -> dict[str, Any]:
    """The trainers of `methods` on a random policy of the shape; its files are written by the first process."""
    policy = directory / "policy"
    if use_vllm:
        generation = {"use_vllm": True, "generation_kwargs": {"ignore_eos": True}}
        generation["vllm_max_model_length"] = case.prompt_length + case.completion_length
    else:
        generation = {"generation_kwargs": {"min_new_tokens": case.completion_length}}
    options = {
        "num_generations": case.num_generations,
        "max_completion_length": case.completion_length,
        "per_device_train_batch_size": case.num_prompts * case.num_generations,
        **generation,
    }
    prompts = random_prompts(case, 64, seed)
    return _build(methods, policy, word_reward, prompts, options, directory, rounds=rounds, seed=seed)


def demo_trainers(model: str, methods: list[str], directory: Path, *, rounds: int, seed: int) -> dict[str, Any]:
    """
    The trainers of `methods` on the demo's model, task and batch.

    Raises:
        `ValueError`: If the model has not been made.
    """
    if not (Path(model) / "config.json").exists():
        raise ValueError(
            f"`demo_model`: there is no model at {model!r}. Make it with `python -m examples.tiny_qwen3`, or leave it "
            "out with --demo_model ''."
        )
    prompts = load_prompts(DataArguments(task="chain_sum", task_params=DEMO_TASK, train_size=512), with_test=False)
    options = {"num_generations": 8, "max_completion_length": 6, "per_device_train_batch_size": 128}
    reward = task_reward("chain_sum", DEMO_TASK)
    return _build(methods, Path(model), reward, prompts["train"], options, directory, rounds=rounds, seed=seed)


def _build(
    methods: list[str],
    policy: Path,
    reward: Callable[..., Any],
    prompts: Dataset,
    options: dict[str, Any],
    directory: Path,
    *,
    rounds: int,
    seed: int,
) -> dict[str, Any]:
    common = {
        "loss_type": "dr_grpo",
        "scale_rewards": "none",
        "beta": 0.0,
        # Trained, but hardly moved: every step of every trainer meets the same policy.
        "learning_rate": 1e-9,
        "lr_scheduler_type": "constant",
        "max_steps": rounds + 1,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "use_cpu": True,
        # accelerate takes a backend as a wish for a process group, also where there is a single process.
        "ddp_backend": "gloo" if int(os.environ.get("WORLD_SIZE", "1")) > 1 else None,
        "seed": seed,
    }
    trainers = {}
    for method in methods:
        settings = common | options | {"output_dir": str(directory / method)}
        if method == "grpo":
            trainer_class, args = GRPOTrainer, GRPOConfig(**settings)
        else:
            trainer_class = PerSequenceTrainer if method == "per_sequence" else OBLRPOTrainer
            args = OBLRPOConfig(**settings, **OPTIONS[method])
        trainer = trainer_class(
            model=AutoModelForCausalLM.from_pretrained(policy),
            reward_funcs=reward,
            args=args,
            train_dataset=prompts,
            processing_class=AutoTokenizer.from_pretrained(policy, padding_side="left"),
        )
        trainer.remove_callback(PrinterCallback)
        trainers[method] = trainer
    return trainers


def case_record(case: Case) -> dict[str, int]:
    """The case as the record names it."""
    return asdict(case)
