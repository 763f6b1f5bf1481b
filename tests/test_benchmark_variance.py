"""The variance study: its estimate against explicit gradients, its pools against the oracle, and its command."""

import json
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from benchmarks import policies, pretrained_variance, record, variance, weights_choice
from benchmarks.completion_pool import full_scores, kept, sample_with_rewards
from benchmarks.gradient_variance import (
    RLOO,
    Method,
    Pool,
    group_gradient_grams,
    measure_methods,
    right_over_wrong,
    stream_advantages,
    within_prompt_variances,
)
from benchmarks.sections import variance as section
from oblr_trl.scores import reference_scores
from tests.tiny_policies import install_tiny_policy, save_tiny_policy


def random_pool(num_prompts: int = 4, num_completions: int = 8, num_parameters: int = 30) -> tuple[Pool, Tensor]:
    """A pool in float64, and the scores (P, M, D) behind it."""
    generator = torch.Generator().manual_seed(0)
    shape = (num_prompts, num_completions)
    scores = torch.randn(*shape, num_parameters, generator=generator, dtype=torch.float64)
    scores *= torch.rand(*shape, 1, generator=generator, dtype=torch.float64) * 3
    rewards = torch.randint(0, 2, shape, generator=generator).double()
    lengths = torch.randint(1, 9, shape, generator=generator).double()
    return Pool(rewards, lengths, scores @ scores.mT, {"exact": scores.square().sum(dim=2)}), scores


def measure(pool: Pool, *methods: Method, num_prompts: int, num_partitions: int = 1):
    """Measure at G = 4, with a fixed seed."""
    options = {"num_generations": 4, "num_prompts": num_prompts, "num_partitions": num_partitions}
    return measure_methods(pool, methods, **options, generator=torch.Generator().manual_seed(1))


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


@pytest.mark.parametrize(
    ("norms_follow_rewards", "head", "expected"),
    [(False, "other", "equal"), (True, "other", "all"), (True, "same", "lm_head")],
)
def test_the_choice_of_weights_finds_out_where_they_matter(norms_follow_rewards, head, expected):
    generator = torch.Generator().manual_seed(0)
    rewards = torch.randint(0, 2, (16, 16), generator=generator).double()
    scores = torch.nn.functional.normalize(torch.randn(16, 16, 30, generator=generator, dtype=torch.float64), dim=2)
    if norms_follow_rewards:
        scores *= 0.2 + rewards.unsqueeze(2)
    weights = scores.square().sum(dim=2)
    other = 0.1 + torch.rand(16, 16, generator=generator, dtype=torch.float64)
    sources = {"exact": weights, "all": weights, "lm_head": 3 * weights if head == "same" else other}
    pool = Pool(rewards, torch.ones_like(rewards), scores @ scores.mT, sources)
    chosen = weights_choice.choose(pool, 4, 16, num_batches=20, seed=0)
    assert chosen["choice"] == expected
    assert chosen["share_of_batches"][expected] == 1
    # What is predicted is what exact gradients have.
    for name in ("equal", "lm_head"):
        assert chosen["predicted"][name] == pytest.approx(chosen["variance"][name], rel=0.15)
    assert (chosen["variance"]["equal"] > 1.5) == norms_follow_rewards


def test_the_variance_is_unbiased_over_fresh_pools():
    # One parameter, scores s of +-1 and r = s. RLOO's g = mean of (r_i - mean of others) s_i is the sample variance of
    # G signs: its variance is (mu_4 - sigma^4 (G - 3) / (G - 1)) / G = (1 - 1 / 3) / 4 = 1 / 6 at G = 4. Without
    # baseline g = mean of s_i^2 = 1 always. The group mean's is 3 / 4 of RLOO's: 9 / 16 of its variance.
    signs = torch.randint(0, 2, (20000, 8), generator=torch.Generator().manual_seed(0)).double() * 2 - 1
    ones = torch.ones_like(signs)
    pool = Pool(signs, ones, signs.unsqueeze(2) * signs.unsqueeze(1), {"exact": ones})
    none, grpo = Method("none", "none"), Method("mean", "group_mean")
    measured = measure(pool, RLOO, none, grpo, num_prompts=20000)
    # The sample variance of two draws has a standard deviation below 0.25: 0.006 is more than three standard errors.
    assert measured[RLOO.label].mean().item() == pytest.approx(1 / 6, abs=0.006)
    assert measured["none"].abs().max() < 1e-12
    torch.testing.assert_close(measured["mean"], 9 / 16 * measured[RLOO.label], rtol=1e-9, atol=1e-12)


