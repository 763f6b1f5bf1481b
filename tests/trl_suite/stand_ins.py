"""Random models, a tokenizer and prompts under the names of the hub repositories that TRL's tests load.

A relative path wins over a hub name, so that the tests find the folders written here when they run beside them.
"""

import json
import re
import shutil
from pathlib import Path

import torch
import trl
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models
from transformers import (
    Cohere2Config,
    Cohere2ForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Glm4MoeConfig,
    Glm4MoeForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    NemotronHConfig,
    NemotronHForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2ForSequenceClassification,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3ForSequenceClassification,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

ORGANIZATION = "trl-internal-testing"
# Small, for speed. The tests script completions with token ids of Qwen's vocabulary, which `renumbered` maps to these.
VOCAB_SIZE = 512
PAD, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
_SPECIAL_TOKENS = {PAD: 151_643, START: 151_644, END: 151_645}
_TOOL_TOKENS = {"<tool_call>": 151_657, "</tool_call>": 151_658}
_WORDS = {
    " b": 293, " {": 314, ' "': 330, ">\n": 397, "out": 411, "dec": 450, '",': 497, "</": 522, "name": 606, '":': 788,
    " any": 894, "sh": 927, "'t": 944, "text": 1318, " know": 1414, " don": 1513, " doesn": 2765, '{"': 4913, ' {"': 5212,
    " tool": 5392, "hi": 6023, "call": 6659, "async": 7692, "step": 9520, "}}\n": 11_248, "rement": 13_477, "tool": 14_172,
    " help": 16_252, "arguments": 16_370, "Done": 17_453, "_tool": 22_785, "increment": 35_744, "multiply": 64_648,
    "_multiply": 93_054, '"}}\n': 95_642,
}  # fmt: skip
_FIRST_WORD = 256  # below are single characters, numbered as Qwen numbers them
_NUMBERS = {old: _FIRST_WORD + i for i, old in enumerate((_WORDS | _SPECIAL_TOKENS | _TOOL_TOKENS).values())}
# Without these the replies of tools would be longer than the tests expect.
_SPARING_WORDS = ("assistant", "user", "error", " got", " an", " unexpected", " keyword", " argument", "_response")
# Twelve to train on, in the order that a test expects, and two to evaluate on.
PROMPTS = (
    *(
        "Beautiful is better than",
        "Explicit is",
        "Simple is better",
        "Complex",
        "Flat is better than",
        "Sparse is better",
    ),
    *("Readability", "Special cases aren't special", "Although practicality beats", "Errors should never"),
    *("Unless explicitly", "In the face of ambiguity, refuse", "If the implementation is easy", "Now is"),
)
NUM_TEST_PROMPTS = 2

_COMMON = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "intermediate_size": 32,
    "pad_token_id": _NUMBERS[_SPECIAL_TOKENS[PAD]],
    "bos_token_id": None,
    "eos_token_id": _NUMBERS[_SPECIAL_TOKENS[END]],
}
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
_NEMOTRON = {
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "layers_block_type": ["mamba", "attention", "moe"],
    "mamba_num_heads": 8,
    "mamba_head_dim": 4,
    "mamba_n_groups": 1,
    "ssm_state_size": 16,
    "n_routed_experts": 4,
    "moe_shared_expert_intermediate_size": 32,
}
_CLASSIFIER = {"num_labels": 1}
# Name of the repository -> class, its configuration, and the chat template of TRL that its tokenizer has.
_MODELS = {
    "tiny-Cohere2ForCausalLM": (Cohere2ForCausalLM, Cohere2Config(**_COMMON, logit_scale=1.0), "cohere2"),
    "tiny-Gemma2ForCausalLM": (Gemma2ForCausalLM, Gemma2Config(**_COMMON, head_dim=2), "gemma"),
    "tiny-Glm4MoeForCausalLM": (
        Glm4MoeForCausalLM,
        Glm4MoeConfig(**_COMMON, **_EXPERTS, head_dim=2, n_routed_experts=4, attention_bias=True, use_qk_norm=True),
        "glm4moe",
    ),
    "tiny-GptOssForCausalLM": (
        GptOssForCausalLM,
        GptOssConfig(**_COMMON, num_local_experts=4, num_experts_per_tok=2),
        "gptoss",
    ),
    "tiny-LlamaForSequenceClassification-3.2": (
        LlamaForSequenceClassification,
        LlamaConfig(**_COMMON, **_CLASSIFIER),
        "llama3_2",
    ),
    "tiny-NemotronHForCausalLM-nano": (
        NemotronHForCausalLM,
        NemotronHConfig(**{**_COMMON, **_EXPERTS, **_NEMOTRON}),
        "nemotron_3_nano",
    ),
    "tiny-Qwen2ForCausalLM-2.5": (Qwen2ForCausalLM, Qwen2Config(**_COMMON), "qwen2_5"),
    "tiny-Qwen2ForSequenceClassification-2.5": (
        Qwen2ForSequenceClassification,
        Qwen2Config(**_COMMON, **_CLASSIFIER),
        "qwen2_5",
    ),
    "tiny-Qwen3ForCausalLM": (Qwen3ForCausalLM, Qwen3Config(**_COMMON, head_dim=32), "qwen3"),
    "tiny-Qwen3ForSequenceClassification": (
        Qwen3ForSequenceClassification,
        Qwen3Config(**_COMMON, **_CLASSIFIER, head_dim=32),
        "qwen3",
    ),
    "tiny-Qwen3MoeForCausalLM": (
        Qwen3MoeForCausalLM,
        Qwen3MoeConfig(**_COMMON, **_EXPERTS, head_dim=32, num_experts=4, norm_topk_prob=True),
        "qwen3",
    ),
}


