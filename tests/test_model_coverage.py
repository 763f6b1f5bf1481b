"""Every kind of model trains with the default options, and what is scored of it equals one float64 backward per sequence."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn

from oblr_trl import OBLRPOConfig, OBLRPOTrainer
from oblr_trl.scores import DenseGradient, OuterProduct, reference_scores, score_sketches
from oblr_trl.scores.accumulator import SketchAccumulator
from oblr_trl.scores.calls import LayerCall, Layout, current_autocast
from oblr_trl.scores.projections import Projections
from oblr_trl.scores.rules import recomputed_rule
from oblr_trl.scores.scopes import resolve_scope
from oblr_trl.trust_region import TrustRegion
from tests.model_zoo import MODELS, NOT_TRAINED_BY_TRL, zoo_model
from tests.test_scores import relative_error
from tests.test_scores_hygiene import Scale
from tests.tiny_models import construct, logged, random_batch, tiny_model

DEFAULTS = {"lr_adaptation": None, "learning_rate": None, "max_steps": 1, "max_completion_length": 4}


def freeze_what_is_left_out(model):
    """For the oracle, which scores all that is trainable."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    scoped = resolve_scope(model, "auto", None)
    for name in scoped.left_out:
        parameters[name].requires_grad_(False)
    return scoped


def exact_norms_and_truth(model, batch, dtype=torch.float64):
    exact = score_sketches(model, *batch, method="exact", scope="auto")
    freeze_what_is_left_out(model)
    return exact, reference_scores(model, *batch, dtype=dtype).square().sum(dim=1)


def small_batch(name):
    # Gemma 2 adds the lowest float64 to capped scores, which overflows where all keys of a padding query are masked.
    return random_batch("right" if name == "Gemma2" else "left", batch_size=4, prompt_length=5, completion_length=6)


@pytest.mark.parametrize("name", MODELS)
def test_what_is_scored_of_a_model_equals_the_oracle(name):
    model, batch = zoo_model(name).double().eval(), small_batch(name)
    exact = score_sketches(model, *batch, method="exact", scope="auto")
    sketches = score_sketches(model, *batch, scope="auto", sketch_dim=65536)  # all parameters, unprojected
    assert freeze_what_is_left_out(model).num_parameters <= 65536
    scores = reference_scores(model, *batch)
    gram = scores @ scores.T
    norms = gram.diagonal().sqrt()
    assert relative_error(exact, gram.diagonal()) < 1e-5
    assert ((sketches @ sketches.T - gram).abs() <= 1e-5 * norms.outer(norms)).all()


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("name", ["Qwen3Moe", "GptOss", "NemotronH"])
def test_experts_are_scored_whatever_computes_them(name, implementation, checkpointing):
    model = zoo_model(name, experts_implementation=implementation).train(checkpointing)
    if checkpointing:
        model.gradient_checkpointing_enable()
    batch = small_batch(name)
    exact = score_sketches(model, *batch, method="exact", scope="auto")
    truth = zoo_model(name).double().eval()  # grouped products know no float64
    freeze_what_is_left_out(truth)
    assert relative_error(exact.double(), reference_scores(truth, *batch).square().sum(dim=1)) < 1e-4


def stack_gradients(num_positions=12):
    """Random outer products that are routed to a stack of three matrices, and the gradients that they make up."""
    generator = torch.Generator().manual_seed(0)
    rows, columns = (torch.randn(2, num_positions, d, generator=generator, dtype=torch.float64) for d in (10, 7))
    matrices = torch.randint(3, (2, num_positions), generator=generator)
    chosen = nn.functional.one_hot(matrices, 3).double()
    return OuterProduct(rows, columns, matrices), torch.einsum("bte,btr,btc->berc", chosen, rows, columns)


def stack_projections(sketch_dim, seed=0):
    options = {"tables": set(), "seed": seed, "dtype": torch.float64, "device": torch.device("cpu")}
    return Projections({"stack": (3, 10, 7)}, sketch_dim=sketch_dim, **options)


def sketch_of(gradient, projections):
    accumulator = SketchAccumulator(2, projections)
    accumulator.add("stack", gradient)
    return accumulator.result()


