"""Random models, a character tokenizer, prompts and a reward: small enough that the slow oracle is quick."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from oblr_trl import OBLRPOConfig
from oblr_trl.metrics import CURVATURE, KL, PREDICTED_GAIN

# `OBLR_TEST_DEVICE=cuda` trains on a GPU where nothing else is said.
ON_CPU = os.environ.get("OBLR_TEST_DEVICE", "cpu") == "cpu"
# Metrics that are measured from the batch after a step: unknown at the first.
OF_LAST_STEP = (CURVATURE, KL, PREDICTED_GAIN)
ALPHABET = "0123456789+-=? abcdefghij"
VOCAB_SIZE = 40
ARCHITECTURES = ("qwen3", "qwen3_untied", "llama", "gpt2", "qwen2", "qwen3_lora")


def tiny_model(architecture="qwen3", *, hidden_size=64, num_layers=3, seed=0):
    """A randomly initialised causal language model whose weights, norm scales and biases are all generic."""
    torch.manual_seed(seed)
    if architecture == "gpt2":
        dropout_free = {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
        config = GPT2Config(
            vocab_size=VOCAB_SIZE, n_embd=hidden_size, n_layer=num_layers, n_head=2, n_positions=64, **dropout_free
        )
        config.bos_token_id, config.eos_token_id, config.pad_token_id = None, 1, 0
        model = GPT2LMHeadModel(config)
    else:
        common = {
            "vocab_size": VOCAB_SIZE,
            "hidden_size": hidden_size,
            "intermediate_size": 2 * hidden_size,
            "num_hidden_layers": num_layers,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "max_position_embeddings": 64,
            "tie_word_embeddings": architecture != "qwen3_untied",
            "pad_token_id": 0,
            "bos_token_id": None,
            "eos_token_id": 1,
        }
        if architecture.startswith("qwen3"):
            model = Qwen3ForCausalLM(Qwen3Config(head_dim=32, **common))
        elif architecture == "qwen2":
            model = Qwen2ForCausalLM(Qwen2Config(**common))
        else:
            model = LlamaForCausalLM(LlamaConfig(**common))
    with torch.no_grad():  # zero biases and unit scales would hide mistakes in their rules
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    if architecture == "qwen3_lora":
        lora = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False)
        model = get_peft_model(model, lora)
    return model


def random_batch(padding="left", *, batch_size=5, prompt_length=7, completion_length=9, seed=0):
    """`input_ids`, `attention_mask`, `completion_mask` with ragged rows; the first row has an empty completion.

    With left padding the prompts are padded on the left and the completions on the right, as TRL does; with right padding
    the whole sequence is.
    """
    generator = torch.Generator().manual_seed(seed)

    def integer(low, high):
        return int(torch.randint(low, high, (), generator=generator))

    length = prompt_length + completion_length
    input_ids = torch.randint(2, VOCAB_SIZE, (batch_size, length), generator=generator)
    attention_mask = torch.ones(batch_size, length, dtype=torch.long)
    completion_mask = torch.ones(batch_size, completion_length, dtype=torch.long)
    for i in range(batch_size):
        num_tokens = 0 if i == 0 else integer(1, completion_length + 1)
        completion_mask[i, num_tokens:] = 0
        attention_mask[i, prompt_length + num_tokens :] = 0
        if padding == "left":
            attention_mask[i, : integer(0, prompt_length - 1)] = 0
    input_ids[attention_mask == 0] = 0
    return input_ids, attention_mask, completion_mask


def tiny_tokenizer():
    vocab = {"<pad>": 0, "<eos>": 1, "<unk>": 2} | {character: i + 3 for i, character in enumerate(ALPHABET)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left"
    )


def prompts():
    return Dataset.from_dict({"prompt": [f"{a}+{b}=" for a in range(8) for b in range(8)]})


def digit_reward(completions, **kwargs):
    """Number of digits, over 8: graded, so that groups of equal rewards are rare."""
    return [sum(character.isdigit() for character in completion) / 8 for completion in completions]


def construct(trainer_class, config_class, output_dir, *, model=None, reward=digit_reward, trainer=None, **overrides):
    """A trainer of a tiny model, on the CPU unless [`ON_CPU`] is off; `trainer` are further arguments of the trainer, `overrides` options."""
    options = {
        "output_dir": str(output_dir),
        "per_device_train_batch_size": 32,
        "num_generations": 8,
        "max_completion_length": 8,
        "learning_rate": 1e-3,
        "max_steps": 3,
        "use_cpu": ON_CPU,
        "bf16": False,
        "report_to": "none",
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "seed": 3,
    }
    if issubclass(config_class, OBLRPOConfig):
        options["lr_adaptation"] = "snr"  # a rate that is known; the trust region has tests of its own
    arguments = {"train_dataset": prompts(), "processing_class": tiny_tokenizer()}
    return trainer_class(
        model=tiny_model(num_layers=2) if model is None else model,
        reward_funcs=reward,
        args=config_class(**(options | overrides)),
        **(arguments | (trainer or {})),
    )


def train(trainer_class, config_class, output_dir, *, resume_from_checkpoint=None, **options):
    """Train what [`construct`] makes for a few steps and return the trainer."""
    keywords = ("callbacks", "optimizers", "peft_config")
    arguments = {name: options.pop(name) for name in keywords if name in options}
    trainer = construct(trainer_class, config_class, output_dir, trainer=arguments, **options)
    trainer.train(resume_from_checkpoint=resume_from_checkpoint)
    return trainer


def algorithm_state(trainer):
    """What a checkpoint would hold of the algorithm, to be compared."""
    state = trainer._algorithm_state()
    return {name: value.tolist() if isinstance(value, torch.Tensor) else value for name, value in state.items()}


def logged(trainer, name):
    """The values of one metric over the training steps."""
    return [row[name] for row in trainer.state.log_history if name in row]
