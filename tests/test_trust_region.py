"""The trust region: KL of an update against the exact one, the search for the rate, and what the trainer does with them."""

import json
import math
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from transformers import TrainerCallback

from oblr_trl import OBLRPOConfig, OBLRPOTrainer, trust_region
from oblr_trl.baselines import GroupedBatch
from oblr_trl.scores.accumulator import SketchAccumulator
from oblr_trl.scores.factors import DenseGradient
from oblr_trl.scores.parameters import LocalEntries, local_entries, local_parameter_sketch
from oblr_trl.scores.projections import COLUMNS, ROWS, Projections
from oblr_trl.scores.score_pass import ScorePass
from oblr_trl.scores.sketching import score_sketches
from oblr_trl.trust_region import Movement, TrustRegion, kl_of_update
from tests.recording import Recording, RecordingSGD, oracle_scores
from tests.tiny_models import construct, digit_reward, logged, random_batch, tiny_model, train

TRUST = {"lr_adaptation": "trust_region", "lr_scheduler_type": "constant"}
# Two generation batches of 4 prompts in every optimizer step, and two optimizer steps on every batch of 4 prompts.
POOLED = {"per_device_train_batch_size": 16, "gradient_accumulation_steps": 4, "steps_per_generation": 2}
SHARED = {"per_device_train_batch_size": 16, "steps_per_generation": 2}


def moved(model, size, seed=1):
    """Move the model by a random step of length `size`."""
    generator = torch.Generator().manual_seed(seed)
    step = {name: torch.randn(p.shape, generator=generator) for name, p in model.named_parameters()}
    norm = math.sqrt(sum(part.square().sum().item() for part in step.values()))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(step[name].to(parameter.dtype), alpha=size / norm)


def log_probs(model, input_ids, attention_mask, completion_mask, temperature=1.0):
    num_tokens = completion_mask.size(1)
    logits = model(input_ids=input_ids, attention_mask=attention_mask).logits[:, -num_tokens - 1 : -1]
    logps = (logits / temperature).log_softmax(dim=-1).gather(-1, input_ids[:, -num_tokens:].unsqueeze(-1)).squeeze(-1)
    return (logps * completion_mask).sum(dim=1)


@pytest.mark.parametrize("architecture", ["qwen3", "qwen3_untied", "gpt2"])
def test_inner_products_with_the_update_are_changes_of_log_probabilities(architecture):
    """Tied and untied tables, norms and biases: with a sketch as long as the parameters every product is exact."""
    batch = random_batch()
    model = tiny_model(architecture, hidden_size=32, num_layers=1).double()
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    score_pass = ScorePass(model, sketch_dim=num_parameters)
    old = local_parameter_sketch(score_pass)
    start = copied(model)
    with torch.no_grad():  # central differences: transformers' norms and rotations are in float32 even here
        moved(model, 1e-3)
        change, update = log_probs(model, *batch), local_parameter_sketch(score_pass) - old
        moved(model, -2e-3)
        change = (change - log_probs(model, *batch)) / 2
    model.load_state_dict(start)
    assert update.norm().item() == pytest.approx(1e-3, rel=1e-6)
    products = inner_products(score_pass, update, batch)
    torch.testing.assert_close(products, change.unsqueeze(1).expand(-1, 4), rtol=2e-3, atol=1e-7)
    assert kl_of_update(products) == pytest.approx(0.5 * change.square().mean().item(), rel=4e-3)


