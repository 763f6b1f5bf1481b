"""A Qwen3 of a million parameters or so, and its tokenizer, made without any hub: what demo, studies and tests train."""

from collections.abc import Sequence

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

PRINTABLE_ASCII = [chr(code) for code in range(32, 127)] + ["\n"]


def build_tokenizer(
    texts: Sequence[str], *, vocab_size: int = 192, letters_apart: bool = False
) -> PreTrainedTokenizerFast:
    """
    Build a byte-pair tokenizer over printable ASCII that keeps every digit apart, on request letters too, and pads on the left.
    Its merges are learnt from `texts`: the words of the task's question become one token each.
    """
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"[0-9A-Za-z]" if letters_apart else r"[0-9]"), "isolated"),
            pre_tokenizers.Split(" ", "merged_with_next"),
        ]
    )
    tokenizer.decoder = decoders.Fuse()
    special_tokens = ["<pad>", "<bos>", "<eos>", "<unk>"]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=special_tokens, initial_alphabet=PRINTABLE_ASCII, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side="left",
        truncation_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=256,
    )


def build_model(
    tokenizer: PreTrainedTokenizerFast, *, hidden_size: int = 128, num_hidden_layers: int = 4
) -> Qwen3ForCausalLM:
    """A Qwen3, by default of less than a million parameters; heads of 32, the minimum that vLLM's attention supports."""
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=3 * hidden_size,
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=hidden_size // 32,
        num_key_value_heads=hidden_size // 64,
        head_dim=32,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        initializer_range=0.04,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return Qwen3ForCausalLM(config)
