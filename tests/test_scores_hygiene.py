"""What the scoring pass leaves behind (nothing), refuses, and holds in memory."""

import gc
import math

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, Qwen3Config
from transformers.integrations.finegrained_fp8 import FP8Linear

from oblr_trl.scores import DenseGradient, reference_scores, register_score_rule, score_sketches
from oblr_trl.scores import rules as rules_module
from oblr_trl.scores.accumulator import SketchAccumulator
from oblr_trl.scores.head import head_pass
from oblr_trl.scores.projections import COLUMNS, ROWS, Projections
from oblr_trl.scores.scopes import resolve_scope
from tests.tiny_models import random_batch, tiny_model


class Scale(nn.Module):
    """A trainable layer that no rule knows."""

    def __init__(self, size):
        super().__init__()
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, size))

    def forward(self, hidden_states):
        return self.scale * hidden_states


class Own(nn.Linear):
    """Computes something else than the class whose rule it would inherit."""

    def forward(self, inputs):
        return 2 * super().forward(inputs)


class Failing(nn.Linear):
    def forward(self, inputs):
        raise RuntimeError("broken layer")


def failing_rule(module, inputs, grad_output):
    raise RuntimeError("broken layer")


@pytest.fixture(autouse=True)
def rules_of_one_test(monkeypatch):
    monkeypatch.setattr(rules_module, "_RULES", dict(rules_module._RULES))


def model_with(layer):
    """A tiny model with `layer` in place of a linear one."""
    model = tiny_model()
    model.model.layers[1].mlp.up_proj = layer
    return model


def traces(model):
    hooks = sum(
        len(module._forward_hooks) + len(module._forward_pre_hooks) + len(module._backward_hooks)
        for module in model.modules()
    )
    flags = [parameter.requires_grad for parameter in model.parameters()]
    grads = [parameter.grad for parameter in model.parameters()]
    attributes = [sorted(vars(module)) for module in model.modules()]
    modes = [module.training for module in model.modules()]
    return hooks, flags, grads, attributes, modes


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("scope", ["all", "lm_head"])
def test_nothing_is_left_on_the_model(scope, training):
    model = tiny_model().train(training)
    model.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    before = traces(model)
    score_sketches(model, *random_batch(), scope=scope)
    assert traces(model) == before


@pytest.mark.parametrize("layer", [Failing, Own], ids=["forward", "backward"])
def test_nothing_is_left_on_the_model_after_an_exception(layer):
    model = model_with(layer(64, 128, bias=False))
    register_score_rule(layer, failing_rule)
    before = traces(model)
    with pytest.raises(RuntimeError, match="broken layer"):
        score_sketches(model, *random_batch())
    assert traces(model) == before


@pytest.mark.parametrize("fails", [False, True])
def test_no_tensor_outlives_the_pass(fails):
    """A reference cycle through the autograd graph would keep every pass's activations for good."""

    def num_tensors():
        gc.collect()
        return sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects())

    model, batch = model_with(nn.Linear(64, 128)), random_batch()
    model.model.layers[0].mlp.up_proj = model.model.layers[1].mlp.up_proj  # what two calls give is held until the end

    def run():
        for method in ("sketch", "exact"):
            try:
                score_sketches(model, *batch, method=method)
            except RuntimeError:
                assert fails

    if fails:
        register_score_rule(nn.Linear, failing_rule)
    run()
    before = num_tensors()
    for _ in range(3):
        run()
    assert num_tensors() == before


def test_accumulated_gradients_survive_and_no_gradient_is_added():
    model = tiny_model()
    input_ids, attention_mask, completion_mask = random_batch()
    model(input_ids=input_ids, labels=input_ids).loss.backward()
    before = [parameter.grad.clone() for parameter in model.parameters()]
    score_sketches(model, input_ids, attention_mask, completion_mask)
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("fails", [False, True])
def test_backward_hooks_wait_for_training(fails):
    """ZeRO-3 reduces the gradients of experts in one of theirs."""
    model, called = model_with(nn.Linear(64, 128)), []
    hook = model.model.layers[0].mlp.register_full_backward_hook(lambda *_: called.append("hook"))
    pre_hook = model.model.layers[1].register_full_backward_pre_hook(lambda *_: called.append("pre-hook"))
    if fails:
        register_score_rule(nn.Linear, failing_rule)
        with pytest.raises(RuntimeError, match="broken layer"):
            score_sketches(model, *random_batch())
    else:
        score_sketches(model, *random_batch())
    assert not called
    input_ids = random_batch()[0]
    model(input_ids=input_ids, labels=input_ids).loss.backward()
    assert sorted(called) == ["hook", "pre-hook"]
    hook.remove()
    pre_hook.remove()
    assert not model.model.layers[0].mlp._backward_hooks


def test_callers_without_gradients_are_served():
    model, batch = tiny_model(), random_batch()
    expected = score_sketches(model, *batch)
    with torch.no_grad():
        assert torch.equal(score_sketches(model, *batch), expected)
        assert not torch.is_grad_enabled()


def test_reentrant_checkpointing_is_set_aside_for_the_pass():
    batch = random_batch()
    expected = score_sketches(tiny_model().train(), *batch)
    model = tiny_model().train()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    blocks = model.model.layers
    functions = [block._gradient_checkpointing_func for block in blocks]
    recomputed = []
    handle = blocks[0].self_attn.register_forward_hook(lambda *_: recomputed.append(True))

    assert torch.allclose(score_sketches(model, *batch), expected, rtol=1e-5)

    handle.remove()
    assert len(recomputed) == 2, "the block was not checkpointed"
    assert [block._gradient_checkpointing_func for block in blocks] == functions
    assert all(block.gradient_checkpointing for block in blocks)


