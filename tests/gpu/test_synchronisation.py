"""How often the scoring pass makes the processor wait for the GPU: as often for a deep model as for a shallow one."""

import warnings
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from oblr_trl.scores import ScorePass
from tests.gpu.device import DEVICE, to_device
from tests.model_zoo import zoo_model
from tests.tiny_models import random_batch, tiny_model

pytestmark = pytest.mark.skipif(DEVICE.type != "cuda", reason="a CPU does not wait for itself")
PACKAGE = Path(__file__).parents[2] / "oblr_trl"
MOST = 1  # of a pass: which tokens have a weight


@contextmanager
def counted_waits():
    """How often CUDA is waited for, by the line of Python that waits."""
    found = Counter()

    def note(message, category, filename, lineno, *args):
        if "synchroniz" in str(message):
            found[filename, lineno] += 1

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.fixture
def waits(record_property):
    """Our own waits of one pass, by line; those of transformers, such as a look through the mask, are left out."""

    def waits(model, scope):
        ids, attention_mask, completion_mask = to_device(random_batch(batch_size=4))
        score_pass = ScorePass(model.to(DEVICE).train(), scope=scope, last_k=1 if scope == "last_k" else None)
        weights = completion_mask.float()
        arguments = {"input_ids": ids, "attention_mask": attention_mask}, ids[:, -weights.size(1) :], weights
        with torch.autocast("cuda", torch.bfloat16):
            score_pass(*arguments)  # draws the projections
            with counted_waits() as found:
                score_pass(*arguments)
        ours = {
            f"{Path(filename).name}:{line}": number
            for (filename, line), number in found.items()
            if Path(filename).is_relative_to(PACKAGE)
        }
        record_property(
            "waits", f"{scope}, {len(list(model.parameters()))} parameters: ours {ours}, all {found.total()}"
        )
        return ours

    return waits


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("scope", ["all", "last_k", "lm_head"])
@pytest.mark.parametrize("architecture", ["qwen3", "qwen3_lora"])
def test_the_pass_waits_once_whatever_the_depth(waits, architecture, scope, checkpointing):
    found = {}
    for num_layers in (2, 6):
        model = tiny_model(architecture, num_layers=num_layers)
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        found[num_layers] = waits(model, scope)
    assert found[2] == found[6]
    assert sum(found[6].values()) <= MOST, found


def test_experts_wait_for_their_counts_alone(waits):
    found = waits(zoo_model("Qwen3Moe", experts_implementation=None), "all")
    assert sum(number for line, number in found.items() if not line.startswith("experts.py")) <= MOST, found
