"""The parameters of a decoder, name by name, from its `config.json`: what `named_parameters` lists, without a model.

Covers the dense decoders with gated MLPs that the recipes use: Qwen3, Qwen2 and Llama.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

MODEL_TYPES = ("qwen3", "qwen2", "llama")
ATTENTION_LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP_LAYERS = ("gate_proj", "up_proj", "down_proj")
LINEAR_LAYERS = ATTENTION_LAYERS + MLP_LAYERS


@dataclass(frozen=True)
class ModelShape:
    """
    Shape of a causal language model.

    Args:
        model_type (`str`): `"qwen3"`, `"qwen2"` or `"llama"`.
        hidden_size (`int`): Hidden features d.
        intermediate_size (`int`): Features of the MLP.
        num_layers (`int`): Decoder blocks.
        num_heads (`int`): Query heads.
        num_kv_heads (`int`): Key and value heads.
        head_dim (`int`): Features of a head.
        vocab_size (`int`): Vocabulary V.
        tied (`bool`): Whether embedding and output projection are one matrix.
        max_positions (`int`): Longest sequence the model was made for.
        attention_bias (`bool`, *optional*, defaults to `False`): Whether all four attention projections have a bias.
    """

    model_type: str
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    tied: bool
    max_positions: int
    attention_bias: bool = False

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "ModelShape":
        """
        Read what `to_dict` of a configuration of transformers gives, defaults included.

        Raises:
            `ValueError`: For a model that is not a dense decoder of a known type, or a missing key.
        """
        model_type = config.get("model_type")
        if model_type not in MODEL_TYPES:
            raise ValueError(
                f"The planner knows the model types {', '.join(MODEL_TYPES)}, got {model_type!r}. Mixtures of experts and "
                "multimodal models are not covered: measure one step instead."
            )
        try:
            hidden_size, num_heads = config["hidden_size"], config["num_attention_heads"]
            return cls(
                model_type=model_type,
                hidden_size=hidden_size,
                intermediate_size=config["intermediate_size"],
                num_layers=config["num_hidden_layers"],
                num_heads=num_heads,
                num_kv_heads=config.get("num_key_value_heads") or num_heads,
                head_dim=config.get("head_dim") or hidden_size // num_heads,
                vocab_size=config["vocab_size"],
                tied=config["tie_word_embeddings"],
                max_positions=config["max_position_embeddings"],
                attention_bias=bool(config.get("attention_bias", False)),
            )
        except KeyError as error:
            raise ValueError(
                f"The model's config.json has no {error}, without which nothing can be counted."
            ) from error

    @property
    def query_size(self) -> int:
        """Features of all query heads together."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Features of all key heads together; those of the values are as many."""
        return self.num_kv_heads * self.head_dim

    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        """Weights of the linear layers of one block, `(d_out, d_in)`, by name."""
        d, inner = self.hidden_size, self.intermediate_size
        return {
            "q_proj": (self.query_size, d),
            "k_proj": (self.kv_size, d),
            "v_proj": (self.kv_size, d),
            "o_proj": (d, self.query_size),
            "gate_proj": (inner, d),
            "up_proj": (inner, d),
            "down_proj": (d, inner),
        }

    def parameter_shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Name and shape of every parameter, a tied output projection left out."""
        d = self.hidden_size
        yield "model.embed_tokens.weight", (self.vocab_size, d)
        for layer in range(self.num_layers):
            for name, shape in self._block_shapes():
                yield f"model.layers.{layer}.{name}", shape
        yield "model.norm.weight", (d,)
        if not self.tied:
            yield "lm_head.weight", (self.vocab_size, d)

    def _block_shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        for name, shape in self.linear_shapes().items():
            yield f"{_parent(name)}.{name}.weight", shape
            if self._has_bias(name):
                yield f"{_parent(name)}.{name}.bias", shape[:1]
        if self.model_type == "qwen3":
            yield "self_attn.q_norm.weight", (self.head_dim,)
            yield "self_attn.k_norm.weight", (self.head_dim,)
        yield "input_layernorm.weight", (self.hidden_size,)
        yield "post_attention_layernorm.weight", (self.hidden_size,)

    def _has_bias(self, name: str) -> bool:
        if self.model_type == "qwen2":  # always on queries, keys and values, and nowhere else
            return name in ("q_proj", "k_proj", "v_proj")
        return self.attention_bias and name in ATTENTION_LAYERS

    def num_parameters(self) -> int:
        """Number of parameters, each counted once."""
        return sum(math.prod(shape) for _, shape in self.parameter_shapes())

    def num_block_parameters(self) -> int:
        """Number of parameters of one block."""
        return sum(math.prod(shape) for _, shape in self._block_shapes())

    def num_linear_parameters(self) -> int:
        """Number of weights of the linear layers of all blocks, the output projection left out."""
        return self.num_layers * sum(math.prod(shape) for shape in self.linear_shapes().values())

    def kv_bytes_per_token(self, element_size: int = 2) -> int:
        """Keys and values of one token in all layers."""
        return 2 * self.num_layers * self.kv_size * element_size


def _parent(linear: str) -> str:
    return "self_attn" if linear in ATTENTION_LAYERS else "mlp"


def _qwen3(hidden: int, inner: int, layers: int, heads: int, *, tied: bool, max_positions: int) -> ModelShape:
    return ModelShape("qwen3", hidden, inner, layers, heads, 8, 128, 151936, tied, max_positions)


_QWEN3 = {
    "0.6B": (1024, 3072, 28, 16, True),
    "1.7B": (2048, 6144, 28, 16, True),
    "4B": (2560, 9728, 36, 32, True),
    "8B": (4096, 12288, 36, 32, False),
    "14B": (5120, 17408, 40, 40, False),
    "32B": (5120, 25600, 64, 64, False),
}
# From the `config.json` of the published models; used where the hub cannot be asked, and then said so. The base models were
# made for 32768 positions, the post-trained ones for 40960. There is no base model of 32B.
PUBLISHED_SHAPES: dict[str, ModelShape] = {
    f"Qwen/Qwen3-{size}{suffix}": _qwen3(*numbers, tied=tied, max_positions=max_positions)
    for size, (*numbers, tied) in _QWEN3.items()
    for suffix, max_positions in (("-Base", 32768), ("", 40960))
    if (size, suffix) != ("32B", "-Base")
}
PUBLISHED_SHAPES["meta-llama/Meta-Llama-3-70B"] = ModelShape(
    "llama", 8192, 28672, 80, 64, 8, 128, 128256, tied=False, max_positions=8192
)
