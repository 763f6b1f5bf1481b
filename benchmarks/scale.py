"""Tables of `docs/scale.md`: the cost of OBLR-PO's parts from 4B to 70B on 8 to 512 GPUs, by arithmetic.

    python -m benchmarks.scale

Rewrites what stands between `<!-- table: NAME -->` and `<!-- end -->`; the sentences around it are written by hand.
"""

import argparse
import json
import math
import re
from pathlib import Path
from typing import Any, NamedTuple

from transformers import LlamaConfig, Qwen3Config

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
RESULTS = Path("benchmarks/results")
GPUS = (8, 16, 32, 64, 128, 256, 512)
# The paper's prompts and completions per step; the rest are this document's own choices.
COMPLETIONS, LENGTH, SKETCH_DIM, LAST_K = 128 * 8, 4096, 4096, 2
_NOT_MEASURED = "not measured"
_GB, _MB = 1e9, 1e6

Row = dict[str, Any]


def gather_bytes(num_completions: int, sketch_dim: int, num_processes: int) -> int:
    """Bytes that one process receives when the sketches of all are gathered."""
    return num_completions * sketch_dim * 4 * (num_processes - 1) // num_processes


class FLOPs(NamedTuple):
    """FLOPs per token, a multiplication and an addition counted as two."""

    forward: float
    train: float
    score_all: float
    score_last_k: float
    score_lm_head: float
    reused_forward: float  # what scope `lm_head` adds to a forward pass that is run anyway


def flops_per_token(
    model: Any,
    *,
    length: int,
    sketch_dim: int,
    last_k: int,
    checkpointing: bool,
    completion_share: float = 1.0,
) -> FLOPs:
    """
    FLOPs of full fine-tuning, per token of a sequence.

    A product with a matrix of n weights takes 2 n in each of forward, gradient of activations and gradient of weights; causal
    attention takes 2 q T a layer forward (half of 4 q T) and twice that backward; checkpointing runs the blocks forward once
    more. The output projection runs on completion tokens alone. TRL's fused one computes its logits again in the backward pass,
    that of the scoring pass does not.
    """
    layers, head_shape = linear_layers(model), (model.config.vocab_size, model.config.hidden_size)
    attention = 2 * length * sum(layer.in_features for name, layer in layers.items() if name.endswith("o_proj"))
    blocks = 2 * sum(layer.weight.numel() for layer in layers.values())
    head = 2 * math.prod(head_shape) * completion_share
    forward = blocks + attention + head
    below = blocks + 2 * attention  # gradients of activations in all blocks
    below += blocks + attention if checkpointing else 0
    sketches = sum(_sketch_flops(*layer.weight.shape, sketch_dim) for layer in layers.values())
    head_sketch = _sketch_flops(*head_shape, sketch_dim) * completion_share
    share = last_k / model.config.num_hidden_layers
    return FLOPs(
        forward=forward,
        train=forward + below + blocks + 3 * head,
        score_all=forward + head + below + sketches + head_sketch,
        score_last_k=forward + head + share * (below + sketches) + head_sketch,
        score_lm_head=forward + head_sketch,
        reused_forward=head_sketch,
    )


def _sketch_flops(num_rows: int, num_columns: int, sketch_dim: int) -> int:
    """Projecting both factors of one position's outer product, and their product."""
    row_width, column_width = projected_widths(num_rows, num_columns, sketch_dim)
    rows = 2 * num_rows * row_width if row_width != num_rows else 0
    columns = 2 * num_columns * column_width if column_width != num_columns else 0
    return rows + columns + 2 * row_width * column_width


def main() -> None:
    """Rewrite the document's tables."""
    DOCUMENT.write_text(scale_document())


def scale_document(results: Path = RESULTS) -> str:
    """The document with fresh tables; what is missing in the folder of results is called not measured."""
    tables = {
        "states": [_states(name, model) for name, model in MODELS.items()],
        "gather": [_gather(num_gpus) for num_gpus in GPUS],
        "flops": [_flops(name, model, on) for name, model in MODELS.items() for on in (True, False)],
        "reused": [_reused_forward(name, model) for name, model in MODELS.items()],
        "projections": [_projections(name, model) for name, model in MODELS.items()],
        "cpu": _cpu(results / "score_pass.json"),
        "gpu": _gpu(results / "gpu.json"),
    }
    pattern = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", flags=re.DOTALL)
    return pattern.sub(lambda match: match[1] + _markdown(tables[match[2]]) + match[3], DOCUMENT.read_text())