def test_figures_belong_to_the_prompt_that_they_were_measured_on():
    pool, _ = random_pool()
    pool.rewards[2] = 1.0  # equal rewards: RLOO's gradients of this prompt, and of no other, are zero
    variances = measure(pool, RLOO, num_prompts=4, num_partitions=4)[RLOO.label]
    assert variances[2] < 1e-12
    assert (variances[[0, 1, 3]] > 0.01).all()


def test_the_weights_of_right_and_wrong_completions_are_compared():
    exact = torch.tensor([[1.0, 4.0, 16.0], [10.0, 10.0, 40.0]])
    rewards = torch.tensor([[1.0, 0.0, 0.0], [1.0, 0.5, 0.0]])
    pool = Pool(rewards, torch.ones(2, 3), torch.zeros(2, 3, 3), {"exact": exact})
    assert right_over_wrong(pool) == pytest.approx((11 / 2) / (70 / 4))


def test_the_automatic_prior_of_a_batch_comes_from_earlier_batches():
    pool, _ = random_pool()
    fixed = stream_advantages(pool, Method("16", "gradient_weighted", "exact", 16.0), num_generations=4, num_prompts=2)
    automatic = Method("automatic", "gradient_weighted", "exact", None)
    before = stream_advantages(pool, automatic, num_generations=4, num_prompts=2)
    torch.testing.assert_close(before[:2, 0], fixed[:2, 0], rtol=0, atol=0)  # the first batch has no past: 16
    assert not torch.equal(before[:, 1], fixed[:, 1])
    pool.rewards[2:, 4:] = 1 - pool.rewards[2:, 4:]  # the last batch: second groups of the last two prompts
    after = stream_advantages(pool, automatic, num_generations=4, num_prompts=2)
    torch.testing.assert_close(after[:, 0], before[:, 0], rtol=0, atol=0)
    torch.testing.assert_close(after[:2, 1], before[:2, 1], rtol=0, atol=0)
    assert not torch.equal(after[2:, 1], before[2:, 1])


