"""Executes the notebooks in place and leaves out of them what changes from run to run: timings, versions, counts.

```bash
python notebooks/execute.py  # all of them, or those named
```
"""

import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

NOTEBOOKS = Path(__file__).parent


def is_progress(output: nbformat.NotebookNode) -> bool:
    """Whether this is the trainer's table with its bar and elapsed times, whose numbers the log has too."""
    return "<progress" in output.get("data", {}).get("text/html", "")


def execute(path: Path) -> None:
    """Run all cells in a fresh kernel, from the notebook's own directory, and write code and outputs back."""
    notebook = nbformat.read(path, as_version=4)
    resources = {"metadata": {"path": str(path.parent)}}
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources=resources, record_timing=False).execute()
    notebook.metadata = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"
        cell.metadata = {}
        if "outputs" in cell:
            cell.outputs = [output for output in cell.outputs if not is_progress(output)]
        for output in cell.get("outputs", []):
            output.get("data", {}).pop("application/vnd.jupyter.widget-view+json", None)
    nbformat.write(notebook, path)


if __name__ == "__main__":
    for path in [Path(name).resolve() for name in sys.argv[1:]] or sorted(NOTEBOOKS.glob("*.ipynb")):
        sys.stdout.write(f"{path.name}\n")
        execute(path)