def _markdown(rows: list[Row]) -> str:
    if not rows:
        return f"{_NOT_MEASURED.capitalize()}.\n"
    lines = [list(rows[0]), ["---"] * len(rows[0]), *([str(cell) for cell in row.values()] for row in rows)]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def _states(name: str, model: Any) -> Row:
    num_parameters = model.num_parameters()
    per_gpu = {f"GB per GPU, W = {num_gpus}": f"{16 * num_parameters / num_gpus / _GB:.1f}" for num_gpus in GPUS}
    return {"model": name, "P": f"{num_parameters:,}", "weights, GB": f"{2 * num_parameters / _GB:.1f}", **per_gpu}


def _gather(num_gpus: int) -> Row:
    # Every micro-batch of ZeRO-3 gathers all weights twice and reduces gradients once: 3 x 2 P, at least once per step.
    zero = 6 * MODELS["Qwen3-4B"].num_parameters() * (num_gpus - 1) // num_gpus
    fixed, grown = (gather_bytes(number, SKETCH_DIM, num_gpus) for number in (COMPLETIONS, 16 * num_gpus))
    return {
        "W": num_gpus,
        "completions per GPU": f"{COMPLETIONS / num_gpus:g}",
        "MB received per GPU": f"{fixed / _MB:.1f}",
        "of ZeRO-3's traffic, 4B": f"{fixed / zero:.2%}",
        "completions at 16 per GPU": 16 * num_gpus,
        "MB received per GPU at 16": f"{grown / _MB:.1f}",
        "of ZeRO-3's traffic, 4B, at 16": f"{grown / zero:.2%}",
    }


def _flops(name: str, model: Any, checkpointing: bool) -> Row:
    flops = flops_per_token(model, length=LENGTH, sketch_dim=SKETCH_DIM, last_k=LAST_K, checkpointing=checkpointing)
    per_step = flops.score_all * COMPLETIONS * LENGTH / 1e15
    return {
        "model": name,
        "checkpointing": "on" if checkpointing else "off",
        "forward, GFLOP a token": f"{flops.forward / _GB:.1f}",
        "training, GFLOP a token": f"{flops.train / _GB:.1f}",
        "scope `all` / training": f"{flops.score_all / flops.train:.2f}",
        "`last_k` = 2 / training": f"{flops.score_last_k / flops.train:.2f}",
        "`lm_head` / training": f"{flops.score_lm_head / flops.train:.2f}",
        "scope `all`, PFLOP a step": f"{per_step:.0f}",
        **{f"per GPU, W = {num_gpus}": f"{per_step / num_gpus:.1f}" for num_gpus in (8, 64, 512)},
    }


def _reused_forward(name: str, model: Any) -> Row:
    row: Row = {"model": name}
    for k in (4096, 16384):
        flops = flops_per_token(model, length=LENGTH, sketch_dim=k, last_k=LAST_K, checkpointing=True)
        row[f"extra MFLOP a token, k = {k}"] = f"{flops.reused_forward / _MB:.1f}"
        row[f"of the forward, k = {k}"] = f"{flops.reused_forward / flops.forward:.2%}"
    return row


def _projections(name: str, model: Any) -> Row:
    row: Row = {"model": name}
    for scope, last_k, title in (("all", None, "all"), ("last_k", LAST_K, "last_k = 2"), ("lm_head", None, "lm_head")):
        for k in (4096, 16384):
            row[f"`{title}`, k = {k}"] = f"{projection_bytes(resolve_scope(model, scope, last_k), k) / _MB:.0f}"
    return row


def _cpu(path: Path) -> list[Row]:
    """The passes that `benchmarks.score_pass` timed, against the arithmetic."""
    record = json.loads(path.read_text()) if path.is_file() else {"cases": []}
    rows = []
    for case in record["cases"]:
        settings = record["settings"]
        heads = max(settings["hidden_size"] // 64, 1)
        config = Qwen3Config(
            vocab_size=case["vocab_size"],
            hidden_size=settings["hidden_size"],
            intermediate_size=3 * settings["hidden_size"],
            num_hidden_layers=settings["num_layers"],
            num_attention_heads=heads,
            num_key_value_heads=max(heads // 2, 1),
            head_dim=64,
            tie_word_embeddings=True,
        )
        flops = flops_per_token(
            meta_model(config),
            length=case["sequence_length"],
            sketch_dim=settings["sketch_dim"],
            last_k=1,
            checkpointing=False,
            completion_share=0.75,
        )
        for scope, number in zip(("all", "last_k", "lm_head"), flops[2:5], strict=True):
            row = {"tokens": f"{case['batch_size']} x {case['sequence_length']}", "scope": f"`{scope}`"}
            row["/ training, by FLOPs"] = f"{number / flops.train:.2f}"
            row["/ training, time"] = f"{case['ratios'][f'{scope} / training']['median']:.2f} (measured)"
            rows.append(row)
    return rows


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
    main()
