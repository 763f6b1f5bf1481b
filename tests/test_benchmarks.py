"""The benchmark commands at a tiny size, and the variance estimate against explicit gradients. No timing is asserted."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import policies, policy_pools, variance
from benchmarks.completion_pool import Completions, logit_energies, oracle_difference
from benchmarks.gradient_variance import (
    RLOO,
    Method,
    Pool,
    describe_weights,
    equivalent_group_size,
    group_gradient_grams,
    measure_methods,
    squared_mean_norms,
    stream_advantages,
    within_prompt_variances,
)
from benchmarks.sections import variance as variance_section
from examples.tiny_qwen3.model import build_model, build_tokenizer


def random_pool(num_prompts: int = 4, num_completions: int = 8, num_parameters: int = 30) -> tuple[Pool, Tensor]:
    """A pool in float64, and the scores (P, M, D) behind it."""
    generator = torch.Generator().manual_seed(0)
    shape = (num_prompts, num_completions)
    scores = torch.randn(*shape, num_parameters, generator=generator, dtype=torch.float64)
    scores *= torch.rand(*shape, 1, generator=generator, dtype=torch.float64) * 3
    rewards = torch.randint(0, 2, shape, generator=generator).double()
    norms = scores.square().sum(dim=2)
    pool = Pool(
        rewards, torch.randint(1, 9, shape, generator=generator).double(), scores @ scores.mT, {"exact": norms}
    )
    return pool, scores


def run_command(module: Any, *argv: str) -> dict[str, Any]:
    """Run a benchmark as its command line does, and read what it wrote."""
    (arguments,) = module.make_parser().parse_args_and_config(list(argv))
    module.main(arguments)
    return json.loads(Path(arguments.output).read_text())


def test_the_variance_from_gram_matrices_is_that_of_explicit_gradients():
    pool, scores = random_pool()
    method = Method("paper", "gradient_weighted", "exact", 4.0)
    advantages = stream_advantages(pool, method, num_generations=4, num_prompts=2)  # (P, K, G)
    gradients = (advantages.unsqueeze(3) * scores.unflatten(1, (2, 4))).mean(dim=2)  # (P, K, D)
    grams = group_gradient_grams(pool.grams, advantages)
    torch.testing.assert_close(grams, gradients @ gradients.mT, rtol=1e-9, atol=1e-9)
    expected = gradients.var(dim=1, correction=1).sum(dim=1)
    torch.testing.assert_close(within_prompt_variances(grams), expected, rtol=1e-9, atol=1e-9)


def test_a_rearranged_pool_holds_the_inner_products_of_the_rearranged_scores():
    pool, scores = random_pool()
    prompts = torch.tensor([2, 0, 3, 1])
    order = torch.stack([torch.randperm(8) for _ in range(4)])
    taken = pool.take(prompts, order)
    moved = torch.stack([scores[prompt, places] for prompt, places in zip(prompts, order, strict=True)])
    torch.testing.assert_close(taken.grams, moved @ moved.mT, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(taken.weights["exact"], moved.square().sum(dim=2), rtol=1e-9, atol=1e-9)


def sign_pool(num_prompts: int) -> Pool:
    """One parameter, scores +-1 and r = s, 8 completions of every prompt."""
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, (num_prompts, 8), generator=generator).double() * 2 - 1
    ones = torch.ones_like(signs)
    return Pool(signs, ones, signs.unsqueeze(2) * signs.unsqueeze(1), {"exact": ones})


def measure(pool: Pool, *methods: Method, num_prompts: int, num_partitions: int = 1):
    """Measure at G = 4, with a fixed seed."""
    generator = torch.Generator().manual_seed(1)
    return measure_methods(
        pool,
        methods,
        num_generations=4,
        num_prompts=num_prompts,
        num_partitions=num_partitions,
        generator=generator,
    )


def test_variance_signal_and_bias_are_unbiased_over_fresh_pools():
    # RLOO's g = mean of (r_i - mean of others) s_i is the sample variance of G signs: its mean is 1 and its variance
    # (mu_4 - sigma^4 (G - 3) / (G - 1)) / G = (1 - 1 / 3) / 4 = 1 / 6 at G = 4. Without baseline g = mean of s_i^2 = 1 always.
    # The group mean's is 3 / 4 of RLOO's: variance 9 / 16 of it, bias 1 / 4 of the signal 1, so 1 / 16 squared.
    none, grpo = Method("none", "none"), Method("mean", "group_mean")
    measured = measure(sign_pool(20000), RLOO, none, grpo, num_prompts=20000)
    rloo = measured[RLOO.label]
    # The sample variance of two draws has a standard deviation below 0.25: 0.006 is more than three standard errors.
    assert rloo.variance.mean().item() == pytest.approx(1 / 6, abs=0.006)
    assert rloo.squared_signal.mean().item() == pytest.approx(1, abs=0.012)  # sd below sqrt(2 / 6 + 1 / 36) = 0.6
    assert rloo.squared_bias.abs().max() == 0
    assert measured["none"].variance.abs().max() < 1e-12
    assert measured["none"].squared_bias.mean().item() == pytest.approx(0, abs=0.004)  # sd 1 / 6
    assert measured["mean"].variance.mean().item() == pytest.approx(9 / 16 * rloo.variance.mean().item(), rel=1e-9)
    assert measured["mean"].squared_bias.mean().item() == pytest.approx(
        rloo.squared_signal.mean().item() / 16, rel=1e-9
    )


def test_the_squared_mean_norm_is_the_mean_product_of_different_groups():
    gradients = torch.tensor([[1.0, 0.0], [2.0, 1.0], [0.0, 3.0]])  # products 2, 0, 3: mean 5 / 3
    assert squared_mean_norms((gradients @ gradients.T).unsqueeze(0)).item() == pytest.approx(5 / 3)


def test_the_rescaled_group_mean_has_the_variance_of_rloo_and_no_bias():
    pool, _ = random_pool()
    method = Method("mean", "rescaled_group_mean")
    measured = measure(pool, RLOO, method, num_prompts=2, num_partitions=3)
    torch.testing.assert_close(measured["mean"].variance, measured[RLOO.label].variance, rtol=1e-9, atol=1e-12)
    assert measured["mean"].squared_bias.abs().max() < 1e-12


def test_figures_belong_to_the_prompt_that_they_were_measured_on():
    pool, _ = random_pool()
    pool.rewards[2] = 1.0  # equal rewards: RLOO's gradients of this prompt, and of no other, are zero
    variances = measure(pool, RLOO, num_prompts=4, num_partitions=4)[RLOO.label].variance
    assert variances[2] < 1e-12
    assert (variances[[0, 1, 3]] > 0.01).all()


def test_the_equivalent_group_size_follows_a_power_law_and_its_ends():
    sizes, variances = [2, 4, 8], [8.0, 2.0, 1.0]  # slopes -2 and -1
    assert equivalent_group_size(4.0, sizes, variances) == pytest.approx(2 * 2**0.5)
    assert equivalent_group_size(2.0, sizes, variances) == pytest.approx(4)
    assert equivalent_group_size(0.25, sizes, variances) == pytest.approx(32)  # the last slope goes on
    assert equivalent_group_size(32.0, sizes, variances) == pytest.approx(1)  # and the first
    with pytest.raises(ValueError, match="two sizes and positive variances are needed"):
        equivalent_group_size(0.0, sizes, variances)


def test_weights_are_described_by_their_ratio_and_their_slope_within_prompts():
    exact = torch.tensor([[1.0, 4.0, 16.0], [10.0, 10.0, 40.0]])
    rewards = torch.tensor([[1.0, 0.0, 0.0], [1.0, 0.5, 0.0]])
    pool = Pool(rewards, torch.ones(2, 3), torch.zeros(2, 3, 3), {"exact": exact, "root": 3 * exact.sqrt()})
    described = describe_weights(pool)
    assert described["exact"]["right_over_wrong"] == pytest.approx((11 / 2) / (70 / 4))
    assert described["exact"]["log_slope"] == pytest.approx(1)
    assert described["root"]["log_slope"] == pytest.approx(0.5)


def test_the_automatic_prior_of_a_batch_comes_from_earlier_batches():
    pool, _ = random_pool()
    fixed = stream_advantages(pool, Method("16", "gradient_weighted", "exact", 16.0), num_generations=4, num_prompts=2)
    automatic = Method("automatic", "gradient_weighted", "exact", None)
    before = stream_advantages(pool, automatic, num_generations=4, num_prompts=2)
    torch.testing.assert_close(before[:2, 0], fixed[:2, 0], rtol=0, atol=0)  # the first batch has no past: 16
    pool.rewards[2:, 4:] = 1 - pool.rewards[2:, 4:]  # the last batch: second groups of the last two prompts
    after = stream_advantages(pool, automatic, num_generations=4, num_prompts=2)
    torch.testing.assert_close(after[:, 0], before[:, 0], rtol=0, atol=0)
    torch.testing.assert_close(after[:2, 1], before[:2, 1], rtol=0, atol=0)
    assert not torch.equal(after[2:, 1], before[2:, 1])


def small_policy(directory: Path) -> None:
    """An untrained model and its tokenizer."""
    torch.manual_seed(0)
    tokenizer = build_tokenizer(["What is 12 + 34?"])
    for part in (build_model(tokenizer, hidden_size=64, num_hidden_layers=2), tokenizer):
        part.save_pretrained(directory)


def completions_of_length_two(model: Any) -> Completions:
    """Four random sequences of six tokens, the last three of them completion, one of which is padding in the last row."""
    ids = torch.randint(4, model.config.vocab_size, (4, 6), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(4, 3, dtype=torch.long)
    mask[3, 2] = 0
    return Completions(ids, torch.cat([torch.ones(4, 3, dtype=torch.long), mask], dim=1), mask, [""] * 4)


def test_scores_in_one_pass_have_the_inner_products_of_the_oracle(tmp_path):
    small_policy(tmp_path)
    model = policy_pools.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert oracle_difference(model, completions_of_length_two(model), 4) < 1e-5


def test_the_logit_energy_is_the_squared_gradient_of_the_logits(tmp_path):
    small_policy(tmp_path)
    model = policy_pools.AutoModelForCausalLM.from_pretrained(tmp_path)
    completions = completions_of_length_two(model)
    logits = model(input_ids=completions.input_ids, attention_mask=completions.attention_mask).logits[:, 2:-1].detach()
    logits.requires_grad_(True)
    per_token_logps = logits.log_softmax(-1).gather(-1, completions.input_ids[:, 3:].unsqueeze(-1)).squeeze(-1)
    (per_token_logps * completions.completion_mask).sum().backward()
    torch.testing.assert_close(logit_energies(model, completions), logits.grad.square().sum(dim=(1, 2)))


@pytest.fixture
def one_policy(tmp_path, monkeypatch):
    """A single untrained policy in place of the studies', scored by a property that its answers do have."""
    small_policy(tmp_path / "model")
    monkeypatch.setattr(policy_pools, "POLICIES", {"tiny": policies.Policy("chain_sum", 0.3)})
    monkeypatch.setattr(variance, "POLICIES", policy_pools.POLICIES)
    monkeypatch.setattr(policy_pools, "policy_directory", lambda name: tmp_path / "model")
    scorer = SimpleNamespace(score_answer=lambda answer, entry: float(len(answer) % 2))
    monkeypatch.setattr(policy_pools, "make_task", lambda *args, **kwargs: scorer)
    return tmp_path


