"""The memory of prompts in the trainer: what it does to the advantages over epochs, and that it survives a kill."""

import pytest
import torch
from datasets import Dataset

from oblr_trl import OBLRPOConfig, OBLRPOTrainer
from oblr_trl.baselines import BaselineEstimator, GroupedBatch
from tests.recording import Recording, oracle_scores
from tests.tiny_models import construct, digit_reward, logged

SAVING = {"save_strategy": "steps", "save_steps": 1}


def reward_by_prompt(prompts, completions, **kwargs):
    """Differs from prompt to prompt, so that memory tells something that the other prompts do not."""
    return [reward + int(prompt[0]) for prompt, reward in zip(prompts, digit_reward(completions), strict=True)]


def train_on(num_prompts, trainer_class, output_dir, *, resume_from_checkpoint=None, **options):
    """4 prompts x 8 completions a step."""
    dataset = Dataset.from_dict({"prompt": [f"{a}+{a}=" for a in range(num_prompts)]})
    options = {"max_steps": 6, "reward": reward_by_prompt, "trainer": {"train_dataset": dataset}} | options
    trainer = construct(trainer_class, OBLRPOConfig, output_dir, **options)
    trainer.train(resume_from_checkpoint=resume_from_checkpoint)
    return trainer


def weights(trainer):
    return torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()])


def test_from_the_second_epoch_on_the_advantages_know_the_earlier_visits(tmp_path):
    trainer = train_on(8, Recording, tmp_path, score_method="exact")
    assert logged(trainer, "baseline/remembered_fraction") == [0, 0, 1, 1, 1, 1]
    assert logged(trainer, "baseline/memory_strength")[:3] == [1, 1, 1]
    oracle = BaselineEstimator("gradient_weighted", leave_one_out=True, prior_strength=None, memory_size=8)
    forgetful = BaselineEstimator("gradient_weighted", leave_one_out=True, prior_strength=None)
    for step, recorded in enumerate(trainer.batches):
        rewards = recorded["rewards"]
        keys = recorded["prompt_ids"].view(*rewards.shape, -1)[:, 0, 0]  # the first digit tells the prompts apart
        batch = GroupedBatch(
            rewards, torch.ones_like(rewards), oracle_scores(recorded).square().sum(dim=2), prompt_keys=keys
        )
        advantages = recorded["advantages"].view_as(rewards)
        torch.testing.assert_close(advantages, rewards - oracle(batch), rtol=1e-3, atol=1e-5)
        without = (advantages - (rewards - forgetful(batch))).abs().max()
        assert without > 1e-3 if step >= 2 else without < 1e-4
        oracle.update(batch)
        forgetful.update(batch)


def test_a_run_resumed_in_a_later_epoch_equals_an_uninterrupted_one(tmp_path):
    whole = train_on(8, OBLRPOTrainer, tmp_path / "whole", **SAVING)
    for step in (1, 4):
        checkpoint = str(tmp_path / "whole" / f"checkpoint-{step}")
        resumed = train_on(8, OBLRPOTrainer, tmp_path / "resumed", resume_from_checkpoint=checkpoint)
        assert torch.equal(weights(resumed), weights(whole))
        memories = [trainer._baseline_estimator.memory.state_dict() for trainer in (resumed, whole)]
        assert all(torch.equal(memories[0][name], tensor) for name, tensor in memories[1].items())
        assert resumed._baseline_estimator.state_dict() == whole._baseline_estimator.state_dict()


def test_a_checkpoint_without_memory_is_resumed_with_an_empty_one(tmp_path):
    train_on(8, OBLRPOTrainer, tmp_path, max_steps=4, **SAVING)
    (tmp_path / "checkpoint-4" / "oblrpo_state.pt").unlink()
    resumed = train_on(8, OBLRPOTrainer, tmp_path / "resumed", resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert logged(resumed, "baseline/remembered_fraction")[4:] == [0, 0]


@pytest.mark.parametrize("num_generations", [2, 8])
def test_a_memory_of_prompts_that_do_not_come_back_changes_nothing_bit_for_bit(tmp_path, num_generations):
    options = {"num_generations": num_generations, "per_device_train_batch_size": 4 * num_generations}
    remembering = train_on(12, OBLRPOTrainer, tmp_path / "a", max_steps=3, **options)
    plain = train_on(12, OBLRPOTrainer, tmp_path / "b", max_steps=3, baseline_memory_size=0, **options)
    assert len(remembering._baseline_estimator.memory) == 12
    assert torch.equal(weights(remembering), weights(plain))
    assert logged(remembering, "baseline/prior_strength") == logged(plain, "baseline/prior_strength")


def test_the_papers_baseline_and_other_baselines_remember_nothing(tmp_path):
    for name, options in {"paper": {"baseline_prior_strength": 0.0}, "rloo": {"baseline": "leave_one_out"}}.items():
        trainer = train_on(4, OBLRPOTrainer, tmp_path / name, max_steps=2, **options, **SAVING)
        assert logged(trainer, "baseline/remembered_fraction") == logged(trainer, "baseline/memory_strength") == [0, 0]
        assert not (tmp_path / name / "checkpoint-2" / "oblrpo_state.pt").exists()


def test_without_prior_a_memory_can_be_asked_for(tmp_path):
    options = {"baseline_prior_strength": 0.0, "baseline_memory_size": 3}
    trainer = train_on(4, OBLRPOTrainer, tmp_path, max_steps=2, **options)
    assert logged(trainer, "baseline/prior_strength") == [0, 0]
    assert logged(trainer, "baseline/remembered_fraction") == [0, 3 / 4]  # of four prompts three are kept
