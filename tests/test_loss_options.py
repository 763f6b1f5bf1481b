"""Options whose effect is known only after scoring: what the advantages are, and that the default never stops a run."""

import warnings

import pytest
import torch
from trl import GRPOConfig, GRPOTrainer
from trl.trainer.utils import nanstd

from oblr_trl import OBLRPOConfig, OBLRPOTrainer, gradient_weighted_baseline
from oblr_trl.baselines import normalized_rewards
from oblr_trl.lr_scheduler import SNRScheduler
from tests.recording import Recording, RecordingSGD, oracle_scores
from tests.tiny_models import digit_reward, logged, tiny_model, train

ACCUMULATED = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 4}
STRADDLING = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2, "steps_per_generation": 3}
FALLEN_BACK = "learning rate is not adapted: lr_adaptation is 'none'"
pytestmark = pytest.mark.filterwarnings("ignore:rho will be mostly noise", "ignore:The baseline has no prior")


def letter_reward(completions, **kwargs):
    """A thousand times the number of letters; `None` for a completion without a digit."""
    return [
        1000.0 * sum(c.isalpha() for c in text) if any(c.isdigit() for c in text) else None for text in completions
    ]


def expected_advantages(batch, token_weights, prior_strength=2.0):
    norms = oracle_scores(batch, token_weights=token_weights).square().sum(dim=2)
    return batch["rewards"] - gradient_weighted_baseline(batch["rewards"], norms, prior_strength=prior_strength)


def options_with_known_advantages(**options):
    return {"baseline_prior_strength": 2.0, "score_method": "exact", "max_steps": 2} | options


