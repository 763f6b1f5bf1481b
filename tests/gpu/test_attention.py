"""A kernel of attention whose gradient is NaN is not trained with."""

import torch

from oblr_trl import OBLRPOConfig, OBLRPOTrainer
from oblr_trl.checks.attention import masked_attention_is_nan
from tests.gpu.device import DEVICE, TRAINING
from tests.tiny_models import train


def test_a_trainer_leaves_no_attention_whose_gradient_is_nan(tmp_path, record_property):
    torch.backends.cuda.enable_cudnn_sdp(True)
    record_property("gradient of torch's default attention is NaN", masked_attention_is_nan(DEVICE))

    train(OBLRPOTrainer, OBLRPOConfig, tmp_path, **TRAINING, max_steps=1)

    assert not masked_attention_is_nan(DEVICE)
