"""The score is the gradient that the loss really takes: token weights against autograd through TRL's `_compute_loss`."""

import itertools
import math

import pytest
import torch
from trl import GRPOConfig, GRPOTrainer

from oblr_trl import OBLRPOConfig, OBLRPOTrainer
from oblr_trl.baselines import GroupedBatch
from oblr_trl.scores import reference_scores
from oblr_trl.scores.completion_scorer import CompletionScorer
from oblr_trl.scores.loss_weights import (
    LINEAR_LOSS_TYPES,
    applied_importance_ratio,
    differentiates_sequences,
    loss_token_weights,
)
from tests.tiny_models import construct, random_batch, tiny_model

RATIOS = ("none", "sequence", "token")
LEVELS = ("token", "sequence")


def batch_with_ratio(ratio, seed=0):
    """A batch as the trainer generates one, with tool replies in it; tokens and sequences have ratios from 0.3 to 3."""
    input_ids, attention_mask, completion_mask = random_batch()
    num_tokens = completion_mask.size(1)
    generator = torch.Generator().manual_seed(seed)
    tool_mask = torch.randint(0, 4, completion_mask.shape, generator=generator).clamp(max=1)
    batch = {
        "prompt_ids": input_ids[:, :-num_tokens],
        "prompt_mask": attention_mask[:, :-num_tokens],
        "completion_ids": input_ids[:, -num_tokens:],
        "completion_mask": completion_mask,
        "tool_mask": tool_mask,
        "advantages": torch.randn(len(input_ids), generator=generator),
        "num_items_in_batch": (completion_mask * tool_mask).sum(),
    }
    if ratio != "none":
        shape = completion_mask.shape if ratio == "token" else (len(input_ids), 1)
        batch["importance_sampling_ratio"] = (2.4 * torch.rand(shape, generator=generator) - 1.2).exp()
    return batch


def oracle(trained, batch, token_weights):
    model = tiny_model(num_layers=2).double()
    model.load_state_dict(trained.state_dict())  # a copy would keep calling the forward that TRL gave the original
    input_ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    attention_mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
    return reference_scores(model, input_ids, attention_mask, batch["completion_mask"], token_weights=token_weights)


def token_weights(batch, loss_type, level):
    mask = batch["completion_mask"] * batch["tool_mask"]
    ratio = batch.get("importance_sampling_ratio")
    if ratio is not None:
        ratio = applied_importance_ratio(ratio, mask, loss_type=loss_type, importance_sampling_level=level)
    return loss_token_weights(loss_type, mask, ratio)


# What `vespo` makes of vLLM's ratio depends on the sign of the advantage.
CASES = [
    case for case in itertools.product(LINEAR_LOSS_TYPES, LEVELS, RATIOS) if case[0] != "vespo" or case[2] == "none"
]


@pytest.mark.filterwarnings("ignore:When using")
@pytest.mark.parametrize(("loss_type", "level", "ratio"), CASES)
def test_the_token_weights_are_those_of_the_loss(tmp_path, loss_type, level, ratio):
    """At ratio 1 the gradient of the loss is -sum_i A_i s_i, up to one positive constant."""
    trainer = construct(GRPOTrainer, GRPOConfig, tmp_path, loss_type=loss_type, importance_sampling_level=level)
    trainer.current_gradient_accumulation_steps = 1  # set when training begins
    trainer.use_vllm = ratio != "none"  # no engine is asked for anything
    batch = batch_with_ratio(ratio)
    parameters = list(trainer.model.parameters())
    gradients = torch.autograd.grad(trainer._compute_loss(trainer.model, batch), parameters)
    loss_gradient = torch.cat([gradient.flatten() for gradient in gradients]).double()

    scores = oracle(trainer.model, batch, token_weights(batch, loss_type, level).double())
    expected = -(batch["advantages"].double() @ scores)
    assert torch.cosine_similarity(loss_gradient, expected, dim=0).item() == pytest.approx(1, abs=1e-8)


def test_bnpo_divides_by_the_mean_length_of_the_process():
    # 3 tokens in 2 completions: every token's gradient is divided by 3 where a constant would be 2, so its weight is 2/3.
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    expected = torch.tensor([[2 / 3, 2 / 3, 0], [2 / 3, 0, 0]])
    torch.testing.assert_close(loss_token_weights("bnpo", mask), expected)