def test_inner_products_are_the_sums_of_those_of_every_parameter():
    """Of matrices of several shapes, of one that is not projected, and of a vector."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"a.q": (90, 80), "a.k": (90, 80), "b.o": (60, 70), "c.w": (5, 3), "norm": (7,)}
    options = {"dtype": torch.float64, "device": torch.device("cpu")}
    drawn = Projections(shapes, tables=(), sketch_dim=64, seed=0, **options)
    gradients = {
        name: torch.randn(4, *shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()
    }
    update = torch.cat(
        [drawn.project_entries(n, torch.ones(math.prod(s)).double(), 0, torch.float64) for n, s in shapes.items()]
    )

    def products(names):
        accumulator = SketchAccumulator(4, drawn, update)
        for name in names:
            accumulator.add(name, DenseGradient(gradients[name].flatten(1)))
        return accumulator.products()

    assert [drawn.is_factored(name) for name in shapes] == [True, True, True, False, False]
    single = [products([name]) for name in shapes]
    torch.testing.assert_close(products(shapes), sum(single), rtol=1e-12, atol=1e-12)
    assert all(part.abs().min() > 0 for part in single)
    # Nothing of "norm" is projected: all four estimates are the sum of its entries. Those of "a.q" differ.
    torch.testing.assert_close(single[4], gradients["norm"].sum(dim=1, keepdim=True).expand(-1, 4))
    assert single[0].std(dim=1).min() > 0


def copied(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def inner_products(score_pass, update, batch):
    input_ids, attention_mask, completion_mask = batch
    score_pass.update = update
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
    return score_pass(inputs, input_ids[:, -completion_mask.size(1) :], completion_mask.double()).products


def kl_over_sketches(model, batch, size, *, num_seeds, sketch_dim=256):
    """The exact KL of a move, and its estimates and the plain squares over seeds of the sketches."""
    start, estimates, plain = copied(model), [], []
    for seed in range(num_seeds):
        model.load_state_dict(start)
        score_pass = ScorePass(model, sketch_dim=sketch_dim, seed=seed)
        old = local_parameter_sketch(score_pass)
        with torch.no_grad():
            old_logps = log_probs(model, *batch)
            moved(model, size)
            exact = 0.5 * (log_probs(model, *batch) - old_logps).square().mean().item()
        update = local_parameter_sketch(score_pass) - old
        model.load_state_dict(start)
        products = inner_products(score_pass, update, batch)
        estimates.append(kl_of_update(products))
        plain.append(0.5 * products.mean(dim=1).square().mean().item())
    return exact, torch.tensor(estimates), torch.tensor(plain)


def test_the_kl_is_unbiased_over_sketches_where_the_plain_square_is_not():
    model = tiny_model(num_layers=2).double()
    exact, estimates, plain = kl_over_sketches(model, random_batch(batch_size=16), 1e-4, num_seeds=60)
    error = estimates.std() / math.sqrt(len(estimates))
    assert abs(estimates.mean() - exact) < 3 * error
    assert plain.mean() - exact > 6 * error


def rank_ones(axis, *, num_sequences=40, cosine=0.4):
    """Scores and an update of unit norm, matrices of one row times one column, that agree along `axis` and have a cosine of 0.4 along the other."""
    generator = torch.Generator().manual_seed(0)
    scores, update = [], []
    for side, dim in ((ROWS, 200), (COLUMNS, 160)):
        drawn = nn.functional.normalize(
            torch.randn(num_sequences + 1, dim, generator=generator, dtype=torch.float64), dim=1
        )
        update.append(drawn[0])
        others = cosine * drawn[0] + math.sqrt(1 - cosine**2) * drawn[1:]
        scores.append(drawn[:1].expand(num_sequences, -1) if side == axis else others)
    return scores[ROWS].unsqueeze(2) * scores[COLUMNS].unsqueeze(1), torch.outer(*update)


@pytest.mark.parametrize(("axis", "sketch_dim"), [(ROWS, 64), (COLUMNS, 56)])
def test_estimates_that_are_multiplied_share_no_half_of_rows_and_none_of_columns(axis, sketch_dim):
    """Also where the halves are of different lengths: 7 x 8 of 56."""
    (scores, update), estimates = rank_ones(axis), []
    for seed in range(300):
        options = {"dtype": torch.float64, "device": torch.device("cpu")}
        drawn = Projections({"weight": (200, 160)}, tables=(), sketch_dim=sketch_dim, seed=seed, **options)
        sketched = drawn.project_entries("weight", update.flatten(), 0, torch.float64)
        accumulator = SketchAccumulator(len(scores), drawn, sketched)
        accumulator.add("weight", DenseGradient(scores.flatten(1)))
        estimates.append(accumulator.products())
    # A half stands for all of its side, also one of 3 of 7 numbers.
    for side, width in ((ROWS, sketch_dim // 8), (COLUMNS, 8)):
        assert drawn.halves("weight", side).sum(dim=0).tolist() == pytest.approx([width, width])
    first, second, third, fourth = torch.stack(estimates).unbind(dim=2)
    exact = 0.5 * (scores * update).sum(dim=(1, 2)).square().mean()

    def error(draws):
        return (draws.mean() - exact) * math.sqrt(len(draws)) / draws.std()

    assert abs(error(torch.tensor([kl_of_update(draw) for draw in estimates]))) < 3
    # Of the side along which scores and update differ.
    share = first * third + second * fourth if axis == ROWS else first * second + third * fourth
    assert error(0.25 * share.mean(dim=1)) > 4


def test_the_kl_of_a_deep_model_is_far_more_precise_than_one_sketch_of_all_its_parameters():
    """The variance of one inner product of two sketches is |s|^2 |update|^2 / k; parameter by parameter it is divided by their number."""
    model = tiny_model(num_layers=6).double()
    batch = random_batch(batch_size=16)
    _, estimates, _ = kl_over_sketches(model, batch, 1e-4, num_seeds=12)
    scores = score_sketches(model, *batch, sketch_dim=4096)
    of_one_sketch = 0.5 * math.sqrt(2) * scores.square().sum(dim=1).mean().item() * 1e-8 / 256
    assert estimates.std() < of_one_sketch / 4


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_sketches_of_shards_add_up_to_the_sketch_of_the_whole(data):
    """However the flattened parameters are cut, by processes and to bound memory: a matrix that is projected, a table, a small matrix, a vector, a scalar."""
    shapes = {"matrix": (96, 80), "table": (600, 24), "small": (6, 5), "vector": (70,), "scalar": ()}
    sketch_dim = data.draw(st.sampled_from([64, 256, 200_000]))
    projections = Projections(
        shapes, tables={"table"}, sketch_dim=sketch_dim, seed=3, dtype=torch.float64, device=torch.device("cpu")
    )
    for i, (name, shape) in enumerate(shapes.items()):
        values = torch.randn(math.prod(shape), generator=torch.Generator().manual_seed(i), dtype=torch.float64)
        whole = SketchAccumulator(1, projections).add(name, DenseGradient(values.unsqueeze(0)))
        cut = data.draw(st.integers(0, values.numel()))
        at_once = data.draw(st.sampled_from([1, 150, 2**20]))
        with mock.patch("oblr_trl.scores.projections._ENTRIES_AT_ONCE", at_once):
            shards = [
                projections.project_entries(name, part, start, torch.float64)
                for start, part in ((0, values[:cut]), (cut, values[cut:]))
            ]
        torch.testing.assert_close(sum(shards), whole.flatten())


def test_entries_are_read_from_the_master_copy_where_an_engine_keeps_one():
    parameter = nn.Parameter(torch.arange(12.0).view(3, 4))
    assert local_entries(parameter).values.tolist() == list(range(12))
    mapping = SimpleNamespace(
        get_hp_fragment=lambda: torch.tensor([5.5, 6.5]), lp_fragment_address=SimpleNamespace(start=5)
    )
    parameter._hp_mapping = mapping
    entries = local_entries(parameter)
    assert (entries.values.tolist(), entries.start) == ([5.5, 6.5], 5)
    parameter._hp_mapping = None  # another process holds it
    assert local_entries(parameter).values.numel() == 0


@given(st.integers(0, 20), st.integers(1, 7))
def test_copies_of_the_same_entries_are_shared_out_among_their_holders(num_entries, num_copies):
    held = LocalEntries(torch.arange(float(num_entries)), 5)
    shares = [held.share(index, num_copies) for index in range(num_copies)]
    assert torch.equal(torch.cat([share.values for share in shares]), held.values)
    assert all((share.values == torch.arange(share.values.numel()) + share.start - 5).all() for share in shares)


def test_a_shard_of_zero_3_is_read_without_its_padding(monkeypatch):
    monkeypatch.setattr(torch.distributed, "get_rank", lambda group: group)
    parameter = nn.Parameter(torch.empty(0))
    parameter.ds_id, parameter.ds_numel, parameter.ds_tensor = 0, 10, SimpleNamespace(ds_numel=6)  # 2 x 6 for 10
    shards = {0: torch.arange(6.0), 1: torch.tensor([6.0, 7.0, 8.0, 9.0, -1.0, -1.0])}
    for rank, shard in shards.items():
        parameter.ds_process_group = rank
        parameter._z3_optimizer = SimpleNamespace(get_local_fp32_param=lambda _, shard=shard: shard)
        entries = local_entries(parameter)
        assert entries.values.tolist() == [float(i) for i in range(10)][6 * rank : 6 * rank + 6]
        assert entries.start == 6 * rank


@pytest.fixture
def process_group():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_shards_of_fsdp_2_are_read_by_rows_and_other_ones_refused(process_group):
    mesh = init_device_mesh("cpu", (1, 1))
    weight = torch.arange(12.0).view(4, 3)
    for placements in ([Replicate(), Shard(0)], [Shard(0), Replicate()]):
        entries = local_entries(nn.Parameter(distribute_tensor(weight, mesh, placements)))
        assert entries.values.tolist() == list(range(12))
        assert entries.start == 0
    with pytest.raises(ValueError, match="only along its first axis"):
        local_entries(nn.Parameter(distribute_tensor(weight, mesh, [Replicate(), Shard(1)])))


def policy(curvature, num_moved=10**12):
    """A policy of one parameter whose KL is `curvature` x its change squared, and a batch of it for a region, which has seen as many
    completions as make no doubt. Advantages of 0 leave c where it starts, at 0.1, and rho is unknown."""

    def step(region, index, parameter, position=1.0, entropy=1.0, rho=math.nan):
        update = region.update_since(torch.tensor([parameter], dtype=torch.float64), step=index)
        movement = Movement()
        if update is not None:
            products = (math.sqrt(2 * curvature) * update).expand(4, 4)
            region._num_moved = num_moved
            movement = region.observe(update, products, torch.zeros(4), position=position)
        return movement, region.next_rate(rho, entropy, position)

    return step


@pytest.mark.parametrize("curvature", [1e-2, 1e6])
def test_the_search_ends_at_the_target_whatever_the_curvature(curvature):
    region = TrustRegion(1.0)
    region.start(squared_norm=2 * curvature, num_parameters=10**6)
    step, parameter, rates = policy(curvature), 0.0, []
    for index in range(30):
        rates.append(step(region, index, parameter)[1])
        parameter += rates[-1]
    # KL = curvature x rate^2 = 0.1^2.
    assert rates[-1] == pytest.approx(math.sqrt(0.01 / curvature), rel=1e-6)
    # The start is a thousandth (sqrt of the number of parameters) of what may move one parameter by delta c^2.
    assert rates[0] == pytest.approx(math.sqrt(0.01 / curvature) / 1000)
    assert (torch.tensor(rates[1:]) / torch.tensor(rates[:-1])).max() <= 10 * (1 + 1e-6)


def test_the_rate_goes_half_of_the_way_in_orders_of_magnitude():
    region = TrustRegion(1.0)
    region.start(squared_norm=2.0, num_parameters=10**5)  # the 316th part of what one parameter may move by
    step, parameter, rates = policy(1.0), 0.0, []
    for index in range(8):
        rates.append(step(region, index, parameter)[1])
        parameter += rates[-1]
    # Ten times as much at most; half of what is left; 1.3 times as much at least.
    exponents = [-2.5, -1.5, -0.75, -0.375, -0.1875]
    assert rates[:5] == pytest.approx([0.1 * 10**exponent for exponent in exponents], rel=1e-6)
    assert rates[5:] == pytest.approx([1.3 * rates[4], 0.1, 0.1], rel=1e-6)


@pytest.mark.parametrize("skipped", [True, False])
def test_a_step_that_says_nothing_ends_no_approach_and_furthers_none(skipped):
    region = TrustRegion(1.0)
    region.start(squared_norm=2.0, num_parameters=10**5)
    step, parameter = policy(1.0), 0.0
    for index in range(3):
        before = parameter
        rate = step(region, index, parameter)[1]
        parameter += rate
    # Its KL is not finite, or it moved nothing.
    assert step(region, 3, before if skipped else math.inf)[1] == rate
    region.parameters = torch.tensor([before], dtype=torch.float64)
    assert step(region, 4, parameter)[1] == pytest.approx(10**0.375 * rate)


@pytest.mark.parametrize(("num_completions", "doubt"), [(10, 31.0), (300, 2.0), (3 * 10**5, 1.001)])
def test_the_average_of_few_completions_is_taken_for_larger(num_completions, doubt):
    region = TrustRegion(1.0)
    region.start(squared_norm=2.0, num_parameters=10**5)
    region.update_since(torch.zeros(1, dtype=torch.float64), step=0)
    rate = region.next_rate(math.nan, 1.0, 1.0)
    update = region.update_since(torch.full((1,), rate, dtype=torch.float64), step=1)
    region.observe(
        update, (math.sqrt(2) * update).expand(num_completions, 4), torch.zeros(num_completions), position=1.0
    )
    growth = math.sqrt(0.1 / math.sqrt(doubt) / rate)
    assert region.next_rate(math.nan, 1.0, 1.0) == pytest.approx(rate * min(growth, 10.0), rel=1e-9)


def test_a_jump_of_the_snr_is_approached_like_one_of_the_curvature():
    region = TrustRegion(1.0)
    region.start(squared_norm=2.0, num_parameters=4)
    step, parameter = policy(1.0), 0.0
    for index in range(12):
        rate = step(region, index, parameter)[1]
        parameter += rate
    assert rate == pytest.approx(0.1, rel=1e-6)
    region.load_state_dict(region.state_dict() | {"correlation": 0.9})
    assert step(region, 12, parameter, entropy=4.0)[1] == pytest.approx(
        2 * 0.3, rel=1e-6
    )  # a factor of 3 of 9; H at once


def test_the_movement_is_a_part_of_the_entropy_also_while_it_falls():
    region = TrustRegion(1.0)
    region.start(squared_norm=2.0, num_parameters=4)
    step, total, rates = policy(1.0), 0.0, []
    for index, entropy in enumerate([36.0] * 12 + [9.0, 4.0, math.nan]):
        movement, rate = step(region, index, total, entropy=entropy)
        rates.append(rate)
        total += rate
    # KL = rate^2 = 0.1^2 x H; without completions to take H of, the rate is held.
    assert rates[-4:] == pytest.approx([0.6, 0.3, 0.2, 0.2], rel=1e-6)
    assert movement.kl == pytest.approx(0.04, rel=1e-6) == region.target(math.nan, 4.0)


def test_the_search_survives_a_batch_without_entropy_and_an_entropy_that_comes_and_goes():
    region = TrustRegion(1.0)
    region.start(squared_norm=2.0, num_parameters=10**12)
    step, parameter, rates = policy(1.0), 0.0, []
    for index in range(16):
        rates.append(step(region, index, parameter, entropy=math.nan if index == 3 else 1.0)[1])
        parameter += rates[-1]
    assert rates[-1] == pytest.approx(0.1, rel=1e-6)
    for index in range(16, 60):
        rates.append(step(region, index, parameter, entropy=float(index % 2))[1])
        parameter += rates[-1]
    assert rates[-1] == pytest.approx(0.1, rel=1e-6)
    assert rates[-2] == 0.0


def observed(region, correlations, *, num_completions=64, deviation=0.01, advantage=0.3, num_steps=1):
    """Let a region observe batches whose correlation of advantages and log-ratios is exactly what is asked for."""
    parameter = 0.0
    for index, correlation in enumerate(correlations):
        update = region.update_since(torch.tensor([parameter], dtype=torch.float64), step=num_steps * index)
        if update is not None:
            generator = torch.Generator().manual_seed(index)
            first, second = torch.linalg.qr(torch.randn(num_completions, 2, generator=generator, dtype=torch.float64))[
                0
            ].T
            changes = deviation * math.sqrt(num_completions) * first * update.abs()
            advantages = correlation * first + math.sqrt(1 - correlation**2) * second
            products = changes.unsqueeze(1).expand(-1, 4)
            region.observe(update, products, advantage * math.sqrt(num_completions) * advantages, position=1.0)
        parameter += region.next_rate(0.0, 1.0, 1.0)


@pytest.mark.parametrize("advantage", [0.3, 3.0])
def test_the_correlation_is_that_of_advantages_with_changes_of_log_probabilities(advantage):
    region = TrustRegion(1.0)
    region.start(squared_norm=2e-4, num_parameters=4)
    observed(region, [0.5] * 2, advantage=advantage)
    # 100 completions of the prior, of which exp(-64 / 1280) are left, and 64 of the batch.
    prior = 100 * math.exp(-0.05)
    assert region.correlation == pytest.approx((0.1 * prior + 0.5 * 64) / (prior + 64), rel=1e-9)
    assert region.target(0.0, 2.0) == pytest.approx(2 * region.correlation**2, rel=1e-12)
    observed(region, [0.5] * 200, advantage=advantage)
    assert region.correlation == pytest.approx(0.5, rel=1e-3)
    observed(region, [-0.5] * 200, advantage=advantage, num_steps=4)  # steps that do harm, four on a batch
    assert region.correlation == pytest.approx(-0.5, rel=1e-3)
    assert region.target(0.0, 1.0) == pytest.approx(0.05**2)  # the minimum


def test_the_correlation_is_averaged_over_completions_not_batches():
    few, many = TrustRegion(1.0), TrustRegion(1.0)
    for region, num_batches, num_completions in ((few, 160, 8), (many, 10, 128)):
        region.start(squared_norm=2e-4, num_parameters=4)
        observed(region, [0.4] * (num_batches + 1), num_completions=num_completions)
    assert few.correlation == pytest.approx(many.correlation, rel=0.02)
    assert few.correlation == pytest.approx(0.387, abs=0.003)


@pytest.mark.parametrize(("rho", "correlation"), [(1.0, math.sqrt(0.05)), (0.8, 0.2), (0.1, 0.1), (math.nan, 0.1)])
def test_the_step_is_as_large_as_the_snr_of_the_gradient_allows_where_it_overshoots(rho, correlation):
    region = TrustRegion(1.0)  # c is 0.1
    assert region.target(rho, 3.0, 0.5) == pytest.approx(correlation**2 * 3 / 4, rel=1e-12)
    step, parameter = policy(1.0), 0.0
    region.start(squared_norm=2.0, num_parameters=4)
    for index in range(12):
        rate = step(region, index, parameter, rho=rho)[1]
        parameter += rate
    assert rate == pytest.approx(correlation, rel=1e-6)
    region.load_state_dict(region.state_dict() | {"correlation": -0.3})
    assert region.target(rho, 1.0) == pytest.approx(max(0.05 * rho if rho == rho else 0, 0.05**2), rel=1e-12)


def test_the_bounds_hold_for_either_snr():
    region = TrustRegion(1.0, min_correlation=0.15, max_correlation=0.2)  # c is 0.1
    assert [region.target(rho, 1.0) for rho in (0.0, 0.6, 1.0)] == pytest.approx([0.15**2, 0.03, 0.2**2], rel=1e-12)
    region.load_state_dict(region.state_dict() | {"correlation": 0.5})
    assert region.target(0.0, 1.0) == pytest.approx(0.2**2, rel=1e-12)


def test_without_a_minimum_the_rate_falls_towards_0_and_comes_back_with_the_signal():
    region = TrustRegion(1.0, min_correlation=0.0)
    region.start(squared_norm=2.0, num_parameters=4)
    step, parameter, rates = policy(1.0), 0.0, []
    for index in range(12):
        parameter += step(region, index, parameter)[1]
    region.load_state_dict(region.state_dict() | {"correlation": -0.3})
    for index, rho in enumerate((0.0, 0.0, 0.2, 0.2), 12):
        rates.append(step(region, index, parameter, rho=rho)[1])
        parameter += rates[-1]
    assert rates == pytest.approx([0.02, 0.004, 0.02, 0.02 * 5**0.5], rel=1e-6)
    for index in range(16, 60):
        rate = step(region, index, parameter, rho=0.0)[1]
        parameter += rate
    assert rate == pytest.approx(0.002, rel=1e-6)
    for index in range(60, 66):
        rate = step(region, index, parameter, rho=0.2)[1]
        parameter += rate
    assert rate == pytest.approx(0.1, rel=1e-6)


def test_completions_without_a_score_or_with_equal_rewards_say_nothing_of_the_correlation():
    region = TrustRegion(1.0)
    region.start(squared_norm=2.0, num_parameters=4)
    region.update_since(torch.zeros(1, dtype=torch.float64), step=0)
    region.next_rate(0.0, 1.0, 1.0)
    update = region.update_since(torch.full((1,), 0.05, dtype=torch.float64), step=1)
    state = region.state_dict()
    changes = torch.full((4, 4), 0.05, dtype=torch.float64)
    for advantages in (torch.zeros(4), torch.full((4,), math.nan)):
        region.load_state_dict(state)
        region.observe(update, changes, advantages, position=1.0)
        assert region.correlation == 0.1
    region.load_state_dict(state)
    region.observe(update, changes, torch.tensor([1.0, math.nan, 1.0, math.nan]), position=1.0)
    prior = 100 * math.exp(-2 / 1280)
    assert region.correlation == pytest.approx((0.1 * prior + 2) / (prior + 2), rel=1e-6)


def test_the_rate_is_held_where_a_batch_says_nothing():
    region = TrustRegion(1.0)
    region.start(squared_norm=2.0, num_parameters=4)
    step = policy(1.0)
    total = 0.0
    for index in range(10):
        _, rate = step(region, index, total)
        total += rate
    state = region.state_dict()
    assert step(region, 10, total, entropy=math.nan)[1] == rate  # no completion
    region.load_state_dict(state)
    assert step(region, 10, total - rate)[1] == pytest.approx(rate)  # a step that was skipped
    region.load_state_dict(state)
    assert step(region, 10, math.inf)[1] == pytest.approx(rate)  # a KL that is not finite
    region.load_state_dict(state)
    assert step(region, 10, total)[1] == pytest.approx(rate)
    region.load_state_dict(json.loads(json.dumps(state)))
    assert step(region, 10, 1e6)[1] == pytest.approx(rate / 5)  # far too far: the bound of a change


def test_the_rate_is_held_where_the_estimate_is_negative():
    region = TrustRegion(1.0)
    region.start(squared_norm=2.0, num_parameters=4)
    step, total = policy(1.0), 0.0
    for index in range(10):
        _, rate = step(region, index, total)
        total += rate
    state = region.state_dict()
    before, flat = region.parameters, policy(1e-12)

    def next_rate(**changes):
        region.load_state_dict(state | changes)
        region.parameters = before
        return flat(region, 10, total)[1]

    # A batch without curvature leaves 0.8 of the average.
    assert next_rate() == pytest.approx(rate * math.sqrt(1 / 0.8), rel=0.03)
    assert next_rate(_curvature=1e-20) == pytest.approx(10 * rate, rel=1e-3)
    assert next_rate(_curvature=-1.0) == rate


def test_the_schedule_shapes_the_rate_and_a_second_batch_of_a_step_measures_nothing():
    region = TrustRegion(1.0)
    region.start(squared_norm=2.0, num_parameters=4)
    step, total = policy(1.0), 0.0
    for index in range(12):
        movement, rate = step(region, index, total, position=0.5)
        again, same = step(region, index, total, position=0.5)
        assert math.isnan(again.kl)
        assert same == rate
        total += 0.5 * rate
    # The rate is that of a schedule at its start, so half of it moves by a quarter of delta c^2 H.
    assert rate == pytest.approx(0.1, rel=1e-6)
    assert movement.kl == pytest.approx(0.01 / 4, rel=1e-3)


def test_steps_that_share_a_batch_count_at_their_mean_place_of_the_schedule():
    """Warm-up over four steps on one batch: rates of 0, 0.1, 0.2, 0.3 times the initial one make 0.6 of it, 0.15 each on average."""
    region = TrustRegion(1.0)
    region.start(squared_norm=1.4, num_parameters=2, num_steps=4)
    assert region.rate == pytest.approx(math.sqrt(2 / 2.8) / 4)
    step = policy(1.0)
    _, rate = step(region, 0, 0.0, position=0.0)
    movement, found = step(region, 4, 0.6 * rate, position=0.4)
    assert movement.kl == pytest.approx((0.6 * rate) ** 2)
    # The curvature of a step's rate is that of all four: 16, so that a rate of sqrt(0.1^2 / 16) moves by delta c^2.
    assert found == pytest.approx(math.sqrt(0.01 / 16))


def test_the_first_step_of_adam_moves_the_policy_by_less_than_delta(tmp_path):
    options = {**TRUST, "max_steps": 2, "learning_rate": 1.0, "trust_region_kl": 0.2}
    trainer = train(Recording, OBLRPOConfig, tmp_path, **options)
    first, second = trainer.batches
    model = tiny_model(num_layers=2)
    model.load_state_dict(first["state"])
    inputs = [torch.cat([first[f"prompt_{key}"], first[f"completion_{key}"]], dim=1) for key in ("ids", "mask")]
    with torch.no_grad():
        before = log_probs(model, *inputs, first["completion_mask"])
        model.load_state_dict(second["state"])
        change = log_probs(model, *inputs, first["completion_mask"]) - before
    assert 0 < 0.5 * change.square().mean() < logged(trainer, "trust_region/kl_target")[0]


@pytest.mark.parametrize(("optim", "kl"), [("adamw_torch", 0.05), ("sgd", 0.01)])
def test_what_is_logged_is_the_movement_and_its_target_is_met(tmp_path, monkeypatch, optim, kl):
    """The measured KL against exact log-ratios of the same completions under both weights."""
    monkeypatch.setattr(trust_region, "_DOUBT", 0)  # which few completions leave
    options = {**TRUST, "max_steps": 20, "trust_region_kl": kl, "optim": optim}
    trainer = train(Recording, OBLRPOConfig, tmp_path, **options)
    measured, target = (torch.tensor(logged(trainer, f"trust_region/{name}")[-8:]) for name in ("kl", "kl_target"))
    model, exact = tiny_model(num_layers=2), []
    for before, batch in zip(trainer.batches[-9:-1], trainer.batches[-8:], strict=True):
        inputs = [torch.cat([batch[f"prompt_{key}"], batch[f"completion_{key}"]], dim=1) for key in ("ids", "mask")]
        with torch.no_grad():
            model.load_state_dict(batch["state"])
            logps = log_probs(model, *inputs, batch["completion_mask"])
            model.load_state_dict(before["state"])
            exact.append(0.5 * (logps - log_probs(model, *inputs, batch["completion_mask"])).square().mean().item())
    assert measured.mean().item() == pytest.approx(sum(exact) / len(exact), rel=0.25)
    assert 0.3 < measured.mean() / target.mean() < 3


@pytest.mark.parametrize(
    ("options", "architecture"),
    [({}, "qwen3"), (POOLED, "qwen3"), (SHARED, "qwen3"), ({"optim": "sgd"}, "qwen3"), ({}, "qwen3_lora")],
)
def test_the_start_and_the_unit_of_rewards_do_not_matter(tmp_path, options, architecture):
    def tenfold(completions, **kwargs):
        return [10 * reward for reward in digit_reward(completions)]

    def rates(name, **changes):
        # Clipping gives the steps of Adam's averages other weights, by the unit: that is 2 % of the rate here.
        unclipped = {} if "optim" in options else {"max_grad_norm": 0.0}
        model = tiny_model(architecture, num_layers=2)
        all_options = TRUST | {"max_steps": 6, "model": model} | unclipped | options | changes
        trainer = train(OBLRPOTrainer, OBLRPOConfig, tmp_path / name, **all_options)
        return torch.tensor(logged(trainer, "learning_rate"))

    reference = rates("reference")
    assert len(set(reference.tolist())) >= 3
    torch.testing.assert_close(rates("low", learning_rate=1e-7), reference, rtol=1e-3, atol=0)
    torch.testing.assert_close(rates("high", learning_rate=1e-2), reference, rtol=1e-3, atol=0)
    if "optim" not in options:  # the length of SGD's steps is in the unit of rewards, and so is the rate that it needs
        torch.testing.assert_close(rates("rewards", reward=tenfold), reference, rtol=1e-2, atol=0)


@pytest.mark.parametrize("bound", [0.02, 0.3])
def test_the_multipliers_bound_the_correlation(tmp_path, bound):
    bounds = {"snr_min_multiplier": bound, "snr_max_multiplier": bound, "trust_region_kl": 0.01}
    trainer = train(OBLRPOTrainer, OBLRPOConfig, tmp_path, **TRUST, **bounds)
    entropies, targets = (logged(trainer, f"trust_region/{name}") for name in ("entropy", "kl_target"))
    assert targets == pytest.approx([0.01 * bound**2 * entropy for entropy in entropies], rel=1e-9)
    assert len(set(logged(trainer, "trust_region/correlation"))) == 3  # what is logged is what was measured


def test_the_target_and_the_rate_follow_the_larger_snr(tmp_path, monkeypatch):
    for bound in ("_MIN_GROWTH", "_MAX_GROWTH", "_MAX_SHRINKAGE"):  # none: the wanted rate is taken
        monkeypatch.setattr(trust_region, bound, 1e12)

    class Overshoot(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 4:
                trainer._trust_region.correlation = -0.1

    options = TRUST | {"snr_ema_decay": 0.0, "snr_min_multiplier": 0.0, "max_steps": 8}
    trainer = construct(OBLRPOTrainer, OBLRPOConfig, tmp_path, trainer={"callbacks": [Overshoot()]}, **options)
    trainer.train()
    region, delta = trainer._trust_region, trainer.args.trust_region_kl
    names = ("gradient_snr/rho", "trust_region/correlation", "trust_region/entropy", "trust_region/kl_target")
    rows = list(zip(*(logged(trainer, name) for name in names), strict=True))
    snrs = [max(rho / 20, max(correlation, 0) ** 2) for rho, correlation, _, _ in rows]
    assert [target for *_, target in rows] == pytest.approx(
        [delta * snr * entropy for snr, (_, _, entropy, _) in zip(snrs, rows, strict=True)], rel=1e-9
    )
    assert {rho / 20 > correlation**2 for rho, correlation, _, _ in rows} == {True, False}
    assert region.rate == pytest.approx(region._unit_rate * math.sqrt(rows[-1][-1] / delta), rel=1e-9)
    assert logged(trainer, "learning_rate")[-1] == pytest.approx(region.rate, rel=1e-6)


def test_nothing_moves_before_a_completion_has_a_score(tmp_path):
    """All completions of the first batches are masked: their scores are zero, which is no reason to move at any rate."""
    options = TRUST | {"mask_truncated_completions": True, "max_completion_length": 1, "max_steps": 3}
    trainer = train(OBLRPOTrainer, OBLRPOConfig, tmp_path, **options)
    rates = logged(trainer, "learning_rate")
    assert len(rates) == 3
    assert max(rates) < 1e-2
    assert all(parameter.isfinite().all() for parameter in trainer.model.parameters())


def test_the_default_is_the_trust_region_where_all_parameters_are_scored(tmp_path):
    options = {"gradient_accumulation_steps": 16, "use_cpu": True, "bf16": False}
    assert OBLRPOConfig(str(tmp_path), **options).lr_adaptation == "trust_region"
    assert OBLRPOConfig(str(tmp_path), **options, score_scope="lm_head").lr_adaptation == "snr"
    assert OBLRPOConfig(str(tmp_path), **options, score_scope="lm_head").learning_rate == 5e-6


def test_a_schedule_that_rises_above_its_start_is_warned_of(tmp_path):
    model = tiny_model(num_layers=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 + step)
    options = {"model": model, "optimizers": (optimizer, schedule), "lr_adaptation": "trust_region"}
    with pytest.warns(UserWarning, match="stands at 2 times its initial learning rate"):
        train(OBLRPOTrainer, OBLRPOConfig, tmp_path, **options)


def test_parameters_that_are_frozen_on_the_way_do_not_pass_for_a_movement(tmp_path):
    class Freeze(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            if state.global_step == 3:
                model.model.layers[0].requires_grad_(False)

    trainer = train(OBLRPOTrainer, OBLRPOConfig, tmp_path, callbacks=[Freeze()], **TRUST, max_steps=5)
    kls = logged(trainer, "trust_region/kl")
    assert [kl is None for kl in kls] == [True, False, False, True, False]


class FreezeInTurn(TrainerCallback):
    """Trains the first block alone, after three steps the second: as many parameters."""

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.train_block(model, int(state.global_step >= 3))

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.train_block(model, int(state.global_step >= 3))

    def train_block(self, model, index):
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        model.model.layers[index].requires_grad_(True)


def test_blocks_that_are_trained_in_turn_do_not_pass_for_a_movement(tmp_path):
    options = TRUST | {"max_steps": 6, "save_strategy": "steps", "save_steps": 1}
    trainer = train(OBLRPOTrainer, OBLRPOConfig, tmp_path, callbacks=[FreezeInTurn()], **options)
    kls = logged(trainer, "trust_region/kl")
    assert [kl is None for kl in kls] == [True, False, False, True, False, False]
    # The sketch in the checkpoint is of the parameters that were trained when it was written, maybe others than those of the next step.
    for step in (2, 3):
        options["resume_from_checkpoint"] = str(tmp_path / f"checkpoint-{step}")
        resumed = train(OBLRPOTrainer, OBLRPOConfig, tmp_path, callbacks=[FreezeInTurn()], **options)
        assert logged(resumed, "trust_region/kl") == kls
    options["resume_from_checkpoint"] = str(tmp_path / "checkpoint-3")
    resumed = train(OBLRPOTrainer, OBLRPOConfig, tmp_path, **options)
    assert [kl is None for kl in logged(resumed, "trust_region/kl")] == [True, False, False, True, False, False]


def test_masked_completions_say_nothing_of_the_movement(tmp_path):
    """vLLM's correction gives a sequence the weight 0, a truncated one has no token: neither is a completion that did not move."""
    trainer = train(OBLRPOTrainer, OBLRPOConfig, tmp_path, **TRUST, max_steps=3)
    trainer._begin_movement()
    update = trainer._score_pass.update
    products = torch.randn(2, 8, 4, generator=torch.Generator().manual_seed(0))
    token_weights = torch.full((2, 8), 0.5)
    token_weights[0, 0], token_weights[1, 3] = 0.0, math.nan
    products[token_weights != 0.5] = 0.0
    batch = GroupedBatch(
        *torch.ones(2, 2, 8), sketches=torch.zeros(2, 8, 16), products=products, token_weights=token_weights
    )
    measured = trainer._take_in_movement(batch, torch.zeros(2, 8), 1)["trust_region/kl"]
    assert update.any()
    assert measured == pytest.approx(kl_of_update(2 * products[token_weights == 0.5]), rel=1e-6)