@pytest.mark.parametrize("sketch_dim", [300, 150, 16], ids=["unprojected", "signs", "projected"])
def test_a_stack_is_sketched_alike_from_factors_gradients_and_entries(sketch_dim):
    product, dense = stack_gradients()
    projections = stack_projections(sketch_dim)
    sketches = sketch_of(product, projections)
    torch.testing.assert_close(sketch_of(DenseGradient(dense.flatten(1)), projections), sketches)
    projected = SketchAccumulator(2, projections).add("stack", product)
    for i, gradient in enumerate(dense):
        pieces = [  # that end within matrices and rows
            projections.project_entries("stack", gradient.flatten()[start : start + 37], start, torch.float64)
            for start in range(0, 210, 37)
        ]
        torch.testing.assert_close(sum(pieces), projected[i].flatten())


@pytest.mark.parametrize("sketch_dim", [150, 16], ids=["signs", "projected"])
def test_inner_products_of_projected_stacks_are_unbiased(sketch_dim):
    product, dense = stack_gradients()
    draws = [sketch_of(product, stack_projections(sketch_dim, seed)) for seed in range(400)]
    grams = torch.stack([sketches @ sketches.T for sketches in draws])
    standard_error = grams.std(dim=0) / len(draws) ** 0.5
    assert (standard_error > 0).all()  # else nothing was projected
    assert ((grams.mean(dim=0) - dense.flatten(1) @ dense.flatten(1).T).abs() / standard_error).max() < 4


@pytest.mark.parametrize("name", ["Qwen3Moe", "Mixtral"])
def test_experts_of_a_model_under_autocast_stay_close(name):
    batch = small_batch(name)
    truth = score_sketches(zoo_model(name).eval(), *batch, method="exact")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = score_sketches(zoo_model(name).eval(), *batch, method="exact")
    assert (half[1:] / truth[1:]).log().abs().max() < 0.2