def test_the_variance_command_writes_ratios_resumes_and_reports(one_policy, monkeypatch, capsys):
    arguments = {"policies": "tiny", "num_seeds": 2, "num_prompts": 4, "num_prompts_large": 4, "num_completions": 16}
    arguments |= {"prompts_per_batch": 2, "groups_per_prompt": 4, "kept": one_policy / "kept"}
    arguments |= {"output": one_policy / "results" / "variance.json"}
    tokens = [str(part) for pair in arguments.items() for part in (f"--{pair[0]}", pair[1])]
    tokens += ["--num_generations", "2", "4", "8"]
    record = run_command(variance, *tokens)
    assert "target default_at_4" in capsys.readouterr().out
    policy = record["policies"]["tiny"]
    assert policy["difference_from_oracle"] < 1e-5
    assert set(policy["methods"]) == set(record["over_policies"]) == {method.label for method in variance.METHODS}
    reference = policy["methods"][record["reference"]]["4"]
    assert reference["relative_variance"] == {"mean": 1.0, "std": 0.0, "min": 1.0, "max": 1.0}
    assert reference["equivalent_group_size"]["mean"] == pytest.approx(4)
    assert policy["methods"]["group mean (GRPO)"]["4"]["relative_variance"]["mean"] == pytest.approx(9 / 16)
    markdown = variance_section.markdown(record)
    assert f"**{record['over_policies'][record['default']]['8']['median']:.2f} / " in markdown
    assert variance_section.figure(record).axes[0].get_xlabel() == "completions per prompt G"

    monkeypatch.setattr(variance, "build_pool", None)  # a second run of the same settings draws nothing
    assert run_command(variance, *tokens)["policies"] == record["policies"]


