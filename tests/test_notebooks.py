"""The committed notebooks as they lie there: question, outputs, size, and nothing of the machine that made them."""

import ast
import json
import re
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
GREATEST_SIZE = 200 * 1024
TITLES = [
    "01_quickstart",
    "02_gradient_weighted_baseline",
    "03_learning_rate",
    "04_qwen3_lora_gpu",
    "05_read_your_run",
]


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def path(request):
    return request.param


def cells(path, kind):
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == kind]


def outputs(path):
    return [output for cell in cells(path, "code") for output in cell.outputs]


def source(path):
    return "\n".join(cell.source for cell in cells(path, "code"))


def public_functions():
    """Names of functions and classes of the package without underscore, but for those every script has."""
    found = set()
    for module in (ROOT / "oblr_trl").rglob("*.py"):
        for node in ast.parse(module.read_text()).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                found.add(node.name)
    return found - {"main"}


def test_all_notebooks_are_there():
    assert [path.stem for path in NOTEBOOKS] == TITLES


def test_the_title_cell_asks_one_question_and_the_last_cells_answer_with_a_picture(path):
    notebook = nbformat.read(path, as_version=4)
    title = notebook.cells[0]
    assert title.cell_type == "markdown"
    assert re.match(r"# .+\?$", title.source.split("\n")[0])
    *_, answer, figure = notebook.cells
    assert answer.source.startswith("## Answer\n")
    assert len(answer.source) > 100
    assert any("image/png" in output.get("data", {}) for output in figure.outputs)


def test_it_is_small_and_was_executed_from_top_to_bottom(path):
    assert path.stat().st_size <= GREATEST_SIZE
    assert [cell.execution_count for cell in cells(path, "code")] == list(range(1, len(cells(path, "code")) + 1))


def test_outputs_hold_no_error_no_warning_and_no_path_of_a_machine(path):
    assert not [output for output in outputs(path) if output.output_type == "error"]
    assert not [output.text for output in outputs(path) if output.output_type == "stream" and output.name == "stderr"]
    text = json.dumps(nbformat.read(path, as_version=4))
    assert not re.findall(r"/(?:work|root|tmp|home|Users|usr|mnt)/[\w./-]*", text)
    assert not re.findall(r"\w*Warning\b", json.dumps(outputs(path)))


def test_nothing_that_changes_from_run_to_run_is_kept(path):
    notebook = nbformat.read(path, as_version=4)
    assert set(notebook.metadata) == {"kernelspec"}
    assert not [cell.metadata for cell in notebook.cells if cell.metadata]
    assert "<progress" not in json.dumps(outputs(path))  # a table with elapsed times


def test_it_uses_the_package_and_defines_nothing_that_the_package_has(path):
    defined = {
        node.name for node in ast.walk(ast.parse(source(path))) if isinstance(node, ast.FunctionDef | ast.ClassDef)
    }
    assert "from oblr_trl" in source(path)
    assert not defined & public_functions()


def test_it_needs_no_network_and_no_path_outside_of_the_repository(path):
    assert not re.findall(r"https?://|load_dataset\(|snapshot_download|[\"']/\w+/", source(path))


def test_only_one_cell_tells_the_gpu_run_from_the_small_one():
    code = source(ROOT / "notebooks" / "04_qwen3_lora_gpu.ipynb")
    assert len(re.findall(r"^ON_GPU = ", code, flags=re.MULTILINE)) == 1
    assert code.count("ON_GPU") == 2  # where it is set, and where the overrides are chosen
