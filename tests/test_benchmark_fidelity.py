"""The fidelity study at a tiny size, and its measures on scores whose answers are known."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from benchmarks import fidelity, policies, policy_pools
from benchmarks.fidelity_measures import average_ranks, measure_sketches, rank_correlation, rho_differences
from benchmarks.sections import fidelity as fidelity_section
from examples.tiny_qwen3.model import build_model, build_tokenizer
from oblr_trl.baselines import gradient_weighted_baseline
from oblr_trl.gradient_snr import gradient_moments


def random_batch(num_prompts: int = 4, num_completions: int = 5) -> tuple[Tensor, Tensor]:
    """Rewards (P, G), and scores (P, G, D) of unequal norms."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(num_prompts, num_completions, 12, generator=generator, dtype=torch.float64)
    scores *= torch.rand(num_prompts, num_completions, 1, generator=generator, dtype=torch.float64) * 3
    return torch.randint(0, 2, (num_prompts, num_completions), generator=generator).double(), scores


def measured(rewards: Tensor, scores: Tensor, sketches: Tensor):
    """What one scope's one sketch is measured to be, and the whole."""
    norms = scores.square().sum(dim=2)
    whole = measure_sketches(rewards, list(scores), {"all": (norms, {"12": sketches})}, prior_strength=4.0)
    return whole["scopes"]["all"]["12"], whole


def test_weights_that_differ_by_rounding_share_a_rank():
    ranks = average_ranks(torch.tensor([[3.0, 1.0, 3.0 + 1e-6, 8.0]]))
    assert ranks.tolist() == [[2.0, 0.5, 2.0, 3.5]]


def test_the_rank_correlation_is_spearmans_and_leaves_out_groups_without_order():
    # Ranks (1 2 3 4) and (2 1 4 3): 1 - 6 x 4 / (4 x 15) = 0.6; (1 2 3 4) and (4 3 2 1): -1; the last group is all ties.
    exact = torch.tensor([[1.0, 2.0, 3.0, 4.0]] * 3)
    estimate = torch.tensor([[20.0, 10.0, 40.0, 30.0], [9.0, 7.0, 5.0, 1.0], [5.0, 5.0, 5.0, 5.0]])
    assert rank_correlation(estimate, exact) == pytest.approx((0.6 - 1) / 2)
    assert math.isnan(rank_correlation(estimate[2:], exact[2:]))


def test_a_rotation_of_the_scores_is_a_perfect_sketch():
    rewards, scores = random_batch()
    rotation = torch.linalg.qr(torch.randn(12, 12, dtype=torch.float64)).Q
    figures, whole = measured(rewards, scores, (scores @ rotation).flatten(0, 1))
    assert figures["rank_correlation"] == pytest.approx(1)
    assert figures["norm_error"] < 1e-9
    assert figures["baseline_difference"] < 1e-9
    assert figures["objective"] == pytest.approx(1)
    assert figures["moments"] == pytest.approx(whole["moments"])
    assert whole["rloo_objective"] != pytest.approx(1)


def test_a_sketch_of_equal_norms_gives_the_plain_baseline():
    rewards, scores = random_batch()
    norms = scores.square().sum(dim=2)
    units = scores / norms.sqrt().unsqueeze(2)
    figures, whole = measured(rewards, scores, units.flatten(0, 1))
    exact = gradient_weighted_baseline(rewards, norms, prior_strength=4.0)
    plain = gradient_weighted_baseline(rewards, torch.ones_like(norms), prior_strength=4.0)
    assert figures["baseline_difference"] == pytest.approx(((plain - exact).abs().mean() / rewards.std()).item())
    objective = (norms * (rewards - plain).square()).mean() / (norms * (rewards - exact).square()).mean()
    assert figures["objective"] == pytest.approx(objective.item())
    assert figures["norm_error"] == pytest.approx((1 / norms - 1).abs().median().item())
    # Signal and noise are compared under the same advantages, the exact ones.
    for moments, vectors in ((whole["moments"], scores), (figures["moments"], units)):
        gradients = ((rewards - exact).unsqueeze(2) * vectors).mean(dim=1)
        assert moments == pytest.approx(tuple(gradient_moments(gradients)))


