"""The advantages that either trainer must arrive at, from rewards the test computes and one backward pass per sequence."""

import math

import torch
from trl.trainer.utils import nanstd

from oblr_trl import OBLRPOTrainer, gradient_weighted_baseline
from oblr_trl.scores import reference_scores
from tests.drop_in.scripts import G, texts
from tests.tiny_models import digit_reward


class WithInputs(torch.nn.Module):
    """A model together with further inputs of its forward, for the oracle, which knows token ids only."""

    def __init__(self, model, inputs):
        super().__init__()
        self.model, self.inputs = model, inputs
        self.get_output_embeddings = model.get_output_embeddings

    def forward(self, **kwargs):
        return self.model(**kwargs, **self.inputs)


def image_inputs(batch, i):
    """What row i of a batch with one image per row shows the model: one entry of a stack, or its share of all patches."""
    if "image_grid_thw" in batch:
        patches = batch["image_grid_thw"].prod(dim=1).cumsum(dim=0).tolist()
        pixel_values = batch["pixel_values"][([0, *patches])[i] : patches[i]]
        by_row = {name: batch[name][i : i + 1] for name in ("image_grid_thw", "mm_token_type_ids")}
        return by_row | {"pixel_values": pixel_values}
    return {"pixel_values": batch["pixel_values"][i : i + 1]} if "pixel_values" in batch else {}


def full_scores(trainer, batch, token_weights=None, **options):
    """Scores by one backward pass per sequence, at the weights the batch was generated with."""
    input_ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    attention_mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
    mask = batch["completion_mask"] * batch.get("tool_mask", 1) if token_weights is None else token_weights
    model, after = trainer.model, {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    model.eval()
    model.load_state_dict(batch["state"])
    scores = []
    for i in range(input_ids.size(0)):
        row = slice(i, i + 1)
        seeing = WithInputs(model, image_inputs(batch, i))
        scores.append(reference_scores(seeing, input_ids[row], attention_mask[row], mask[row], **options))
    model.load_state_dict(after)
    return torch.cat(scores)


def squared_norms(trainer, batch, token_weights=None, **options):
    return full_scores(trainer, batch, token_weights, **options).square().sum(dim=1).view(-1, G)


def assert_advantages(trainer, rewards_of=None, **options):
    """The method makes them of `rewards_of(batch)`, which the test computes; by default of the digits in its texts."""
    rewards_of = rewards_of or (lambda batch: digit_reward(texts(trainer, batch)))
    assert trainer.batches
    for batch in trainer.batches:
        rewards = torch.tensor([math.nan if r is None else float(r) for r in rewards_of(batch)]).view(-1, G)
        if isinstance(trainer, OBLRPOTrainer):
            weights = squared_norms(trainer, batch, **options)
            expected = rewards - gradient_weighted_baseline(rewards, weights, prior_strength=batch["prior_strength"])
        else:
            std = nanstd(rewards, dim=1).unsqueeze(1)
            expected = (rewards - rewards.nanmean(dim=1, keepdim=True)) / (std + 1e-4)
        expected = expected.nan_to_num(nan=0.0)
        assert expected.abs().max() > 1e-3  # else the comparison shows nothing
        torch.testing.assert_close(batch["advantages"].view_as(expected), expected, rtol=1e-3, atol=1e-5)
