"""The trainers that the cost study compares: TRL's control and OBLR-PO's scopes, equal in everything but the algorithm."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, PrinterCallback
from trl import GRPOConfig, GRPOTrainer

from benchmarks.score_workload import CPU, build_model, qwen3_config
from oblr_trl import OBLRPOConfig, OBLRPOTrainer
from oblr_trl.baselines import WeightsChoice
from oblr_trl.data.prompt_sets import DataArguments, load_prompts
from oblr_trl.data.rewards import task_reward
from oblr_trl.scores import ScoreOutput, ScorePass, reference_scores

# Description and options; `grpo` is TRL's own trainer.
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "grpo": ("TRL's `GRPOTrainer`", {}),
    "all": ("scope `all`, sketches, SNR multiplier", {"lr_adaptation": "snr"}),
    "trust_region": ("the same with the trust region (the default)", {"trust_region_kl": 1e-12}),  # hardly moves
    "baseline_only": ("the same without the SNR learning rate", {"lr_adaptation": "none"}),
    # Whatever the group sizes here, a quarter of the prompts are scored.
    "sample": (
        "the default, where it takes equal weights: a quarter of the prompts scored",
        {"trust_region_kl": 1e-12, "score_min_prompts": 2},
    ),
    "sample_lm_head": (
        "the default, where it takes those of `lm_head`",
        {"trust_region_kl": 1e-12, "score_min_prompts": 2},
    ),
    "last_k": ("scope `last_k`, 1 block", {"lr_adaptation": "snr", "score_scope": "last_k", "score_last_k": 1}),
    "lm_head": ("scope `lm_head`", {"lr_adaptation": "snr", "score_scope": "lm_head"}),
    "exact": ("exact norms in addition to the sketches", {"lr_adaptation": "snr", "score_method": "exact"}),
    # One number per sequence serves the baseline; its SNR would mean nothing, and no learning rate follows it.
    "per_sequence": ("one forward and backward per sequence, norms alone", {"lr_adaptation": "none"}),
}
# Of methods that choose weights, what they are to choose.
_CHOICES = {"sample": "equal", "sample_lm_head": "lm_head"}
DEMO_MODEL = ".cache/tiny-Qwen3-chain_sum"
_DEMO_TASK = {"min_terms": 3, "max_terms": 3, "min_digits": 1, "max_digits": 1}


@dataclass(frozen=True)
class Case:
    """A policy and the shape of its generation batch; fields are documented by their `help`."""

    model: str = field(
        default="",
        metadata={
            "help": "Directory of a model instead of the random Qwen3, such as benchmarks/shapes/SmolLM2-135M; without weights there they "
            "are random. Its tokenizer is not used."
        },
    )
    hidden_size: int = field(default=256, metadata={"help": "Hidden features; the MLP has 3 times as many, heads 64."})
    num_layers: int = field(default=4, metadata={"help": "Decoder blocks."})
    vocab_size: int = field(default=2048, metadata={"help": "Vocabulary."})
    prompt_length: int = field(default=16, metadata={"help": "Tokens of every prompt."})
    completion_length: int = field(default=64, metadata={"help": "Tokens of every completion."})
    num_prompts: int = field(default=16, metadata={"help": "Prompts per step."})
    num_generations: int = field(default=2, metadata={"help": "Completions per prompt."})


class _Chosen(WeightsChoice):
    """The same choice from the first batch on."""

    def __init__(self, value: str) -> None:
        super().__init__()
        self.value = value

    def _cheapest(self) -> str:
        return self.value


class PerSequencePass(ScorePass):
    """Score norms by one forward and backward per sequence, as other projects take them."""

    def __call__(self, model_inputs, targets, token_weights, scoped=None) -> ScoreOutput:
        columns = (model_inputs["input_ids"], model_inputs["attention_mask"], token_weights)
        rows = zip(*(column.split(1) for column in columns), strict=True)
        norms = torch.cat([reference_scores(self.model, *row).square().sum(dim=1) for row in rows])
        no_log_probs = torch.full_like(token_weights, torch.nan)
        return ScoreOutput(no_log_probs, sketches=norms.sqrt().unsqueeze(1), squared_norms=norms)


def save_policy(case: Case, directory: Path, seed: int) -> None:
    """Write the policy in float32 and a tokenizer of the words `w3`, `w4`, ..., for every trainer and vLLM to load."""
    if case.model and any(Path(case.model).glob("*.safetensors")):
        model = AutoModelForCausalLM.from_pretrained(case.model, dtype=torch.float32)
    elif case.model:
        model = build_model(AutoConfig.from_pretrained(case.model), seed, CPU)
    else:
        model = build_model(qwen3_config(case.hidden_size, case.num_layers, case.vocab_size), seed, CPU)
    model.save_pretrained(directory)
    words = ["<pad>", "<eos>", "<unk>", *(f"w{i}" for i in range(3, model.config.vocab_size))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left"
    ).save_pretrained(directory)


def word_reward(completions: list[str], **kwargs: Any) -> list[float]:
    """Share of sevens among the characters: cheap, and different for every completion."""
    return [completion.count("7") / max(len(completion), 1) for completion in completions]


def random_trainers(
    case: Case, methods: list[str], directory: Path, *, rounds: int, seed: int, use_vllm: bool = False
) -> dict[str, Any]:
    """The trainers of `methods` on a policy of that shape and random prompts, set up for `rounds + 1` steps."""
    save_policy(case, directory / "policy", seed)
    generator = torch.Generator().manual_seed(seed)
    vocab_size = AutoConfig.from_pretrained(directory / "policy").vocab_size
    tokens = torch.randint(3, vocab_size, (64, case.prompt_length), generator=generator)
    prompts = Dataset.from_dict({"prompt": [" ".join(f"w{token}" for token in row) for row in tokens.tolist()]})
    options: dict[str, Any] = {
        "max_steps": rounds + 1,
        "seed": seed,
        "num_generations": case.num_generations,
        "max_completion_length": case.completion_length,
        "per_device_train_batch_size": case.num_prompts * case.num_generations,
        # No completion ends before its full length.
        "generation_kwargs": {"ignore_eos": True} if use_vllm else {"min_new_tokens": case.completion_length},
    }
    if use_vllm:
        options |= {"use_vllm": True, "vllm_max_model_length": case.prompt_length + case.completion_length}
    return _build(methods, directory, directory / "policy", word_reward, prompts, options)


def demo_trainers(model: str, methods: list[str], directory: Path, *, rounds: int, seed: int) -> dict[str, Any]:
    """
    The same on the demo's model, task and batch.

    Raises:
        `ValueError`: If the model has not been made.
    """
    if not (Path(model) / "config.json").exists():
        raise ValueError(
            f"`demo_model`: there is no model at {model!r}. Make it with `python -m examples.tiny_qwen3`, or leave it "
            "out with --demo_model ''."
        )
    prompts = load_prompts(DataArguments(task="chain_sum", task_params=_DEMO_TASK, train_size=512), with_test=False)
    options = {"max_steps": rounds + 1, "seed": seed, "num_generations": 8}
    options |= {"max_completion_length": 6, "per_device_train_batch_size": 128}
    return _build(methods, directory, Path(model), task_reward("chain_sum", _DEMO_TASK), prompts["train"], options)


def _build(
    methods: list[str], directory: Path, policy: Path, reward: Any, prompts: Dataset, options: dict[str, Any]
) -> dict[str, Any]:
    common = {
        "loss_type": "dr_grpo",
        "scale_rewards": "none",
        # Trained, but hardly moved: every step of every trainer meets the same policy.
        "learning_rate": 1e-9,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "use_cpu": True,
    }
    trainers = {}
    for method in methods:
        _, own_options = METHODS[method]
        settings = common | options | own_options | {"output_dir": str(directory / method)}
        is_control = method == "grpo"
        trainer = (GRPOTrainer if is_control else OBLRPOTrainer)(
            model=AutoModelForCausalLM.from_pretrained(policy),
            reward_funcs=reward,
            args=(GRPOConfig if is_control else OBLRPOConfig)(**settings),
            train_dataset=prompts,
            processing_class=AutoTokenizer.from_pretrained(policy, padding_side="left"),
        )
        if method == "per_sequence":
            trainer._score_pass = PerSequencePass(trainer.model)
        if method in _CHOICES:
            trainer._baseline_estimator.weights_choice = _Chosen(_CHOICES[method])
        trainer.remove_callback(PrinterCallback)
        trainers[method] = trainer
    return trainers
