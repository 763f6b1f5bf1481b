"""`evaluate` with a real vLLM: the completions of transformers, and those of an uninterrupted run after a resume."""

import functools
import json
import os

import pytest
import vllm
from transformers import AutoTokenizer

from tests.evaluation.files import evaluate, gsm8k_rows, local, make_model, read_jsonl, write_jsonl


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    """Command line of twelve problems; in float32, where the two backends agree on the most likely token."""
    directory = tmp_path_factory.mktemp("evaluate")
    files = local(gsm8k=write_jsonl(directory / "rows.jsonl", gsm8k_rows(12)))
    options = "--max_new_tokens 24 --batch_size 8 --dtype float32"
    return [*files, *options.split(), "--model_name_or_path", make_model(directory / "model")]


@pytest.fixture(scope="module", autouse=True)
def one_engine():
    """Build one engine, whose start is what costs time, for all evaluations of the same settings."""
    patch = pytest.MonkeyPatch()
    patch.setattr(vllm, "LLM", functools.cache(vllm.LLM))
    for name, value in {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}.items():
        patch.setenv(name, os.environ.get(name, value))
    yield
    patch.undo()


@pytest.mark.parametrize("stops", ["", "?-"], ids=["end-of-text", "stop-tokens"])
def test_greedy_completions_are_those_of_transformers(command, tmp_path, stops):
    if stops:
        tokenizer = AutoTokenizer.from_pretrained(command[-1])
        command = [*command, "--stop_token_ids", *tokenizer.convert_tokens_to_ids(list(stops))]
    for backend in ("vllm", "transformers"):
        evaluate(*command, "--backend", backend, "--output_dir", tmp_path / backend)

    records = read_jsonl(tmp_path / "vllm" / "gsm8k.jsonl")
    assert records == read_jsonl(tmp_path / "transformers" / "gsm8k.jsonl")
    assert all(flag for record in records for flag in record["truncated"]) == (not stops)
    assert json.loads((tmp_path / "vllm" / "settings.json").read_text())["backend"] == "vllm"


def test_a_resumed_evaluation_equals_an_uninterrupted_one(command, tmp_path):
    sampled = [*command, "--temperature", "1", "--num_completions", "2", "--output_dir"]
    evaluate(*sampled, tmp_path / "whole")
    lines = (tmp_path / "whole" / "gsm8k.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "killed").mkdir()
    cut = b"".join(lines[:5]) + lines[5][:40]  # in the second of 3 batches
    (tmp_path / "killed" / "gsm8k.jsonl").write_bytes(cut)

    evaluate(*sampled, tmp_path / "killed")

    assert (tmp_path / "killed" / "gsm8k.jsonl").read_bytes() == b"".join(lines)
    texts = [text for record in read_jsonl(tmp_path / "whole" / "gsm8k.jsonl") for text in record["completions"]]
    assert len(set(texts)) > 20  # every completion has a seed of its own; one that ends at once is empty