@pytest.mark.parametrize("loss_type", ["dr_grpo", "grpo"])
def test_the_entropy_is_that_of_all_completions_of_a_step_that_count(tmp_path, loss_type):
    """Of both generation batches, under the policy at its temperature; completions that ran out of tokens are masked."""
    options = TRUST | POOLED | {"mask_truncated_completions": True, "loss_type": loss_type, "max_steps": 1}
    trainer = train(Recording, OBLRPOConfig, tmp_path, temperature=0.7, **options)
    model, entropies = tiny_model(num_layers=2), []
    for batch in trainer.batches:
        inputs = [torch.cat([batch[f"prompt_{key}"], batch[f"completion_{key}"]], dim=1) for key in ("ids", "mask")]
        with torch.no_grad():
            logps = log_probs(model, *inputs, batch["completion_mask"], temperature=0.7)
        entropies.append(-logps[batch["completion_mask"].any(dim=1)])
    first, second = entropies
    assert 0 < len(first) + len(second) < 64
    expected = torch.cat(entropies).mean().item()
    assert abs(expected - second.mean().item()) > 1e-3
    assert logged(trainer, "trust_region/entropy") == pytest.approx([expected], rel=1e-5)


def test_groups_of_parameters_keep_their_ratios(tmp_path):
    model = tiny_model(num_layers=2)
    (head, *others) = model.parameters()
    optimizer = RecordingSGD([{"params": [head], "lr": 0.1}, {"params": others, "lr": 0.02}])
    trainer = train(OBLRPOTrainer, OBLRPOConfig, tmp_path, model=model, optimizers=(optimizer, None), **TRUST)
    multipliers = logged(trainer, "lr_multiplier")
    for (first, second), multiplier in zip(optimizer.used, multipliers, strict=True):
        assert first == pytest.approx(0.1 * multiplier)
        assert second == pytest.approx(0.02 * multiplier)


