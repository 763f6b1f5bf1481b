"""Scores on the GPU in every precision against float64 on the CPU, where the oracle and the projections' own tests are."""

import copy
import functools
from contextlib import nullcontext

import pytest
import torch

from oblr_trl.scores import reference_scores, score_sketches
from oblr_trl.scores.projections import COLUMNS, ROWS, Projections
from oblr_trl.scores.scopes import resolve_scope
from tests.gpu.device import DEVICE, REHEARSES, tf32, to_device
from tests.model_zoo import zoo_model
from tests.tiny_models import random_batch, tiny_model

SCOPES = {"all": None, "last_k": 1, "lm_head": None}
# Dtype of the weights, of autocast, and the largest error of one sequence's exact norm and sketch, as part of the norm. A router that
# is rounded chooses other experts, which is another score.
PRECISIONS = {
    "float32": (torch.float32, None, 1e-4),
    "float32, TF32": (torch.float32, None, 2e-2),
    "bf16 autocast": (torch.float32, torch.bfloat16, 0.15),
    "bf16 weights": (torch.bfloat16, None, 0.15),
}
MODELS = ("qwen3", "qwen3_untied", "gpt2", "qwen3_lora", "experts")


@functools.cache
def built(name):
    """A model wide enough for its matrices to be projected."""
    if name == "experts":
        return zoo_model("Qwen3Moe", experts_implementation=None, hidden_size=128).train()
    return tiny_model(name, hidden_size=128, num_layers=2).train()


def batch():
    return random_batch(batch_size=8)


@functools.cache
def truth(name, dtype, scope):
    """Squared norms of the oracle, and the sketches of the CPU, in float64 from the weights that the pass sees."""
    model = copy.deepcopy(built(name)).to(dtype).double()
    if name == "experts":
        model.set_experts_implementation("eager")  # grouped products know no float64
    options = {"scope": scope, "last_k": SCOPES[scope]}
    scores = reference_scores(model, *batch(), **options)
    return scores.square().sum(dim=1), score_sketches(model, *batch(), **options)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", MODELS)
def test_scores_are_those_of_float64_on_the_cpu(name, precision, scope, record_property):
    dtype, autocast, tolerance = PRECISIONS[precision]
    norms, sketches = truth(name, dtype, scope)
    model = copy.deepcopy(built(name)).to(dtype).to(DEVICE)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    options = {"scope": scope, "last_k": SCOPES[scope]}
    with tf32("TF32" in precision), torch.autocast(DEVICE.type, autocast) if autocast else nullcontext():
        exact = score_sketches(model, *to_device(batch()), method="exact", **options)
        sketched = score_sketches(model, *to_device(batch()), **options)
    assert exact.device.type == sketched.device.type == DEVICE.type
    assert exact.dtype == sketched.dtype == torch.float32
    assert exact[0] == 0  # an empty completion
    assert (sketched[0] == 0).all()
    exact_errors = ((exact.cpu() / norms).sqrt() - 1).abs()[1:]
    sketch_errors = ((sketched.cpu() - sketches).norm(dim=1) / norms.sqrt())[1:]
    rounds_routers = name == "experts" and precision.startswith("bf16")
    for method, errors in (("exact", exact_errors), ("sketch", sketch_errors)):
        error = (errors.median() if rounds_routers else errors.max()).item()
        record_property(f"error of {method}", f"{error:.1e}")
        assert error < tolerance


def test_projections_are_the_same_numbers_on_every_device():
    shapes = {"stack": (4, 96, 80), "table": (1000, 128), "matrix": (256, 128), "vector": (128,)}
    options = {"tables": {"table"}, "sketch_dim": 1024, "seed": 3, "dtype": torch.float32}
    here, there = (Projections(shapes, device=device, **options) for device in (torch.device("cpu"), DEVICE))
    for name, axis in (("table", ROWS), ("table", COLUMNS), ("matrix", ROWS), ("matrix", COLUMNS)):
        assert there.projection(name, axis).device.type == DEVICE.type
        assert torch.equal(here.projection(name, axis), there.projection(name, axis).cpu())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["qwen3", "qwen3_lora"])
def test_checkpointing_changes_no_score(name, dtype):
    plain, checkpointing = (copy.deepcopy(built(name)).to(DEVICE, dtype) for _ in range(2))
    checkpointing.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    expected = score_sketches(plain, *to_device(batch()))
    found = score_sketches(checkpointing, *to_device(batch()))
    assert ((found - expected).norm(dim=1)[1:] / expected.norm(dim=1)[1:]).max() < 1e-4


@pytest.mark.parametrize("padding", ["left", "right"])
def test_implementations_of_attention_agree(padding):
    tensors = to_device(random_batch(padding, batch_size=8))
    sketches = {}
    for implementation in ("sdpa", "eager"):
        model = copy.deepcopy(built("qwen3")).to(DEVICE)
        model.set_attn_implementation(implementation)
        sketches[implementation] = score_sketches(model, *tensors)
    expected = sketches["eager"]
    assert ((sketches["sdpa"] - expected).norm(dim=1)[1:] / expected.norm(dim=1)[1:]).max() < 1e-4


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_experts_are_scored_in_bfloat16_whatever_computes_them(implementation):
    model = copy.deepcopy(built("experts")).to(DEVICE, torch.bfloat16)
    model.set_experts_implementation(implementation)
    norms, _ = truth("experts", torch.bfloat16, "all")
    exact = score_sketches(model, *to_device(batch()), method="exact").cpu()
    assert ((exact / norms).sqrt() - 1).abs()[1:].median() < 0.15


def test_a_long_completion_and_a_real_vocabulary():
    """Tiles over positions and vocabulary, and the float32 sums over both."""
    length, vocabulary = (40, 9000) if REHEARSES else (1024, 151936)
    torch.manual_seed(0)
    model = tiny_model(hidden_size=64, num_layers=1)
    model.resize_token_embeddings(vocabulary)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(2, vocabulary, (2, length), generator=generator)
    mask = torch.ones_like(tokens)
    tensors = (tokens, mask, mask[:, length // 4 :])
    expected = score_sketches(copy.deepcopy(model).double().to(DEVICE), *to_device(tensors))
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 0.15)):
        found = score_sketches(copy.deepcopy(model).to(DEVICE, dtype), *to_device(tensors))
        assert ((found - expected).norm(dim=1) / expected.norm(dim=1)).max() < tolerance, dtype


def test_scope_resolution_is_that_of_the_cpu():
    model = built("qwen3_lora")
    expected = resolve_scope(model, "all", None).shapes
    assert resolve_scope(copy.deepcopy(model).to(DEVICE), "all", None).shapes == expected