def test_work_is_kept_for_the_same_settings_only(tmp_path):
    made = iter([1, 2])
    path = tmp_path / "kept" / "value.pt"
    assert policy_pools.kept(path, {"seed": 0}, lambda: next(made)) == 1
    assert policy_pools.kept(path, {"seed": 0}, lambda: next(made)) == 1
    assert policy_pools.kept(path, {"seed": 1}, lambda: next(made)) == 2


def test_a_binary_reward_is_the_full_score_or_nothing(one_policy, monkeypatch):
    scorer = SimpleNamespace(score_answer=lambda answer, entry: 0.5 if len(answer) % 2 else 1.0)
    monkeypatch.setattr(policy_pools, "make_task", lambda *args, **kwargs: scorer)
    found = {}
    for reward in ("binary", "graded"):
        monkeypatch.setattr(policy_pools, "POLICIES", {"tiny": policies.Policy("chain_sum", 0.3, reward=reward)})
        policy = policy_pools.load_policy("tiny")
        found[reward] = policy_pools.sample_with_rewards(policy, num_prompts=2, num_completions=16, seed=0)[1]
    assert set(found["graded"].unique().tolist()) == {0.5, 1.0}
    assert torch.equal(found["binary"], (found["graded"] == 1).double())


def test_the_variance_command_names_what_is_missing_or_does_not_divide():
    with pytest.raises(ValueError, match=r"`policies` has 'chain', which there is not\. Choose from: chain_sum"):
        variance.VarianceArguments(policies=["chain"])
    with pytest.raises(ValueError, match="`num_prompts` is 10, which is not a multiple of `prompts_per_batch` 4"):
        variance.VarianceArguments(num_prompts=10, prompts_per_batch=4)
    with pytest.raises(ValueError, match="`num_completions` is 8, which is not two or more groups of 8"):
        variance.VarianceArguments(num_completions=8, num_generations=[4, 8])
    with pytest.raises(ValueError, match="`num_generations` is \\[8, 4\\]: give at least two group sizes, ascending"):
        variance.VarianceArguments(num_generations=[8, 4])