@pytest.mark.parametrize("options", [{}, SHARED | {"save_steps": 3}], ids=["between batches", "on old rollouts"])
def test_a_resumed_run_equals_one_that_was_not_interrupted(tmp_path, options):
    options = TRUST | {"max_steps": 6, "save_strategy": "steps", "save_steps": 2} | options
    whole = train(OBLRPOTrainer, OBLRPOConfig, tmp_path / "whole", **options)
    checkpoint = str(tmp_path / "whole" / f"checkpoint-{options['save_steps']}")
    resumed = train(OBLRPOTrainer, OBLRPOConfig, tmp_path / "resumed", resume_from_checkpoint=checkpoint, **options)
    names = ("learning_rate", "trust_region/kl", "trust_region/kl_target", "lr_multiplier", "loss")
    for name in names:
        assert logged(resumed, name) == logged(whole, name)
    for ours, theirs in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_another_learning_rate_changes_nothing_of_a_resumed_run(tmp_path):
    options = TRUST | SHARED | {"max_steps": 8, "save_strategy": "steps", "save_steps": 5}
    whole = train(OBLRPOTrainer, OBLRPOConfig, tmp_path / "whole", **options)
    changed = options | {"learning_rate": 0.3, "resume_from_checkpoint": str(tmp_path / "whole" / "checkpoint-5")}
    resumed = train(OBLRPOTrainer, OBLRPOConfig, tmp_path / "resumed", **changed)
    assert logged(resumed, "learning_rate") == pytest.approx(logged(whole, "learning_rate"), rel=1e-6)


