import gc
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import pytest
import torch

# The models are tiny: more threads only contend with the other test process.
torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def imported_modules_are_no_garbage():
    """Every training starts with a collection, which would look through all that the imports left."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