def test_rho_is_formed_from_mean_moments_and_its_range_leaves_one_batch_out():
    def batch(exact: tuple[float, float], sketched: tuple[float, float]):
        return {"moments": exact, "scopes": {"all": {"8": {"moments": sketched}}}}

    # Mean signal 1 and noise 16 of 16 prompts: rho = 1 / (1 + 1). Sketched: mean signal 3, so 3 / 4.
    differences = rho_differences([batch((-1, 16), (1, 16)), batch((3, 16), (5, 16))], "all", "8", 16)
    assert differences["exact"] == pytest.approx(0.5)
    assert differences["difference"] == pytest.approx(0.25)
    # Without the first: 5 / 6 minus 3 / 4; without the second 1 / 2 minus 0, as the exact signal is negative.
    assert differences["min"] == pytest.approx(5 / 6 - 3 / 4)
    assert differences["max"] == pytest.approx(0.5)


@pytest.fixture
def tiny_case(tmp_path, monkeypatch):
    """One untrained policy in place of the studies', scored by a property that its answers do have."""
    torch.manual_seed(0)
    tokenizer = build_tokenizer(["What is 12 + 34?"])
    for part in (build_model(tokenizer, hidden_size=64, num_hidden_layers=2), tokenizer):
        part.save_pretrained(tmp_path / "model")
    monkeypatch.setattr(policy_pools, "POLICIES", {"tiny": policies.Policy("chain_sum", 0.3)})
    monkeypatch.setattr(policy_pools, "policy_directory", lambda name: tmp_path / "model")
    scorer = SimpleNamespace(score_answer=lambda answer, entry: float(len(answer) % 2))
    monkeypatch.setattr(policy_pools, "make_task", lambda *args, **kwargs: scorer)
    return tmp_path


def test_variants_train_what_they_say(tiny_case):
    plain, frozen, lora = (
        fidelity.prepare(policy_pools.load_policy("tiny"), variant).model
        for variant in ("as it is", "frozen head", "LoRA")
    )
    tied = plain.get_output_embeddings().weight.numel()
    trained = {
        name: sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        for name, model in (("plain", plain), ("frozen", frozen), ("LoRA", lora))
    }
    assert trained["frozen"] == trained["plain"] - tied
    assert all("lora_" in name for name, parameter in lora.named_parameters() if parameter.requires_grad)
    ids = torch.arange(4, 10).view(1, 6)
    saturated = fidelity.prepare(policy_pools.load_policy("tiny"), "saturated head").model
    torch.testing.assert_close(saturated(ids).logits, 3 * plain(ids).logits)


def test_the_fidelity_command_writes_every_case_and_reports(tiny_case, monkeypatch, capsys):
    cases = (fidelity.Case("tiny"), fidelity.Case("tiny", "frozen head"), fidelity.Case("tiny", "LoRA"))
    monkeypatch.setattr(fidelity, "CASES", cases)
    output = tiny_case / "results" / "fidelity.json"
    tiny = "--policies tiny --num_seeds 2 --num_prompts 2 --num_generations 4 --sketch_dims 64 200000"
    tokens = [*tiny.split(), "--kept", str(tiny_case / "kept"), "--output", str(output)]
    (arguments,) = fidelity.make_parser().parse_args_and_config(tokens)
    fidelity.main(arguments)
    record = json.loads(output.read_text())
    assert set(record["cases"]) == {"tiny, as it is", "tiny, frozen head", "tiny, LoRA"}
    for case in record["cases"].values():
        assert set(case["scopes"]) == set(fidelity.SCOPES)
        # More numbers than parameters: the scope `all` is exact, as the oracle says.
        exact = case["scopes"]["all"]["200000"]
        assert exact["norm_error"]["max"] < 1e-4
        assert exact["objective"]["mean"] == pytest.approx(1, abs=1e-4)
        assert exact["rank_correlation"]["mean"] == pytest.approx(1)
    assert record["cases"]["tiny, as it is"]["scopes"]["lm_head"]["200000"]["objective"]["mean"] != 1
    assert "tiny, LoRA (RLOO's objective" in capsys.readouterr().out
    markdown = fidelity_section.markdown(record)
    assert "| tiny, frozen head |" in markdown
    assert "sketches of 200000 numbers" in markdown
    assert len(fidelity_section.figure(record).axes) == 2


def test_the_fidelity_command_names_what_is_wrong():
    with pytest.raises(
        ValueError, match=r"`policies` has 'chain', of which there is no case\. Choose from: chain_sum"
    ):
        fidelity.FidelityArguments(policies=["chain"])
    with pytest.raises(ValueError, match="`num_prompts` is 1: rho needs the gradients of at least 2 prompts"):
        fidelity.FidelityArguments(num_prompts=1)
    with pytest.raises(ValueError, match="`num_generations` is 1: leave-one-out needs at least 2 completions"):
        fidelity.FidelityArguments(num_generations=1)
