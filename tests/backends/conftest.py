"""The model of the backend tests, runs that several tests share, and the table that they print."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import pytest
import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from examples.tiny_qwen3.model import build_model, build_tokenizer
from tests.backends import runs

COLUMNS = ("advantages", "score weights", "rho", "KL", "learning rate", "final weights")
_table = []
_report = []


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """A start model that was taught nothing."""
    path = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    tokenizer = build_tokenizer(["State the final answer to the following arithmetic problem: 1 + 2 - 3 ="] * 8)
    build_model(tokenizer).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


@pytest.fixture(scope="session")
def experts(tmp_path_factory):
    """The same with a mixture of experts."""
    path = tmp_path_factory.mktemp("experts")
    torch.manual_seed(0)
    tokenizer = build_tokenizer(["State the final answer to the following arithmetic problem: 1 + 2 - 3 ="] * 8)
    dense = build_model(tokenizer).config.to_dict()
    for name in ("model_type", "architectures", "layer_types"):
        del dense[name]
    routed = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "norm_topk_prob": True}
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**dense | routed))
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.gate.weight.normal_(std=0.2)  # which transformers leaves at zero: all experts would tie
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


@pytest.fixture(scope="session")
def shared_run(request, tmp_path_factory):
    """Runs by name: the references are trained once."""
    finished = {}

    def shared(name, *, model="model", **settings):
        if name not in finished:
            path = request.getfixturevalue(model)
            finished[name] = runs.run(tmp_path_factory.mktemp(name.replace(" ", "-")), path, **settings)
        return finished[name]

    return shared


@pytest.fixture(scope="session")
def table():
    """Rows for the table at the end: name of the configuration and one number per column."""
    return _table


@pytest.fixture(scope="session")
def report():
    """Further lines for the end."""
    return _report


def pytest_terminal_summary(terminalreporter):
    for line in _report:
        terminalreporter.write_line(line)
    if not _table:
        return
    terminalreporter.section("max relative difference against one process")
    header = f"{'configuration':<52}" + "".join(f"{column:>16}" for column in COLUMNS)
    terminalreporter.write_line(header)
    for name, differences in _table:
        terminalreporter.write_line(f"{name:<52}" + "".join(f"{differences[column]:>16.1e}" for column in COLUMNS))