@pytest.mark.parametrize("loss_type", ["bnpo", "sapo", "vespo"])
def test_the_advantages_are_those_of_the_losses_token_weights(tmp_path, loss_type):
    trainer = train(
        Recording, OBLRPOConfig, tmp_path, **options_with_known_advantages(loss_type=loss_type, **ACCUMULATED)
    )
    for batch in trainer.batches:
        mask = batch["completion_mask"].double()
        lengths = mask.sum(dim=1, keepdim=True)
        others = (lengths.sum() - lengths) / 31  # of 32
        scale = {"bnpo": 8 / (lengths + 7 * others), "sapo": 1 / lengths, "vespo": 1.0}[loss_type]
        expected = expected_advantages(batch, mask * scale)
        torch.testing.assert_close(batch["advantages"].view_as(expected), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.filterwarnings("ignore:(top_entropy|off_policy)")
@pytest.mark.parametrize("options", [{"top_entropy_quantile": 0.3}, {"off_policy_mask_threshold": 0.1}])
def test_masks_that_come_later_leave_the_advantages_alone_and_act_in_the_loss(tmp_path, options):
    common = options_with_known_advantages(num_iterations=2, learning_rate=0.1, lr_adaptation="none")
    masked = train(Recording, OBLRPOConfig, tmp_path / "masked", **common, **options)
    whole = train(Recording, OBLRPOConfig, tmp_path / "whole", **common)
    for batch, other in zip(masked.batches, whole.batches, strict=True):
        expected = expected_advantages(batch, batch["completion_mask"])
        torch.testing.assert_close(batch["advantages"].view_as(expected), expected, rtol=1e-4, atol=1e-6)
        assert torch.equal(batch["advantages"], other["advantages"])
    assert logged(masked, "grad_norm") != logged(whole, "grad_norm")


def test_a_mask_that_looks_at_the_prefix_alone_keeps_the_gradient_unbiased():
    """All sequences of two tokens of three letters: E[b sum_t m_t s_t] = 0 for a mask by the entropy at each position."""
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(3, generator=generator, dtype=torch.float64).softmax(0)
    second = torch.randn(3, 3, generator=generator, dtype=torch.float64).mul(2).softmax(1)  # given the first token
    entropies = -(second * second.log()).sum(dim=1)
    kept = entropies >= entropies.median()
    assert 0 < kept.sum() < 3
    total = torch.zeros(3, 3, dtype=torch.float64)  # of the second token's logits
    for a in range(3):
        for c in range(3):
            score = torch.eye(3, dtype=torch.float64)[c] - second[a]
            total[a] += first[a] * second[a, c] * kept[a] * score
    assert total.abs().max() < 1e-15


@pytest.mark.parametrize("by", ["group", "batch"])
def test_normalised_rewards_are_summed_before_the_baseline(tmp_path, by):
    """TRL divides by the group's deviation. A prior, which averages over groups, needs one for the batch."""
    prior = {"group": 0.0, "batch": 2.0}[by]
    options = options_with_known_advantages(
        baseline_prior_strength=prior,
        multi_objective_aggregation="normalize_then_sum",
        reward=[digit_reward, letter_reward],
        reward_weights=[1.0, 2.0],
    )

    class WithAllRewards(Recording):
        def _grouped_batch(self, *args):
            batch, *scored = super()._grouped_batch(*args)
            self.normalized.append((self.last_rewards.view(4, 8, 2).double(), batch.rewards))
            return batch, *scored

        normalized = []

    trainer = train(WithAllRewards, OBLRPOConfig, tmp_path, **options)
    assert any(rewards.isnan().any() for rewards, _ in trainer.normalized)
    for batch, (rewards, normalized) in zip(trainer.batches, trainer.normalized, strict=True):
        expected = torch.zeros(4, 8, dtype=torch.float64)
        for n in range(4):
            for i in range(8):
                for f, weight in enumerate([1.0, 2.0]):
                    scope = rewards[n, :, f] if by == "group" else rewards[:, :, f]
                    scope = scope[~scope.isnan()]
                    if not rewards[n, i, f].isnan():
                        expected[n, i] += weight * (rewards[n, i, f] - scope.mean()) / (scope.std() + 1e-4)
        torch.testing.assert_close(normalized.double(), expected, rtol=1e-5, atol=1e-6)
        norms = oracle_scores(batch).square().sum(dim=2)
        baseline = gradient_weighted_baseline(normalized, norms, prior_strength=prior)
        advantages = (normalized - baseline) / (nanstd(normalized) + 1e-4)
        torch.testing.assert_close(batch["advantages"].view(4, 8), advantages, rtol=1e-3, atol=1e-5)


def test_without_a_prior_normalised_advantages_are_those_of_trl_with_the_own_completion_left_out(tmp_path):
    options = {
        "multi_objective_aggregation": "normalize_then_sum",
        "reward": [digit_reward, lambda completions, **kwargs: [float(len(set(text))) for text in completions]],
        "max_steps": 1,
    }
    ours = train(Recording, OBLRPOConfig, tmp_path, baseline="leave_one_out", lr_adaptation="none", **options)
    trl = train(GRPOTrainer, GRPOConfig, tmp_path, **options)
    expected = torch.tensor(list(trl._logs["advantages"])) * 8 / 7
    assert expected.abs().max() > 1
    torch.testing.assert_close(torch.tensor(list(ours._logs["advantages"])), expected, rtol=1e-4, atol=1e-5)


def test_a_function_of_equal_rewards_adds_exactly_nothing():
    rewards = torch.tensor([[0.1, 0.7], [0.1, 0.7], [0.1, 0.7]]).unsqueeze(0)
    for by_group in (True, False):
        assert torch.equal(normalized_rewards(rewards, torch.tensor([1.0, 2.0]), by_group=by_group), torch.zeros(1, 3))


def test_the_unit_of_a_reward_function_has_no_say():
    generator = torch.Generator().manual_seed(0)
    rewards, weights = torch.rand(3, 4, 2, generator=generator), torch.tensor([1.0, 0.5])
    scaled = rewards * torch.tensor([1000.0, 1.0]) + torch.tensor([5.0, 0.0])
    for by_group in (True, False):
        plain = normalized_rewards(rewards, weights, by_group=by_group)
        assert plain.abs().max() > 0.5
        torch.testing.assert_close(normalized_rewards(scaled, weights, by_group=by_group), plain, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize(
    ("options", "num_batches"),
    [(STRADDLING, 3), ({"per_device_train_batch_size": 8}, 4)],
    ids=["straddling", "one prompt"],
)
def test_the_default_trains_with_the_schedule_alone_where_the_rate_cannot_be_adapted(tmp_path, options, num_batches):
    options = {"lr_scheduler_type": "linear", "max_steps": 4} | options
    with pytest.warns(UserWarning, match=FALLEN_BACK):
        trainer = train(OBLRPOTrainer, OBLRPOConfig, tmp_path, lr_adaptation=None, **options)
    assert not isinstance(trainer.lr_scheduler, SNRScheduler)
    assert logged(trainer, "learning_rate") == pytest.approx([1e-3, 7.5e-4, 5e-4, 2.5e-4])
    assert len(logged(trainer, "baseline/mean")) == num_batches
    assert logged(trainer, "lr_multiplier") == []


def test_a_run_whose_steps_straddle_generation_batches_resumes_exactly(tmp_path):
    """Batches of three micro-batches under steps of two: the first checkpoint lies in the middle of the second batch."""
    options = STRADDLING | {"max_steps": 6, "save_strategy": "steps", "save_steps": 2, "lr_adaptation": "none"}
    whole = train(OBLRPOTrainer, OBLRPOConfig, tmp_path / "whole", **options)
    checkpoint = str(tmp_path / "whole" / "checkpoint-2")
    resumed = train(OBLRPOTrainer, OBLRPOConfig, tmp_path / "on", **options, resume_from_checkpoint=checkpoint)
    assert all(torch.equal(a, b) for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True))


@pytest.mark.parametrize("adaptation", [None, "snr"])
def test_a_schedule_of_ones_own_that_cannot_be_wrapped_sets_the_rate_unless_adaptation_was_asked_for(
    tmp_path, adaptation
):
    model = tiny_model(num_layers=2)
    optimizer = RecordingSGD(model.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
    options = {"model": model, "optimizers": (optimizer, schedule), "lr_adaptation": adaptation, "max_steps": 1}
    if adaptation is not None:
        with pytest.raises(ValueError, match=r"cannot wrap a `ReduceLROnPlateau`\. Remedy"):
            train(OBLRPOTrainer, OBLRPOConfig, tmp_path, **options)
        return
    with pytest.warns(UserWarning, match=rf"{FALLEN_BACK}.*ReduceLROnPlateau"):
        trainer = train(OBLRPOTrainer, OBLRPOConfig, tmp_path, **options, eval_strategy="no")
    assert trainer.args.lr_adaptation == "none"
    assert optimizer.rates == [0.1]


def test_equal_rewards_leave_the_entropy_bonus_its_gradient(tmp_path):
    """No gradient comes from the policy term, and the parameters move by the bonus alone."""
    options = {"reward": lambda completions, **kwargs: [1.0] * len(completions), "entropy_coef": 0.1, "max_steps": 2}
    for adaptation in ("trust_region", "snr"):
        trainer = train(OBLRPOTrainer, OBLRPOConfig, tmp_path, lr_adaptation=adaptation, **options)
        assert all(advantage == 0 for advantage in trainer._logs["advantages"])
        assert min(logged(trainer, "learning_rate")) > 0
        assert min(logged(trainer, "grad_norm")) > 0


def test_a_trainer_made_without_the_constructor_does_what_its_parent_does():
    class Parent(GRPOTrainer):
        def _generate_and_score_completions(self, inputs):
            return "parent"

        def _calculate_rewards(self, *args):
            return "rewards"

    class Child(OBLRPOTrainer, Parent):
        pass

    trainer = object.__new__(Child)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert trainer._generate_and_score_completions([]) == "parent"
        assert trainer._calculate_rewards([], [], [], []) == "rewards"