def test_bnpo_expects_the_micro_batch_that_a_completion_will_be_drawn_into():
    """Against the mean over all micro-batches of m / (number of tokens), which the expected number stands for."""
    lengths = [9, 12, 6, 10, 8, 15]
    mask = (torch.arange(15) < torch.tensor(lengths).unsqueeze(1)).long()

    def weights(m):
        return loss_token_weights("bnpo", mask, micro_batch_size=m)[:, 0].tolist()

    def drawn(m, i):
        others = lengths[:i] + lengths[i + 1 :]
        sums = [lengths[i] + sum(draw) for draw in itertools.combinations(others, m - 1)]
        return sum(m / tokens for tokens in sums) / len(sums)

    for m in (2, 3, 5):
        expected = [drawn(m, i) for i in range(6)]
        assert weights(m) == pytest.approx(expected, rel=0.03)
        assert all(w < e for w, e in zip(weights(m), expected, strict=True))  # Jensen
    assert weights(1) == pytest.approx(loss_token_weights("grpo", mask)[:, 0].tolist())
    assert weights(6) == pytest.approx([6 / 60] * 6) == [drawn(6, 0)] * 6
    torch.testing.assert_close(loss_token_weights("bnpo", torch.zeros(2, 3), micro_batch_size=1), torch.zeros(2, 3))


def test_vespo_takes_vllms_ratio_as_one_which_is_right_to_first_order():
    mask, ratio = torch.ones(2, 3), torch.full((2, 3), math.exp(0.01 / 3))
    applied = applied_importance_ratio(ratio, mask, loss_type="vespo", importance_sampling_level="token")
    torch.testing.assert_close(applied, torch.ones(2, 1))
    # k - lambda = 2 - 3 for a positive, 3 - 2 for a negative advantage: weights of exp(-0.01) and exp(0.01), up to 0.01^2.
    phi = GRPOTrainer.get_gamma_weights(torch.tensor([[1.0], [-1.0]]), torch.zeros(2, 3), mask, ratio)
    torch.testing.assert_close(phi, torch.tensor([[0.99], [1.01]]), rtol=0, atol=2e-4)


def test_a_sequences_ratio_gives_every_token_the_mean_over_the_loss():
    # Tokens 1 and 2 are in the loss: (1 + 4) / 2. `cispo` has a ratio of sequences too, but differentiates tokens.
    mask, ratio = torch.tensor([[1, 1, 0]]), torch.tensor([[1.0, 4.0, 9.0]])
    applied = {
        loss_type: applied_importance_ratio(ratio, mask, loss_type=loss_type, importance_sampling_level="sequence")
        for loss_type in ("dr_grpo", "cispo")
    }
    torch.testing.assert_close(applied["dr_grpo"], torch.tensor([[2.5]]))
    torch.testing.assert_close(applied["cispo"], ratio)
    assert [name for name in LINEAR_LOSS_TYPES if not differentiates_sequences(name, "sequence")] == ["cispo", "vespo"]


@pytest.mark.filterwarnings("ignore:When using")
@pytest.mark.parametrize(
    ("level", "ratio", "reused"),
    [
        ("sequence", "token", False),
        ("sequence", "token", True),
        ("token", "sequence", False),
        ("token", "sequence", True),
        ("token", "token", False),  # the pass must know the ratios of tokens: it cannot reuse the old-log-prob forward
    ],
)
def test_the_trainer_scores_with_the_ratio_that_the_loss_applies(tmp_path, monkeypatch, level, ratio, reused):
    """Squared norms hold the square of a sequence's ratio, whether it was known before the pass or multiplied on afterwards."""
    options = {"importance_sampling_level": level, "score_method": "exact", "per_device_train_batch_size": 16}
    trainer = construct(OBLRPOTrainer, OBLRPOConfig, tmp_path, **options)
    batch = batch_with_ratio(ratio)
    batch["tool_mask"] = torch.ones_like(batch["tool_mask"])  # with tools the forward is not reused
    monkeypatch.setattr(OBLRPOConfig, "reuses_old_logps_forward", reused)
    scorer = CompletionScorer(trainer.model, trainer._score_pass, trainer.args, trainer.accelerator, masks_later=False)
    if reused:
        trainer._scorer = scorer
        input_ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
        attention_mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
        batch["old_per_token_logps"], _, _ = trainer._get_per_token_logps_and_entropies(
            trainer.model, input_ids, attention_mask, batch["completion_ids"].size(1)
        )
    rewards = torch.zeros(len(batch["completion_mask"]), 1)
    grouped = GroupedBatch(rewards, torch.ones_like(rewards))
    scored, _ = scorer.score(grouped, batch, batch["completion_mask"], trainer._get_per_token_logps_and_entropies)
    truth = oracle(trainer.model, batch, token_weights(batch, "dr_grpo", level).double()).square().sum(dim=1).float()
    torch.testing.assert_close(scored.weights.flatten(), truth, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(scored.sketches.flatten(0, 1).square().sum(dim=1), truth, rtol=0.2, atol=1e-6)