def test_another_sketch_does_not_spoil_a_resumed_run(tmp_path):
    options = TRUST | {"max_steps": 10, "save_strategy": "steps", "save_steps": 8}
    whole = train(OBLRPOTrainer, OBLRPOConfig, tmp_path / "whole", **options)
    changed = options | {"score_sketch_dim": 1024, "resume_from_checkpoint": str(tmp_path / "whole" / "checkpoint-8")}
    resumed = train(OBLRPOTrainer, OBLRPOConfig, tmp_path / "resumed", **changed)
    assert logged(resumed, "trust_region/kl")[8] is None
    assert logged(resumed, "learning_rate")[8:] == pytest.approx(logged(whole, "learning_rate")[8:], rel=0.5)


def test_a_second_train_searches_anew(tmp_path):
    trainer = train(OBLRPOTrainer, OBLRPOConfig, tmp_path, **TRUST, max_steps=6)
    first = logged(trainer, "learning_rate")
    trainer.train()
    second = logged(trainer, "learning_rate")[-6:]
    assert first[0] / 3 < second[0] < 3 * first[0]  # times sqrt(rho x entropy)
    assert second[0] < first[-1] / 3


def test_a_second_train_does_not_pool_the_entropy_of_the_first(tmp_path):
    """Both begin with a step of number 0."""
    trainer = train(OBLRPOTrainer, OBLRPOConfig, tmp_path, **TRUST, max_steps=1, temperature=0.1)
    before = logged(trainer, "trust_region/entropy")
    trainer._score_pass.temperature = 10.0  # under which every token has about log(40) nats
    trainer.train()
    assert logged(trainer, "trust_region/entropy")[-1] > 2 * before[0]
    assert trainer._num_completions == 32


