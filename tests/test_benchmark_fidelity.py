"""The fidelity study at a tiny size, and its measures on scores whose answers are known."""

import json

import pytest
import torch
from torch import Tensor

from benchmarks import fidelity, policies
from benchmarks.fidelity import Case, measure_sketches, rho_differences
from benchmarks.sections import fidelity as section
from oblr_trl.baselines import gradient_weighted_baseline
from oblr_trl.gradient_snr import gradient_moments
from tests.tiny_policies import install_tiny_policy


def random_batch(num_prompts: int = 4, num_completions: int = 5) -> tuple[Tensor, Tensor]:
    """Rewards (P, G), and scores (P, G, D) of unequal norms."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(num_prompts, num_completions, 12, generator=generator, dtype=torch.float64)
    scores *= torch.rand(num_prompts, num_completions, 1, generator=generator, dtype=torch.float64) * 3
    return torch.randint(0, 2, (num_prompts, num_completions), generator=generator).double(), scores


def measured(rewards: Tensor, scores: Tensor, sketches: Tensor):
    """The figures of the one sketch of one scope, and the whole."""
    whole = measure_sketches(rewards, list(scores), {"all": {"12": sketches}}, prior_strength=4.0)
    return whole["scopes"]["all"]["12"], whole


def test_a_rotation_of_the_scores_is_a_perfect_sketch():
    rewards, scores = random_batch()
    rotation = torch.linalg.qr(torch.randn(12, 12, dtype=torch.float64)).Q
    figures, whole = measured(rewards, scores, (scores @ rotation).flatten(0, 1))
    assert figures["norm_error"] < 1e-9
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


def test_variants_train_what_they_say(tmp_path, monkeypatch):
    install_tiny_policy(monkeypatch, tmp_path)
    plain, frozen, lora, saturated = (
        fidelity.prepare(policies.load_policy("tiny"), variant).model
        for variant in ("as it is", "frozen head", "LoRA", "saturated head")
    )
    trained = [
        sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        for model in (plain, frozen)
    ]
    assert trained[0] - trained[1] == plain.get_output_embeddings().weight.numel()
    assert all("lora_" in name for name, parameter in lora.named_parameters() if parameter.requires_grad)
    ids = torch.arange(4, 10).view(1, 6)
    torch.testing.assert_close(saturated(ids).logits, 3 * plain(ids).logits)


def test_the_fidelity_command_writes_every_case_and_reports(tmp_path, monkeypatch, capsys):
    install_tiny_policy(monkeypatch, tmp_path, num_layers=2)
    monkeypatch.setattr(fidelity, "CASES", (Case("tiny"), Case("tiny", "frozen head"), Case("tiny", "LoRA")))
    options = {"num_seeds": 2, "num_prompts": 2, "num_generations": 4, "sketch_dims": [64, 200000]}
    options |= {"kept": str(tmp_path / "kept"), "output": str(tmp_path / "fidelity.json")}
    arguments = fidelity.FidelityArguments(**options)
    fidelity.main(arguments)
    record = json.loads((tmp_path / "fidelity.json").read_text())
    assert set(record["cases"]) == {"tiny, as it is", "tiny, frozen head", "tiny, LoRA"}
    for case in record["cases"].values():
        assert set(case["scopes"]) == set(fidelity.SCOPES)
        # More numbers than parameters: the scope `all` is exact, as the oracle says.
        exact = case["scopes"]["all"]["200000"]
        assert exact["norm_error"]["mean"] < 1e-4
        assert exact["objective"]["mean"] == pytest.approx(1, abs=1e-4)
    assert record["cases"]["tiny, as it is"]["scopes"]["lm_head"]["200000"]["objective"]["mean"] != 1
    printed = capsys.readouterr().out
    assert printed.strip() == section.markdown(record)
    assert "| tiny, frozen head |" in printed
    assert "sketches of 200000 numbers" in printed

    monkeypatch.setattr(fidelity, "measure_sketches", None)  # a second run of the same settings measures nothing
    fidelity.main(arguments)
    assert json.loads((tmp_path / "fidelity.json").read_text())["cases"] == record["cases"]


def test_the_fidelity_command_names_what_is_wrong():
    with pytest.raises(ValueError, match="`num_prompts` is 1: rho needs the gradients of at least 2 prompts"):
        fidelity.FidelityArguments(num_prompts=1)
    with pytest.raises(ValueError, match="`num_generations` is 1: leave-one-out needs at least 2 completions"):
        fidelity.FidelityArguments(num_generations=1)