def test_scores_in_one_pass_have_the_inner_products_of_the_oracle(tmp_path):
    save_tiny_policy(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = torch.randint(4, model.config.vocab_size, (4, 6), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(4, 6, dtype=torch.long)
    mask[3, 5] = 0  # padding after the last completion
    inputs = (ids, mask, mask[:, 3:])
    scores, expected = full_scores(model, inputs), reference_scores(model, *inputs)
    torch.testing.assert_close(scores @ scores.T, expected @ expected.T, rtol=1e-4, atol=1e-4)


def test_inner_products_of_gradients_one_by_one_are_those_of_the_oracle(tmp_path, monkeypatch):
    monkeypatch.setattr(pretrained_variance, "_CHUNK", 1000)  # several pieces of a parameter
    save_tiny_policy(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    inputs = (torch.arange(20).view(4, 5) % 7, torch.ones(4, 5, dtype=torch.long), torch.ones(4, 2, dtype=torch.long))
    inputs[2][0, 1] = inputs[1][0, -1] = 0  # one that ends before the others
    expected = reference_scores(model, *inputs)
    assert model.config.tie_word_embeddings
    gram = pretrained_variance.gradient_gram(model, inputs)
    torch.testing.assert_close(gram, (expected @ expected.T).double(), rtol=1e-4, atol=1e-4)


def test_the_agreement_of_scores_is_a_correlation_of_their_logarithms():
    pool, _ = random_pool()
    pool.weights |= {"all": 2 * pool.weights["exact"] ** 3, "lm_head": 1 / pool.weights["exact"]}
    assert pretrained_variance.agreement(pool) == pytest.approx({"all": 1.0, "lm_head": -1.0})


def test_the_study_of_the_pretrained_model_writes_ratios_and_says_what_makes_the_model(tmp_path, monkeypatch, capsys):
    def draw(args, task, seed):
        pool, _ = random_pool(num_completions=16)
        return replace(pool, weights=dict.fromkeys(("exact", "all", "last_k", "lm_head"), pool.weights["exact"]))

    options = {"num_seeds": 2, "num_prompts": 4, "kept": str(tmp_path / "kept"), "output": str(tmp_path / "out.json")}
    arguments = pretrained_variance.PretrainedVarianceArguments(**options)
    monkeypatch.setattr(pretrained_variance, "DIRECTORY", tmp_path / "none")
    with pytest.raises(SystemExit, match="Run `make pretrained` first"):
        pretrained_variance.main(arguments)
    save_tiny_policy(tmp_path / "policy")
    monkeypatch.setattr(pretrained_variance, "DIRECTORY", tmp_path / "policy")
    monkeypatch.setattr(pretrained_variance, "draw_pool", draw)
    pretrained_variance.main(arguments)
    written = json.loads((tmp_path / "out.json").read_text())
    assert written["policies"]["lists"]["methods"]["group mean (GRPO)"]["4"]["mean"] == pytest.approx(9 / 16)
    assert f"| **{written['default']}** |" in capsys.readouterr().out


def test_the_variance_command_writes_ratios_resumes_and_reports(tmp_path, monkeypatch, capsys):
    install_tiny_policy(monkeypatch, tmp_path)
    options = {"policies": ["tiny"], "num_seeds": 2, "num_prompts": 4, "num_prompts_large": 4, "num_completions": 16}
    options |= {"prompts_per_batch": 2, "groups_per_prompt": 4, "num_generations": [2, 4, 8]}
    options |= {"kept": str(tmp_path / "kept"), "output": str(tmp_path / "variance.json")}
    arguments = variance.VarianceArguments(**options)
    variance.main(arguments)
    written = json.loads((tmp_path / "variance.json").read_text())
    methods = written["policies"]["tiny"]["methods"]
    assert set(methods) == {method.label for method in variance.METHODS}
    assert methods[written["reference"]]["4"] == {"mean": 1.0, "std": 0.0}
    assert methods["group mean (GRPO)"]["4"]["mean"] == pytest.approx(9 / 16)
    printed = capsys.readouterr().out
    assert f"| **{written['default']}** | **{methods[written['default']]['2']['mean']:.2f} / " in printed
    assert printed.strip() == section.markdown(written)
    assert section.figure(written).axes[0].get_xlabel() == "completions per prompt G"

    monkeypatch.setattr(variance, "build_pool", None)  # a second run of the same settings draws nothing
    variance.main(arguments)
    assert json.loads((tmp_path / "variance.json").read_text())["policies"] == written["policies"]


def test_work_is_kept_for_the_same_settings_only(tmp_path):
    made = iter([1, 2])
    path = tmp_path / "kept" / "value.pt"
    assert kept(path, {"seed": 0}, lambda: next(made)) == 1
    assert kept(path, {"seed": 0}, lambda: next(made)) == 1
    assert kept(path, {"seed": 1}, lambda: next(made)) == 2


@pytest.mark.parametrize(("reward", "half"), [("graded", 0.5), ("binary", 0.0)])
def test_a_binary_reward_is_the_full_score_or_nothing(tmp_path, monkeypatch, reward, half):
    install_tiny_policy(monkeypatch, tmp_path)
    monkeypatch.setitem(policies.POLICIES, "tiny", policies.Policy("chain_sum", 0.3, reward=reward))
    monkeypatch.setattr(
        policies,
        "task_reward",
        lambda *args: lambda completions, **kw: [0.5 if len(t) % 2 else 1.0 for t in completions],
    )
    completions, rewards = sample_with_rewards(policies.load_policy("tiny"), num_prompts=2, num_completions=16, seed=0)
    assert rewards.flatten().tolist() == [half if len(text) % 2 else 1.0 for text in completions.texts]
    assert set(rewards.flatten().tolist()) == {half, 1.0}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"policies": ["chain"]}, r"`policies` has 'chain', which does not exist\. Choose from: chain_sum"),
        ({"num_prompts": 10, "prompts_per_batch": 4}, "`num_prompts` is 10, which is not a multiple of .* 4"),
        ({"num_completions": 8, "num_generations": [4, 8]}, "`num_completions` is 8, .* not two or more groups of 8"),
    ],
)
def test_the_variance_command_names_what_is_missing_or_does_not_divide(options, message):
    with pytest.raises(ValueError, match=message):
        variance.VarianceArguments(**options)


def test_a_record_is_plain_json_with_innermost_lists_on_one_line():
    class Row(NamedTuple):
        values: list[float]

    content = {"a": [1, 2.5, None], "b": {"c": {"d": "x"}, "e": [Row([1.0]), [[]]]}, "f": {}}
    text = record.to_json(content)
    assert json.loads(text) == json.loads(json.dumps(content))
    assert '  "a": [1, 2.5, null],' in text.splitlines()
