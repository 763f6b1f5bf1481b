"""What TRL's tests import from `.testing_utils`. The file of that name imports more of TRL than a release has."""

import importlib.util

import pytest


def _requires(module):
    return pytest.mark.skipif(importlib.util.find_spec(module) is None, reason=f"test requires {module}")


class TrlTestCase:
    @pytest.fixture(autouse=True)
    def set_tmp_dir(self, tmp_path):
        self.tmp_dir = str(tmp_path)


def is_ampere_or_newer():
    return False


# Tools need it with older releases of transformers only.
require_jmespath = pytest.mark.skipif(False, reason="")
require_bitsandbytes = _requires("bitsandbytes")
require_kernels = _requires("kernels")
require_liger_kernel = _requires("liger_kernel")
require_peft = _requires("peft")
require_vllm = _requires("vllm")
require_torch_accelerator = pytest.mark.skip(reason="test requires an accelerator")
# Their models come with processors of images, which only the hub has.
require_vision = pytest.mark.skip(reason="test requires vision")
