"""The README against the code: metrics, options, commands and paths it names exist."""

import dataclasses
import re
from pathlib import Path

from trl import GRPOConfig

from oblr_trl import OBLRPOConfig
from tests.test_trainer import METRICS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def section(title):
    return README.split(f"## {title}\n", 1)[1].split("\n## ", 1)[0]


def test_the_metrics_table_lists_exactly_the_metrics_that_are_logged():
    assert sorted(re.findall(r"^\| `([\w/]+)` \|", section("Metrics"), flags=re.MULTILINE)) == sorted(METRICS)


def test_the_options_table_lists_every_own_option_with_its_default():
    inherited = {field.name for field in dataclasses.fields(GRPOConfig)}
    own = {field.name: field.default for field in dataclasses.fields(OBLRPOConfig) if field.name not in inherited}
    listed = {}
    for names, default in re.findall(r"^\| (`.+?`) \| (.+?) \|", section("Options"), flags=re.MULTILINE):
        for name, value in zip(re.findall(r"`(\w+)`", names), default.replace("`", "").split(", "), strict=True):
            listed[name] = value
    assert listed == {name: str(default) for name, default in own.items()}


def test_commands_and_files_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"make ([a-z-]+)", README):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target
    for path in re.findall(r"(?:recipes|docs|benchmarks)/[\w./-]+\.\w+", README):
        assert (ROOT / path).exists(), path
    for name in re.findall(r"^  ((?:\w+\.py ?)+)", section("Layout"), flags=re.MULTILINE):
        for file in name.split():
            assert (ROOT / "oblr_trl" / file).exists(), file
