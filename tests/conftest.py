import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import torch

# The models are tiny: more threads only contend with the other test process.
torch.set_num_threads(1)