def renumbered(source: str) -> str:
    """TRL's tests with token ids of this vocabulary; every scripted completion is a line with the end token in it."""
    lines = source.splitlines(keepends=True)
    marked = str(_SPECIAL_TOKENS[END])
    return "".join(
        re.sub(r"\b\d+\b", lambda number: str(_NUMBERS.get(int(number[0]), number[0])), line)
        if marked in line
        else line
        for line in lines
    )


def write_stand_ins(folder: Path, trl_source: Path) -> None:
    """Write all stand-ins below `folder`; the model with code of its own takes it from TRL's checkout `trl_source`."""
    for name, (model_class, config, template) in _MODELS.items():
        _save(folder / ORGANIZATION / name, model_class(config), template)
    _write_remote_model(folder / ORGANIZATION / "tiny-RemoteForCausalLM", trl_source)
    _write_prompts(folder / ORGANIZATION / "zen")


def _save(folder: Path, model: torch.nn.Module, template: str) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():  # far from the usual start, so that gradients of a model this small are not all about 0
        for parameter in model.parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator) + (parameter.dim() == 1))
    if model.can_generate():  # the end is one token of many: tests count on completions that have none
        model.generation_config.suppress_tokens = [_COMMON["eos_token_id"]]
    model.save_pretrained(folder)
    _tokenizer(template).save_pretrained(folder)


def _tokenizer(template: str) -> PreTrainedTokenizerFast:
    """Knows single characters, some words, and a made-up word for any other token; reads the longest that fits."""
    vocab = {chr(33 + i): i for i in range(94)} | {"\n": 198, " ": 220}
    vocab |= {word: _NUMBERS[old] for word, old in (_WORDS | _SPECIAL_TOKENS | _TOOL_TOKENS).items()}
    free = sorted(set(range(VOCAB_SIZE)) - set(vocab.values()))
    words = _SPARING_WORDS + tuple(f" w{i}" for i in range(len(free)))
    vocab |= dict(zip(words, free, strict=False))
    tokenizer = Tokenizer(
        models.WordPiece(vocab, unk_token=PAD, continuing_subword_prefix="", max_input_chars_per_word=10_000)
    )
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        unk_token=PAD,
        additional_special_tokens=[START],
        padding_side="left",
    )
    fast.add_tokens(list(_TOOL_TOKENS))
    fast.chat_template = (Path(trl.__file__).parent / "chat_templates" / f"{template}.jinja").read_text()
    return fast


def _write_remote_model(folder: Path, trl_source: Path) -> None:
    """A Llama that can only be loaded with `trust_remote_code=True`."""
    _save(folder, LlamaForCausalLM(LlamaConfig(**_COMMON)), "llama3_2")
    for path in (trl_source / "scripts/generate_tiny_models/for_causal_lm/_remote_code").glob("*_remote.py"):
        shutil.copy(path, folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "remote", "architectures": ["RemoteForCausalLM"]}
    config["auto_map"] = {
        "AutoConfig": "configuration_remote.RemoteConfig",
        "AutoModelForCausalLM": "modeling_remote.RemoteForCausalLM",
    }
    (folder / "config.json").write_text(json.dumps(config))


def _write_prompts(folder: Path) -> None:
    """Two configurations of a dataset repository: texts and conversations."""
    rows = {
        "standard_prompt_only": list(PROMPTS),
        "conversational_prompt_only": [[{"role": "user", "content": prompt}] for prompt in PROMPTS],
    }
    header = "---\nconfigs:\n"
    for config, prompts in rows.items():
        header += f"- config_name: {config}\n  data_files:\n"
        dataset = Dataset.from_dict({"prompt": prompts})
        cut = len(dataset) - NUM_TEST_PROMPTS
        for split, part in (("train", range(cut)), ("test", range(cut, len(dataset)))):
            path = folder / config / f"{split}.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            dataset.select(part).to_parquet(str(path))
            header += f"  - split: {split}\n    path: {config}/{split}.parquet\n"
    (folder / "README.md").write_text(header + "---\n")
