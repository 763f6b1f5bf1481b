"""Tables of `docs/scale.md`: the cost of OBLR-PO's parts from 4B to 70B, by arithmetic.

    python -m benchmarks.scale

Rewrites what stands between `<!-- table: NAME -->` and `<!-- end -->`; the sentences around it are written by hand.
"""

import argparse
import json
import math
import re
from pathlib import Path
from typing import Any, NamedTuple

from transformers import LlamaConfig

from benchmarks.sections.tables import markdown_table
from oblr_trl.planning.memory import projection_bytes
from oblr_trl.planning.models import PUBLISHED, linear_layers, meta_model
from oblr_trl.scores.projections import projected_widths
from oblr_trl.scores.scopes import resolve_scope

LLAMA3_70B = LlamaConfig(
    vocab_size=128256,
    hidden_size=8192,
    intermediate_size=28672,
    num_hidden_layers=80,
    num_attention_heads=64,
    num_key_value_heads=8,
    max_position_embeddings=8192,
)
MODELS = {
    "Qwen3-4B": meta_model(PUBLISHED["Qwen/Qwen3-4B-Base"]),
    "Qwen3-8B": meta_model(PUBLISHED["Qwen/Qwen3-8B-Base"]),
    "Qwen3-32B": meta_model(PUBLISHED["Qwen/Qwen3-32B"]),
    "Llama-3-70B": meta_model(LLAMA3_70B),
}
DOCUMENT = Path("docs/scale.md")
GPU_RECORD = Path("benchmarks/results/gpu.json")
LENGTH, SKETCH_DIM, LAST_K = 4096, 4096, 2
_NOT_MEASURED = "not measured"

Row = dict[str, str]


class FLOPs(NamedTuple):
    """FLOPs per token, a multiplication and an addition counted as two."""

    forward: float
    train: float
    score_all: float
    score_last_k: float
    score_lm_head: float


def flops_per_token(
    model: Any, *, length: int, sketch_dim: int, last_k: int, checkpointing: bool, completion_share: float = 1.0
) -> FLOPs:
    """
    FLOPs of full fine-tuning, per token of a sequence that is all completion, or of which `completion_share` is.

    A product with a matrix of n weights takes 2 n in each of forward, gradient of activations and gradient of weights; causal
    attention takes 2 q T a layer forward (half of 4 q T) and twice that backward; checkpointing runs the blocks forward once
    more. TRL's fused output projection computes its logits again in the backward pass, that of the scoring pass does not.
    """
    layers, head_shape = linear_layers(model), (model.config.vocab_size, model.config.hidden_size)
    attention = 2 * length * sum(layer.in_features for name, layer in layers.items() if name.endswith("o_proj"))
    blocks = 2 * sum(layer.weight.numel() for layer in layers.values())
    head = 2 * completion_share * math.prod(head_shape)
    forward = blocks + attention + head
    below = blocks + 2 * attention  # gradients of activations in all blocks
    below += blocks + attention if checkpointing else 0
    sketches = sum(_sketch_flops(*layer.weight.shape, sketch_dim) for layer in layers.values())
    head_sketch = completion_share * _sketch_flops(*head_shape, sketch_dim)
    share = last_k / model.config.num_hidden_layers
    return FLOPs(
        forward=forward,
        train=forward + below + blocks + 3 * head,
        score_all=forward + head + below + sketches + head_sketch,
        score_last_k=forward + head + share * (below + sketches) + head_sketch,
        score_lm_head=forward + head_sketch,
    )


def _sketch_flops(num_rows: int, num_columns: int, sketch_dim: int) -> int:
    """Projecting both factors of one position's outer product, and their product."""
    row_width, column_width = projected_widths(num_rows, num_columns, sketch_dim)
    rows = 2 * num_rows * row_width if row_width != num_rows else 0
    columns = 2 * num_columns * column_width if column_width != num_columns else 0
    return rows + columns + 2 * row_width * column_width


def scale_document(gpu_record: Path = GPU_RECORD) -> str:
    """The document with fresh tables; what has no record is called not measured."""
    tables = {
        "flops": [_flops(name, model, on) for name, model in MODELS.items() for on in (True, False)],
        "projections": [_projections(name, model) for name, model in MODELS.items()],
        "gpu": _gpu(gpu_record),
    }
    pattern = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", flags=re.DOTALL)
    return pattern.sub(lambda match: f"{match[1]}{_markdown(tables[match[2]])}\n{match[3]}", DOCUMENT.read_text())


def _markdown(rows: list[Row]) -> str:
    return markdown_table(list(rows[0]), [list(row.values()) for row in rows])


def _flops(name: str, model: Any, checkpointing: bool) -> Row:
    flops = flops_per_token(model, length=LENGTH, sketch_dim=SKETCH_DIM, last_k=LAST_K, checkpointing=checkpointing)
    return {
        "model": name,
        "checkpointing": "on" if checkpointing else "off",
        "forward, GFLOP a token": f"{flops.forward / 1e9:.1f}",
        "training, GFLOP a token": f"{flops.train / 1e9:.1f}",
        "scope `all` / training": f"{flops.score_all / flops.train:.2f}",
        "`last_k` = 2 / training": f"{flops.score_last_k / flops.train:.2f}",
        "`lm_head` / training": f"{flops.score_lm_head / flops.train:.2f}",
        "`lm_head` beyond the forward": f"{flops.score_lm_head / flops.forward - 1:.2%}",
    }


def _projections(name: str, model: Any) -> Row:
    row: Row = {"model": name}
    for scope, last_k, title in (("all", None, "all"), ("last_k", LAST_K, "last_k = 2"), ("lm_head", None, "lm_head")):
        for k in (4096, 16384):
            row[f"`{title}`, k = {k}"] = f"{projection_bytes(resolve_scope(model, scope, last_k), k) / 1e6:.0f}"
    return row


def _gpu(path: Path) -> list[Row]:
    """The passes that `benchmarks.gpu` times."""
    cases = json.loads(path.read_text())["cases"] if path.is_file() else []
    cases = [case for case in cases if case["checkpointing"] and not case["lora"]]
    found = {(case["shape"], case["sequence_length"]): case["ratios"] for case in cases}
    keys = {
        "`all`": "all",
        "`last_k` = 2": "last_k",
        "`lm_head`": "lm_head",
        "`lm_head` reusing it": "lm_head_reusing_forward",
    }
    rows = []
    for name, length in ((name, length) for name in ("Qwen3-4B", "Qwen3-8B") for length in (1024, 4096)):
        ratios = found.get((name, length), {})
        times = {title: ratios.get(key, {}).get("time") for title, key in keys.items()}
        cells = {title: _NOT_MEASURED if time is None else f"{time:.2f} (measured)" for title, time in times.items()}
        rows.append({"model": name, "tokens": f"8 x {length}", **cells})
    return rows


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()  # for `--help`
    DOCUMENT.write_text(scale_document())
