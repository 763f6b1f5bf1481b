"""Tests of this folder are skipped without a GPU, unless `OBLR_GPU_REHEARSAL=1` rehearses them on the CPU."""

from pathlib import Path

import pytest
import torch

from tests.gpu.device import REHEARSES, tf32

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available() or REHEARSES:
        return
    reason = "there is no CUDA device here; OBLR_GPU_REHEARSAL=1 rehearses these tests on the CPU"
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def without_tf32():
    with tf32(allowed=False):
        yield


def pytest_terminal_summary(terminalreporter):
    """What tests measured with `record_property`: worth reading after a pass too."""
    reports = [report for reports in terminalreporter.stats.values() for report in reports]
    measured = [
        f"{name} | {report.nodeid.rpartition('::')[2]} | {value}"
        for report in reports
        if getattr(report, "when", None) == "call"
        for name, value in report.user_properties
    ]
    if measured:
        terminalreporter.section("measured")
        for line in sorted(measured):
            terminalreporter.write_line(line)