def test_a_layer_is_recomputed_under_the_autocast_of_its_call():
    """In the backward pass none is on, and float32 weights do not multiply bfloat16 inputs."""
    router = zoo_model("Qwen3Moe").model.layers[0].mlp.gate
    hidden = torch.randn(6, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        call = LayerCall(Layout(2, 3), (hidden,), {}, current_autocast("cpu"))
        _, scores, _ = router(hidden)
    gradients = recomputed_rule(router, call, (None, torch.ones_like(scores).view(2, 3, -1)))
    assert gradients["weight"].values.shape == (2, 4 * 32)
    assert [name for name, _ in router.named_parameters()] == ["weight"]


def test_auto_is_all_where_everything_is_scored(caplog, tmp_path):
    model, batch = tiny_model(num_layers=2), random_batch()
    expected = score_sketches(model, *batch, scope="all")
    assert torch.equal(score_sketches(model, *batch, scope="auto"), expected)
    construct(OBLRPOTrainer, OBLRPOConfig, tmp_path, model=model)
    assert "Left out" not in caplog.text


def with_an_unknown_layer(size=64, hidden_size=64):
    """A tiny model whose last norm is followed by a layer without a rule, of `size` parameters, a part of which is used."""

    class Unknown(Scale):
        def forward(self, hidden_states):
            return self.scale[:hidden_size] * hidden_states

    model = tiny_model("qwen3_untied", num_layers=2)
    model.model.norm = nn.Sequential(model.model.norm, Unknown(size))
    return model


def test_a_layer_without_a_rule_is_left_out_and_trained(caplog, tmp_path):
    model, batch = with_an_unknown_layer(), random_batch()
    exact, truth = exact_norms_and_truth(model, batch)
    assert relative_error(exact.double(), truth) < 1e-4
    model = with_an_unknown_layer()
    with pytest.raises(ValueError, match=r"model\.norm\.1\.scale` of a Unknown.*scope='auto'"):
        score_sketches(model, *batch, scope="all")
    trainer = construct(OBLRPOTrainer, OBLRPOConfig, tmp_path, model=model, **DEFAULTS)
    (line,) = [record.getMessage() for record in caplog.records if "Left out" in record.getMessage()]
    total = sum(parameter.numel() for parameter in model.parameters())
    assert f"{100 * (1 - 64 / total):.4g} % of the {total:,} trainable entries" in line
    assert "parameters of Unknown (1)." in line
    assert trainer.args.lr_adaptation == "trust_region"
    trainer.train()
    assert not torch.equal(trainer.model.model.norm[1].scale, with_an_unknown_layer().model.norm[1].scale)


def test_a_parameter_is_left_out_with_all_its_uses():
    model = tiny_model(num_layers=2)
    model.model.spare = Scale(64)
    model.model.spare.scale = model.model.norm.weight
    scoped = resolve_scope(model, "auto", None)
    assert scoped.left_out == {"model.norm.weight": (64, "Scale")}
    assert "model.norm.weight" not in scoped.shapes
    assert model.model.norm not in scoped.names


def test_where_nothing_is_scored_the_head_stands_in(caplog, tmp_path):
    model, batch = with_an_unknown_layer().requires_grad_(False), random_batch()
    model.model.norm[1].scale.requires_grad_(True)
    expected = score_sketches(model, *batch, scope="lm_head")
    assert torch.equal(score_sketches(model, *batch, scope="auto"), expected)
    assert resolve_scope(model, "auto", None).coverage == 0
    trainer = construct(OBLRPOTrainer, OBLRPOConfig, tmp_path, model=model, **DEFAULTS)
    assert "cover 0 % of the 64 trainable" in caplog.text
    assert "output projection stands in" in caplog.text
    assert trainer.args.lr_adaptation == "snr"


def test_too_little_coverage_for_a_trust_region_means_the_snr_alone(caplog, tmp_path):
    options = DEFAULTS | {"model": with_an_unknown_layer(30_000)}
    trainer = construct(OBLRPOTrainer, OBLRPOConfig, tmp_path, **options)
    assert 0.5 < resolve_scope(trainer.model, "auto", None).coverage < 0.9
    assert (trainer.args.lr_adaptation, trainer.args.learning_rate) == ("snr", 5e-6)
    assert "lr_adaptation is 'snr': the schedule, from learning_rate=5e-06, is multiplied by rho" in caplog.text
    trainer.train()
    # The averages hold back while batches are few, as with "snr" from the start.
    as_asked = construct(OBLRPOTrainer, OBLRPOConfig, tmp_path, **options | {"lr_adaptation": "snr"})
    as_asked.train()
    assert logged(trainer, "lr_multiplier") == logged(as_asked, "lr_multiplier")
    assert logged(trainer, "learning_rate") == logged(as_asked, "learning_rate")


def test_the_search_for_the_rate_starts_from_all_trainable_entries(tmp_path, monkeypatch):
    """All of them move: a bound that counts the scored ones alone would be too high."""
    started = []
    start = TrustRegion.start

    def recorded(self, squared_norm, num_parameters, **options):
        started.append(num_parameters)
        start(self, squared_norm, num_parameters, **options)

    monkeypatch.setattr(TrustRegion, "start", recorded)
    trainer = construct(OBLRPOTrainer, OBLRPOConfig, tmp_path, model=with_an_unknown_layer(), **DEFAULTS)
    trainer.train()
    assert started == [sum(parameter.numel() for parameter in trainer.model.parameters())]


def test_a_rate_that_was_given_is_kept(tmp_path):
    options = DEFAULTS | {"model": with_an_unknown_layer(30_000), "learning_rate": 3e-4}
    assert construct(OBLRPOTrainer, OBLRPOConfig, tmp_path, **options).args.learning_rate == 3e-4


def test_a_trust_region_that_was_asked_for_is_refused_where_it_would_be_blind(tmp_path):
    options = DEFAULTS | {"model": with_an_unknown_layer(30_000), "lr_adaptation": "trust_region"}
    with pytest.raises(
        ValueError, match=r"lr_adaptation='trust_region': the scores cover .* `model\.norm\.1\.scale`.*Remedy"
    ):
        construct(OBLRPOTrainer, OBLRPOConfig, tmp_path, **options)


def test_a_layer_that_does_not_keep_sequences_apart_is_left_out_when_it_is_called():
    """Experts of a model that brings its own code: linear layers that are called with the tokens routed to them."""

    class Routing(nn.Module):
        def __init__(self, expert):
            super().__init__()
            self.expert = expert

        def forward(self, hidden):
            flat = hidden.flatten(0, 1)
            return flat.index_add(0, torch.tensor([1, 5, 6]), self.expert(flat[[1, 5, 6]])).view_as(hidden)

    def model():
        built = tiny_model(num_layers=2)
        built.model.norm = nn.Sequential(built.model.norm, Routing(nn.Linear(64, 64)))
        return built

    # of three sequences, so that three rows could pass for one of each
    batch = random_batch(batch_size=3)
    with pytest.warns(UserWarning, match=r"Linear of `model\.norm\.1\.expert\.weight`.*left out"):
        found = score_sketches(model(), *batch, method="exact", scope="auto")
    frozen = model()
    frozen.model.norm[1].requires_grad_(False)
    torch.testing.assert_close(found, score_sketches(frozen, *batch, method="exact", scope="all"))
    with pytest.raises(ValueError, match="do not keep the sequences of the batch apart"):
        score_sketches(model(), *batch, scope="all")


def test_layouts_that_keep_sequences_apart_are_told_from_others():
    layout = Layout(batch_size=3, num_tokens=4)
    values = torch.arange(3 * 4 * 2 * 5.0).view(3, 4, 2, 5)
    assert torch.equal(layout.batch_first(values), values)
    heads = values.flatten(0, 2)  # (24, 5): tokens and heads of a sequence follow one another
    assert torch.equal(layout.batch_first(heads), values.flatten(1, 2))
    assert layout.batch_first(torch.zeros(1, 4, 5)).shape == (3, 4, 5)
    # Features of three tokens, or of one, wherever these come from.
    assert layout.batch_first(torch.zeros(3, 5)) is None
    assert layout.batch_first(torch.zeros(1, 5)) is None
    assert layout.batch_first(torch.zeros(5, 4, 5)) is None
    assert torch.equal(layout.of_sequence(heads, 1), values[1].flatten(0, 1))
    assert torch.equal(layout.of_sequence(values, 1), values[1:2])
    positions = torch.zeros(1, 4, dtype=torch.long)
    assert layout.of_sequence(positions, 1) is positions
    bias = torch.zeros(3)  # of as many experts as there are sequences
    assert layout.of_sequence(bias, 1) is bias
    assert layout.batch_first(torch.tensor(1.0)) is None


@pytest.mark.parametrize("name", [name for name in MODELS if name not in NOT_TRAINED_BY_TRL])
def test_a_model_trains_a_step_with_the_default_options(tmp_path, name, recwarn):
    model = zoo_model(name, experts_implementation=None)  # the default of transformers
    trainer = construct(OBLRPOTrainer, OBLRPOConfig, tmp_path, model=model, **DEFAULTS)
    before = {key: parameter.clone() for key, parameter in trainer.model.named_parameters()}
    trainer.train()
    assert logged(trainer, "loss")
    assert all(norm > 0 for norm in logged(trainer, "score/norm/mean"))
    assert any(not torch.equal(parameter, before[key]) for key, parameter in trainer.model.named_parameters())
    assert trainer.args.lr_adaptation == "trust_region"
    assert not [warning for warning in recwarn if "scoring pass" in str(warning.message)]


DOCS = Path(__file__).parents[1] / "docs" / "models.md"


def document_row(name):
    """A row of the document: class, share of the tiny model's trainable entries that is scored, and layers that are not."""
    model = zoo_model(name)
    scoped = resolve_scope(model, "auto", None)
    layers = sorted({layer for _, layer in scoped.left_out.values()})
    return f"| `{type(model).__name__}` | {100 * scoped.coverage:.2f} % | {', '.join(f'`{layer}`' for layer in layers) or 'none'} |"


def test_the_document_has_a_row_for_every_model():
    rows = re.findall(r"^\| `.+", DOCS.read_text(), flags=re.MULTILINE)
    assert rows == [document_row(name) for name in MODELS]
