"""TRL's own tests of `GRPOTrainer`, with two names changed: those that `GRPOTrainer` passes here and ours does not are in the document."""

import os
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.trl_suite.stand_ins import renumbered, write_stand_ins

SOURCE = os.environ.get("TRL_SOURCE")
ROOT = Path(__file__).parents[2]
DOCUMENT = ROOT / "docs" / "drop_in.md"
TESTS = "tests/test_grpo_trainer.py"
STOCK_IMPORT = "from trl import GRPOConfig, GRPOTrainer\n"
OUR_IMPORT = "from oblr_trl import OBLRPOConfig as GRPOConfig, OBLRPOTrainer as GRPOTrainer\n"
# Models with image processors, and tests that need an accelerator.
LEFT_OUT = "not VLM and not Slow"
TIMEOUT = 3 * 3600  # seconds, on a machine that is busy

pytestmark = pytest.mark.skipif(not SOURCE, reason="TRL_SOURCE, a checkout of TRL, is not set")


def outcomes(folder: Path, source: str) -> dict[str, str]:
    """Run TRL's tests, as `source` has them, in a folder with stand-ins; `passed`, `failed` or `skipped` by name."""
    (folder / "tests").mkdir()
    (folder / "tests" / "__init__.py").touch()
    for path in (Path(__file__).parent / "beside").glob("*.py"):
        (folder / "tests" / path.name).write_text(path.read_text())
    (folder / TESTS).write_text(source)
    report = folder / "report.xml"
    command = [sys.executable, "-m", "pytest", TESTS, "-q", "-k", LEFT_OUT, f"--junitxml={report}", "-W", "ignore"]
    with open(folder / "log.txt", "w") as log:
        subprocess.run(
            command, cwd=folder, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=log, stderr=log, timeout=TIMEOUT
        )
    found = {}
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        kinds = {child.tag for child in case}
        outcome = "skipped" if "skipped" in kinds else "failed" if kinds & {"failure", "error"} else "passed"
        found[case.attrib["name"]] = outcome
    return found


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    assert SOURCE is not None
    source = renumbered((Path(SOURCE) / TESTS).read_text())
    assert source.count(STOCK_IMPORT) == 1
    found = []
    for name, text in (("stock", source), ("ours", source.replace(STOCK_IMPORT, OUR_IMPORT))):
        folder = tmp_path_factory.mktemp(name)
        write_stand_ins(folder, Path(SOURCE))
        found.append(outcomes(folder, text))
    return found


def test_the_document_lists_what_is_lost(both):
    stock, ours = both
    passed = {name for name, outcome in stock.items() if outcome == "passed"}
    lost = {name for name in passed if ours[name] != "passed"}
    text = DOCUMENT.read_text()
    assert set(re.findall(r"^\| `(test_[^`]+)` \|", text, flags=re.MULTILINE)) == lost
    assert f"passes {len(passed)} of the {len(stock) - list(stock.values()).count('skipped')} tests" in text
