"""Cheaper weights of the baseline and a sample of the prompts for the learning rate: what is chosen, and that nothing else changes."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from oblr_trl import OBLRPOConfig, OBLRPOTrainer
from oblr_trl.baselines import BaselineEstimator, GroupedBatch, WeightsChoice, gradient_weighted_baseline
from oblr_trl.baselines.weights_choice import ALL, EQUAL, LM_HEAD, TOLERANCE
from oblr_trl.gradient_snr import gradient_moments, per_prompt_gradients, rho, sampling_variance
from oblr_trl.scores import ScorePass, reference_scores
from oblr_trl.scores.prompt_sample import sample_prompts
from tests.recording import Recording, oracle_scores
from tests.tiny_models import ARCHITECTURES, algorithm_state, construct, logged, random_batch, tiny_model, train

SIXTEEN = {"num_generations": 2, "per_device_train_batch_size": 32, "score_min_prompts": 5}
TRUST = {"lr_adaptation": "trust_region"}
# Two optimizer steps on a generation batch, for which TRL wants old log-probabilities.
OFF_POLICY = SIXTEEN | {"per_device_train_batch_size": 16, "steps_per_generation": 2, "max_steps": 4}


class Kept(Recording):
    """Keeps what scoring knew of every batch."""

    def __init__(self, *args, **kwargs):
        self.kept = []
        super().__init__(*args, **kwargs)

    def _grouped_batch(self, *args):
        self.kept.append(super()._grouped_batch(*args))
        return self.kept[-1]


@pytest.fixture
def always(monkeypatch):
    """Lets weights be chosen whatever they leave."""

    def choose(weights):
        fixed = property(lambda choice: weights, lambda choice, value: None)
        monkeypatch.setattr(WeightsChoice, "value", fixed, raising=False)

    return choose


@given(
    num_prompts=st.integers(1, 40),
    num_generations=st.integers(1, 6),
    at_least=st.integers(2, 20),
    num_processes=st.sampled_from([1, 2, 3, 4]),
)
def test_the_sample_is_the_same_on_any_number_of_processes(num_prompts, num_generations, at_least, num_processes):
    num_rows = num_prompts * num_generations
    if num_rows % num_processes:
        return
    samples = [
        sample_prompts(
            num_prompts, num_generations, at_least=at_least, process_index=index, num_processes=num_processes
        )
        for index in range(num_processes)
    ]
    size = max(math.ceil(num_prompts / 4), min(at_least, num_prompts))
    if size == num_prompts:
        assert samples == [None] * num_processes
        return
    one = sample_prompts(num_prompts, num_generations, at_least=at_least, process_index=0, num_processes=1)
    expected = [n * num_generations + i for n in one.groups.tolist() for i in range(num_generations)]
    assert len(set(one.groups.tolist())) == size
    local = num_rows // num_processes
    assert len({len(sample.rows) for sample in samples}) == 1  # or processes would wait for one another
    rows = torch.cat([index * local + sample.rows for index, sample in enumerate(samples)])
    for index, sample in enumerate(samples):
        assert sample.groups.tolist() == one.groups.tolist()
        assert rows[sample.gathered].tolist() == expected
        assert sample.rows.tolist() == sorted(set(sample.rows.tolist()))
        assert (sample.rows < local).all(), index
    if num_prompts % num_processes == 0 and size % num_processes == 0:  # evenly dealt: nothing is scored in vain
        assert rows.numel() == len(expected)


@pytest.mark.parametrize(
    ("variances", "expected"),
    [
        ({EQUAL: 1.09, LM_HEAD: 1.0, ALL: 1.0}, EQUAL),
        ({EQUAL: 1.2, LM_HEAD: 1.05, ALL: 1.0}, LM_HEAD),
        ({EQUAL: 1.2, LM_HEAD: 1.15, ALL: 1.0}, ALL),
        ({EQUAL: 1.05, LM_HEAD: 0.9, ALL: 1.0}, LM_HEAD),  # of the best, not of `all`
        ({EQUAL: 1.2, ALL: 1.0}, ALL),
        ({EQUAL: 0.5, ALL: 1.0}, EQUAL),
    ],
)
def test_the_cheapest_weights_that_leave_about_as_little_are_chosen_after_the_warm_up(variances, expected):
    choice = WeightsChoice(warm_up=3)
    for _ in range(2):
        choice.update(variances)
        assert choice.value == ALL
    choice.update(variances)
    assert choice.value == expected
    assert choice.gains == pytest.approx({name: 1 / value for name, value in variances.items() if name != ALL})
    assert TOLERANCE == 0.1


def test_what_is_in_use_is_kept_until_it_leaves_clearly_more():
    choice = WeightsChoice(warm_up=1, decay=0.0)
    values = []
    for ratio in (1.15, 1.05, 1.15, 1.19, 1.21, 1.15, 1.05):
        choice.update({EQUAL: ratio, ALL: 1.0})
        values.append(choice.value)
    assert values == [ALL, EQUAL, EQUAL, EQUAL, ALL, ALL, EQUAL]


def test_averages_forget_batches_without_information_do_not_count_and_the_state_is_restored():
    choice, twin = WeightsChoice(warm_up=1), WeightsChoice(warm_up=1)
    choice.update({EQUAL: 2.0, ALL: 1.0})
    before = choice.state_dict()
    for nothing in ({}, {EQUAL: 0.0, ALL: 0.0}, {EQUAL: math.nan, ALL: 1.0}):
        choice.update(nothing)
        assert choice.state_dict() == before
    twin.load_state_dict(before)
    for batch in [{EQUAL: 1.0, ALL: 1.0}] * 30:
        choice.update(batch)
        twin.update(batch)
    assert twin.state_dict() == choice.state_dict()
    assert choice.value == EQUAL


def test_the_choice_goes_by_the_variance_that_the_weights_leave_at_the_strength_in_use():
    generator = torch.Generator().manual_seed(0)
    rewards, weights, head = (torch.rand(8, 4, generator=generator, dtype=torch.float64) for _ in range(3))
    rewards[2, 1] = math.nan
    estimator = BaselineEstimator("gradient_weighted", leave_one_out=True, prior_strength=4.0, chooses_weights=True)
    batch = GroupedBatch(rewards, torch.ones_like(rewards), weights, head_weights=head)
    assert estimator.compare_weights(batch) is None  # nothing is known yet
    gains = estimator.weights_choice.gains

    def left(baseline_weights):
        baselines = gradient_weighted_baseline(rewards, baseline_weights, prior_strength=4.0)
        return (weights * (rewards - baselines).square()).nanmean()

    assert gains[EQUAL] == pytest.approx((left(weights) / left(torch.ones_like(weights))).item())
    assert gains[LM_HEAD] == pytest.approx((left(weights) / left(head)).item())


def test_a_baseline_without_weights_needs_none_and_another_scope_than_auto_keeps_them():
    def weights(baseline, chooses):
        estimator = BaselineEstimator(baseline, leave_one_out=True, prior_strength=0.0, chooses_weights=chooses)
        return estimator.weights

    assert weights("leave_one_out", True) == weights("group_mean", True) == EQUAL
    assert weights("gradient_weighted", True) == ALL  # before anything is known
    assert weights("leave_one_out", False) == weights("gradient_weighted", False) == ALL


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_pass_over_all_parameters_knows_the_norms_of_the_head_alone(architecture):
    model = tiny_model(architecture)
    input_ids, attention_mask, completion_mask = random_batch()
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
    output = ScorePass(model)(inputs, input_ids[:, -9:], completion_mask.float())
    if architecture == "qwen3_lora":  # whose head is frozen
        assert output.head_squared_norms is None
        return
    truth = reference_scores(model, input_ids, attention_mask, completion_mask, scope="lm_head").square().sum(dim=1)
    torch.testing.assert_close(output.head_squared_norms, truth.to(torch.float32), rtol=1e-4, atol=1e-6)


def test_a_pass_over_the_head_alone_has_no_cheaper_weights():
    model = tiny_model()
    input_ids, attention_mask, completion_mask = random_batch()
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
    assert (
        ScorePass(model, scope="lm_head")(inputs, input_ids[:, -9:], completion_mask.float()).head_squared_norms
        is None
    )


@pytest.mark.parametrize("options", [SIXTEEN, OFF_POLICY], ids=["on-policy", "two steps per batch"])
@pytest.mark.parametrize("weights", [EQUAL, LM_HEAD])
def test_a_sample_has_the_scores_of_the_whole_batch_and_the_cheaper_weights_are_those_of_the_oracle(
    tmp_path, always, weights, options
):
    options = options | TRUST
    whole = train(Kept, OBLRPOConfig, tmp_path, score_scope="all", **options)
    always(weights)
    sampled = train(Kept, OBLRPOConfig, tmp_path, **options)
    groups = torch.arange(5) * 16 // 5
    (batch, scored, prompts), (expected, _, _) = sampled.kept[0], whole.kept[0]
    assert prompts.tolist() == groups.tolist()
    assert torch.equal(batch.rewards, expected.rewards)
    for name in ("rewards", "lengths", "weights", "sketches", "token_weights", "log_probs", "head_weights"):
        torch.testing.assert_close(getattr(scored, name), getattr(expected, name)[groups], rtol=1e-4, atol=1e-6)
    truth = oracle_scores(sampled.batches[0], scope="lm_head").square().sum(dim=2)
    truth = torch.ones_like(truth) if weights == EQUAL else truth
    torch.testing.assert_close(batch.weights, truth.to(batch.weights.dtype), rtol=1e-4, atol=1e-6)
    baselines = gradient_weighted_baseline(batch.rewards, truth, prior_strength=16.0)
    advantages = sampled.batches[0]["advantages"].view_as(baselines)
    torch.testing.assert_close(advantages, batch.rewards - baselines, rtol=1e-4, atol=1e-6)

    # Signal and noise of the sample; N counts all.
    steps = sampled.args.steps_per_generation / sampled.args.gradient_accumulation_steps
    signal, noise = gradient_moments(per_prompt_gradients(scored.sketches, advantages[groups]))
    noise += 16 * (5 / 16) * sampling_variance(scored.sketches, advantages[groups], steps)
    assert logged(sampled, "gradient_snr/num_prompts")[0] == 16
    assert logged(sampled, "gradient_snr/noise")[0] == pytest.approx(noise, rel=1e-4)
    assert logged(sampled, "gradient_snr/rho")[0] == pytest.approx(rho(signal, noise, 16), rel=1e-3, abs=1e-4)
    assert logged(sampled, "score/fraction")[0] == 5 / 16
    assert logged(whole, "score/fraction")[0] == 1
    if "steps_per_generation" in options:  # the old log-probabilities are the same whoever takes them
        mask = whole.batches[0]["completion_mask"].bool()
        old = [trainer.batches[0]["old_per_token_logps"][mask] for trainer in (whole, sampled)]
        torch.testing.assert_close(*old, rtol=0, atol=1e-5)
    kl = [value for value in logged(sampled, "trust_region/kl") if value is not None]
    assert kl
    assert all(value > 0 for value in kl)


@pytest.mark.parametrize("options", [{}, {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 8}])
def test_rloo_scores_a_sample_from_the_start_and_its_advantages_are_the_same(tmp_path, options):
    options = SIXTEEN | TRUST | {"baseline": "leave_one_out"} | options
    sampled = train(Kept, OBLRPOConfig, tmp_path, **options)
    whole = train(Kept, OBLRPOConfig, tmp_path, score_scope="all", **options)
    assert logged(sampled, "score/fraction") == [5 / 16] * 3
    assert torch.equal(sampled.batches[0]["advantages"], whole.batches[0]["advantages"])
    assert len(sampled.kept[0][1].rewards) == 5


def test_a_loss_that_is_divided_by_tokens_counts_those_of_the_whole_batch(tmp_path):
    options = SIXTEEN | {"baseline": "leave_one_out", "loss_type": "dapo", "max_steps": 1}
    trainer = train(Kept, OBLRPOConfig, tmp_path, **options)
    ((batch, scored, prompts),) = trainer.kept
    advantages = trainer.batches[0]["advantages"].view_as(batch.rewards) * (32 / batch.lengths.sum())
    noise = gradient_moments(per_prompt_gradients(scored.sketches, advantages[prompts])).noise
    assert logged(trainer, "gradient_snr/noise") == [pytest.approx(noise, rel=1e-4)]


def test_the_papers_formula_keeps_its_weights(tmp_path, always):
    always(EQUAL)
    trainer = train(Kept, OBLRPOConfig, tmp_path, baseline_prior_strength=0.0, **SIXTEEN)
    assert logged(trainer, "score/fraction") == [1.0] * 3


def test_the_rate_of_a_sample_is_about_that_of_the_whole_batch(tmp_path):
    options = {"num_generations": 1, "per_device_train_batch_size": 64, "score_min_prompts": 32, **TRUST}
    options |= {"baseline_prior_strength": math.inf, "max_steps": 12}
    rates = [
        logged(train(OBLRPOTrainer, OBLRPOConfig, tmp_path, score_scope=scope, **options), "learning_rate")[-1]
        for scope in ("auto", "all")
    ]
    assert rates[0] == pytest.approx(rates[1], rel=0.5)


def test_weights_that_gain_little_are_dropped_once_that_is_known_with_a_line(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("oblr_trl.baselines.weights_choice.TOLERANCE", 1000.0)
    trainer = train(Kept, OBLRPOConfig, tmp_path, max_steps=14, **SIXTEEN)
    fractions = logged(trainer, "score/fraction")
    informative = trainer._baseline_estimator.weights_choice.state_dict()["num_batches"]
    assert 10 <= informative <= 14
    assert fractions == [1.0] * (24 - informative) + [5 / 16] * (informative - 10)
    lines = [record.getMessage() for record in caplog.records if "Weights of the baseline" in record.getMessage()]
    assert len(lines) == 1
    assert "from here on 'equal', not 'all'" in lines[0]
    assert all(value > 0 for value in logged(trainer, "variance_ratio/equal_weights"))
    assert all(value > 0 for value in logged(trainer, "variance_ratio/lm_head_weights"))


def test_a_run_that_was_killed_after_the_choice_goes_on_to_the_bit(tmp_path, monkeypatch):
    monkeypatch.setattr("oblr_trl.baselines.weights_choice.TOLERANCE", 1000.0)
    options = SIXTEEN | TRUST | {"max_steps": 14, "save_strategy": "steps", "save_steps": 12}
    whole = train(Kept, OBLRPOConfig, tmp_path / "whole", **options)
    assert logged(whole, "score/fraction")[-2:] == [5 / 16] * 2
    resumed = construct(Kept, OBLRPOConfig, tmp_path / "resumed", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-12"))
    assert logged(resumed, "score/fraction")[-2:] == [5 / 16] * 2
    assert algorithm_state(resumed) == algorithm_state(whole)
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], tensor), name


def test_fewer_prompts_than_a_variance_needs_are_refused(tmp_path):
    with pytest.raises(ValueError, match="score_min_prompts=1: a variance needs two"):
        OBLRPOConfig(str(tmp_path), score_min_prompts=1, use_cpu=True, bf16=False)
