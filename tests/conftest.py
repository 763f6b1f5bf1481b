import gc
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

# Read by cuBLAS when CUDA starts: without it sums of products may differ from run to run.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import pytest
import torch

if os.environ.get("OBLR_TEST_DEVICE", "cpu") != "cpu":
    # On a GPU too, resumed runs equal others to the bit.
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cuda.enable_flash_sdp(False)
    torch.backends.cuda.enable_mem_efficient_sdp(False)
    torch.backends.cuda.enable_cudnn_sdp(False)

# The models are tiny: more threads only contend with the other test process.
torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def imported_modules_are_no_garbage():
    """Every training starts with a collection, which would look through all that the imports left."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were written, to look at their contents."""
    from matplotlib.figure import Figure

    figures = []
    savefig = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *args, **kw: figures.append(self) or savefig(self, *args, **kw)
    )
    return figures
