"""The command `oblr-trl`: each script as `python -m` runs it, and the nearest name of a misspelt one."""

import subprocess
import sys
import tomllib
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path

import pytest

from oblr_trl.scripts import cli

ROOT = Path(__file__).parent.parent


def run(*arguments):
    result = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=300)
    return result.returncode, result.stdout, result.stderr


def test_the_entry_point_is_the_function_of_the_module():
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    installed = {entry.name: entry.value for entry in entry_points(group="console_scripts")}

    assert EntryPoint("oblr-trl", declared["oblr-trl"], "console_scripts").load() is cli.main
    assert installed.get("oblr-trl", declared["oblr-trl"]) == declared["oblr-trl"]


def test_every_script_is_listed_with_one_line_each(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["oblr-trl", "--help"])
    cli.main()

    scripts = {path.stem for path in Path(cli.__file__).parent.glob("*.py")} - {"__init__", "cli"}
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert scripts == {"train", "evaluate", "compare", "plan", "diagnose", "sweep"} == set(cli.SCRIPTS)
    assert [line[0] for line in lines if line and line[0] in scripts and len(line) > 3] == list(cli.SCRIPTS)


def test_an_unknown_script_is_refused_with_the_nearest_name(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["oblr-trl", "trian", "--config", "x"])

    with pytest.raises(
        SystemExit, match=r"^oblr-trl: unknown script 'trian'; the nearest name is 'train'; use one of"
    ):
        cli.main()


@pytest.mark.slow
def test_only_the_chosen_script_is_imported():
    code = """
import atexit, sys
from oblr_trl.scripts.cli import main
loaded = lambda: [name for name in sys.modules if name.startswith(("oblr_trl.scripts.", "oblr_trl.oblrpo_trainer"))]
atexit.register(lambda: print(*loaded()))
sys.argv = ["oblr-trl", "diagnose", "--help"]
main()
"""
    assert run("-c", code)[1].splitlines()[-1] == "oblr_trl.scripts.cli"  # `diagnose` itself ran as `__main__`


@pytest.mark.slow
def test_a_script_has_the_output_and_exit_code_of_its_module():
    assert run("-m", "oblr_trl.scripts.cli", "diagnose", "nowhere") == run(
        "-m", "oblr_trl.scripts.diagnose", "nowhere"
    )
