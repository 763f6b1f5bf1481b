"""A chat template, a tokenizer with its special tokens, a model and questions: the smallest that can converse."""

import string

import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

from tests.tiny_models import tiny_model

SPECIAL_TOKENS = ["<pad>", "<eos>", "<unk>", "<user>", "<assistant>", "<tool>", "<call>", "</call>", "<image>"]
CHAT_TEMPLATE = (
    "{% for m in messages %}"
    "{{ {'user': '<user>', 'tool': '<tool>'}.get(m.role, '<assistant>') }}"
    "{% if m.content is string %}{{ m.content }}{% else %}{% for part in m.content %}"
    "{{ '<image>' if part.type == 'image' else part.text }}{% endfor %}{% endif %}"
    "{% for call in m.tool_calls or [] %}<call>{{ call.function | tojson }}</call>{% endfor %}"
    "<eos>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
CHAT_VOCAB_SIZE = 112


def chat_tokenizer():
    vocab = {token: i for i, token in enumerate(SPECIAL_TOKENS + list(string.printable[:95]))}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        additional_special_tokens=SPECIAL_TOKENS[3:],
        padding_side="left",
    )
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped


def chat_model(model_class=Qwen3ForCausalLM):
    config = tiny_model(num_layers=2).config
    config.vocab_size, config.max_position_embeddings = CHAT_VOCAB_SIZE, 256
    torch.manual_seed(0)
    return model_class(config)


def questions():
    return Dataset.from_dict(
        {"prompt": [[{"role": "user", "content": f"{a}+{b}"}] for a in range(4) for b in range(4)]}
    )