def changes_of_second_batch(trainer):
    """Exact <s, u>: of the scores of the second batch with what the step on the first one did."""
    before, batch = trainer.batches
    model = tiny_model(num_layers=2)
    model.load_state_dict(before["state"])
    old = nn.utils.parameters_to_vector(model.parameters())
    model.load_state_dict(batch["state"])
    update = nn.utils.parameters_to_vector(model.parameters()) - old
    return oracle_scores(batch).flatten(0, 1).double() @ update.double()


def test_losses_that_divide_by_length_measure_the_same_movement(tmp_path):
    """The sketch of `grpo` is of the mean over tokens, the KL of the sum."""
    trainer = train(
        Recording, OBLRPOConfig, tmp_path, **TRUST, loss_type="grpo", max_steps=2, score_sketch_dim=100_000
    )
    expected = 0.5 * changes_of_second_batch(trainer).square().mean().item()
    assert logged(trainer, "trust_region/kl")[-1] == pytest.approx(expected, rel=0.02)


def test_the_correlation_of_a_run_is_that_of_its_advantages_with_exact_changes(tmp_path):
    """With a sketch as long as the parameters; 100 completions of the prior and 32 of the batch."""
    trainer = train(Recording, OBLRPOConfig, tmp_path, **TRUST, max_steps=2, score_sketch_dim=100_000)
    changes, advantages = changes_of_second_batch(trainer), trainer.batches[1]["advantages"].flatten().double()
    exact = (advantages * changes).mean() / (advantages.square().mean() * changes.square().mean()).sqrt()
    prior = 100 * math.exp(-32 / 1280)
    expected = (0.1 * prior + 32 * exact.item()) / (prior + 32)
    assert logged(trainer, "trust_region/correlation") == pytest.approx([0.1, expected], rel=0.02)


def test_a_scope_that_leaves_parameters_out_is_refused(tmp_path):
    with pytest.raises(ValueError, match="score_scope='lm_head': the trust region measures how far all trainable"):
        OBLRPOConfig(
            str(tmp_path), **TRUST, score_scope="lm_head", gradient_accumulation_steps=16, use_cpu=True, bf16=False
        )
