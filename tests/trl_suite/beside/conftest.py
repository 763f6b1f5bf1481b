"""TRL's tests on the CPU, where its configurations would refuse their default of bf16, and for a third of their steps."""

import pytest
import torch
from trl.trainer.base_config import _BaseConfig

torch.set_num_threads(1)
# It counts its training steps.
FULL_LENGTH = "test_prepare_input_called_with_correct_data"


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch, request):
    post_init = _BaseConfig.__post_init__

    def post_init_on_the_cpu(self):
        self.use_cpu = True
        if request.node.name != FULL_LENGTH:
            self.num_train_epochs = 1
        post_init(self)

    monkeypatch.setattr(_BaseConfig, "__post_init__", post_init_on_the_cpu)
