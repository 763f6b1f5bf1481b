"""These tests need vLLM, in an environment of its own: `make test-vllm`. `make test` does not collect them."""

import importlib.util
import json

import pytest

from tests.tiny_models import tiny_model, tiny_tokenizer
from tests.vllm import runs
from tests.vllm.plans import LAUNCHES

if importlib.util.find_spec("vllm") is None:
    raise pytest.UsageError(
        "vLLM is not installed here, and these tests are about nothing else: run `make test-vllm`."
    )


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """What all recipes have in common: a tiny Qwen3 whose heads are wide enough for vLLM's attention, and sums."""
    path = tmp_path_factory.mktemp("base")
    tiny_model(num_layers=2).save_pretrained(path / "model")
    tiny_tokenizer().save_pretrained(path / "model")
    rows = [{"prompt": f"{a}+{b}=", "solution": str(a + b)} for a in range(8) for b in range(8)]
    (path / "prompts.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return {"model_name_or_path": str(path / "model"), "dataset_name": str(path / "prompts.jsonl")}


@pytest.fixture(scope="session")
def run_named(base, tmp_path_factory):
    """A function from a run's name to the [`runs.Run`]; a launch is carried out when the first of its runs is asked for."""
    done = {}

    def find(name):
        launch = next(key for key, value in LAUNCHES.items() if name in value["plan"])
        if launch not in done:
            done[launch] = runs.start(tmp_path_factory.mktemp(launch), base=base, **LAUNCHES[launch])
        return done[launch][name]

    return find