def test_an_unknown_layer_is_named_and_a_rule_can_be_registered():
    model = tiny_model("llama").double().eval()
    model.model.norm = nn.Sequential(model.model.norm, Scale(64)).double()
    batch = random_batch()
    with pytest.raises(ValueError, match=r"model\.norm\.1\.scale` of a Scale.*register_score_rule"):
        score_sketches(model, *batch)
    # frozen, it is nobody's business
    model.model.norm[1].scale.requires_grad_(False)
    score_sketches(model, *batch)
    model.model.norm[1].scale.requires_grad_(True)

    register_score_rule(Scale, lambda m, x, delta: {"scale": DenseGradient((x * delta).sum(dim=1))})
    exact = score_sketches(model, *batch, method="exact")
    truth = reference_scores(model, *batch).square().sum(dim=1)
    torch.testing.assert_close(exact, truth, rtol=1e-10, atol=0)


def test_a_subclass_with_its_own_forward_does_not_inherit_a_rule():
    with pytest.raises(ValueError, match="of a Own"):
        score_sketches(model_with(Own(64, 128, bias=False)), *random_batch())


def test_layers_that_are_never_called_are_reported():
    model = tiny_model()
    model.model.spare = nn.Linear(2, 2)
    with pytest.warns(UserWarning, match=r"1 layers.*model\.spare"):
        score_sketches(model, *random_batch())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scope": "some"}, "`scope` must be one of"),
        ({"scope": "last_k"}, "needs `last_k` between 1 and the model's 3 blocks"),
        ({"scope": "last_k", "last_k": 4}, "needs `last_k` between 1 and the model's 3 blocks"),
        ({"method": "guess"}, "`method` must be one of"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        score_sketches(tiny_model(), *random_batch(), **options)


def test_a_head_with_a_forward_of_its_own_is_refused():
    """A quantized head is a kind of `nn.Linear`, with a packed or scaled `weight`."""
    model = tiny_model("qwen3_untied")
    model.lm_head = FP8Linear(64, 40)
    with pytest.raises(ValueError, match=r"FP8Linear`, but.*Leave the head out of .*quantization"):
        score_sketches(model, *random_batch(), scope="lm_head")


def test_a_model_without_trainable_parameters_is_refused():
    with pytest.raises(ValueError, match="no trainable parameter"):
        score_sketches(tiny_model().requires_grad_(False), *random_batch())


def test_projections_of_a_qwen3_8b_take_at_most_64_mib_whatever_the_depth():
    def num_bytes(num_layers):
        config = Qwen3Config(
            vocab_size=151936,
            hidden_size=4096,
            intermediate_size=12288,
            num_hidden_layers=num_layers,
            num_attention_heads=32,
            num_key_value_heads=8,
            head_dim=128,
            tie_word_embeddings=False,
        )
        with torch.device("meta"):
            scoped = resolve_scope(AutoModelForCausalLM.from_config(config), "all", None)
        options = {"sketch_dim": 4096, "seed": 0, "dtype": torch.float32, "device": torch.device("cpu")}
        projections = Projections(scoped.shapes, tables=scoped.tables, **options)
        for name, shape in scoped.shapes.items():
            if len(shape) == 2:
                projections.projection(name, ROWS)
                projections.projection(name, COLUMNS)
            else:
                SketchAccumulator(1, projections).add(name, DenseGradient(torch.zeros(1, shape[0])))
        return sum(tensor.nbytes for tensor in projections._drawn.values())

    assert num_bytes(36) <= 64 * 2**20
    # the bases are shared: more blocks cost their signs alone, one byte per row and column of a matrix
    assert num_bytes(6) - num_bytes(4) < 2 * 100_000


class LargestTensor(TorchDispatchMode):
    """Number of elements of the largest tensor that any operation returns."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.numel())
        return out


def test_the_head_is_tiled_over_positions_and_vocabulary():
    num_tokens, vocab_size = 1500, 20_000
    hidden, weight = torch.randn(num_tokens, 8), torch.randn(vocab_size, 8)
    targets = torch.randint(0, vocab_size, (num_tokens,))
    with LargestTensor() as mode:
        head_pass(hidden, weight, None, targets, [weight, torch.randn(vocab_size, 4)])
    assert mode.largest < num_tokens * vocab_size / 3


@pytest.mark.parametrize("softcap", [math.inf, 3.0], ids=["plain", "capped"])
@pytest.mark.parametrize("bias", [False, True])
def test_the_head_pass_equals_autograd_across_tiles(bias, softcap):
    torch.manual_seed(0)
    vocab_size, temperature = 20_000, 0.7
    hidden = torch.randn(40, 6, dtype=torch.float64, requires_grad=True)
    weight, projection = (torch.randn(vocab_size, size, dtype=torch.float64) for size in (6, 3))
    offset = torch.randn(vocab_size, dtype=torch.float64) if bias else None
    targets = torch.randint(0, vocab_size, (40,))
    logits = torch.nn.functional.linear(hidden, weight, offset)
    logits.retain_grad()
    scaled = (logits if softcap == math.inf else softcap * torch.tanh(logits / softcap)) / temperature
    log_probs = scaled.log_softmax(-1).gather(1, targets.unsqueeze(1)).squeeze(1)
    log_probs.sum().backward()

    options = {"temperature": temperature, "softcap": softcap}
    result = head_pass(hidden.detach(), weight, offset, targets, [weight, projection], **options)
    torch.testing.assert_close(result.log_probs, log_probs.detach())
    torch.testing.assert_close(result.log_normalizer, scaled.detach().logsumexp(-1))
    torch.testing.assert_close(result.gradients, (hidden.grad, logits.grad @ projection))
