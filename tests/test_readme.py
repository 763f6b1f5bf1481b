"""README and docs against the code: metrics, options, commands, names and paths exist, and every Python block runs."""

import dataclasses
import pkgutil
import re
from pathlib import Path

import pytest
import torch
from trl import GRPOConfig

import oblr_trl
from oblr_trl import OBLRPOConfig
from oblr_trl.metrics import METRICS
from tests import recipe_stand_ins

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
TEXTS = {
    str(path.relative_to(ROOT)): path.read_text()
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
}
BLOCKS = {
    f"{name}-{number}": block
    for name, text in TEXTS.items()
    for number, block in enumerate(re.findall(r"^```python\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL))
}
HUB_MODEL = "Qwen/Qwen3-0.6B-Base"


@dataclasses.dataclass
class SmallConfig(OBLRPOConfig):
    """What a block leaves to the defaults, such that it runs here: on the CPU, one step of short completions."""

    use_cpu: bool = True
    bf16: bool | None = False
    max_steps: int = 1
    max_completion_length: int | None = 4
    report_to: str = "none"
    save_strategy: str = "no"
    disable_tqdm: bool = True


def test_the_metrics_table_lists_exactly_the_metrics_that_are_logged():
    assert sorted(re.findall(r"^\| `([\w/]+)` \|", TEXTS["docs/metrics.md"], flags=re.MULTILINE)) == sorted(METRICS)


def test_the_options_table_lists_every_own_option_with_its_default():
    inherited = {field.name for field in dataclasses.fields(GRPOConfig)}
    own = {field.name: field.default for field in dataclasses.fields(OBLRPOConfig) if field.name not in inherited}
    listed = {}
    for names, default in re.findall(r"^\| (`.+?`) \| (.+?) \|", TEXTS["docs/options.md"], flags=re.MULTILINE):
        for name, value in zip(re.findall(r"`(\w+)`", names), default.replace("`", "").split(", "), strict=True):
            listed[name] = value
    assert listed == {name: str(default) for name, default in own.items()}


def test_the_readme_sells_in_few_lines():
    assert len(README.splitlines()) <= 180


def test_commands_and_files_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"make ([a-z-]+)", README):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target
    for path in re.findall(r"(?:recipes|docs|benchmarks)/[\w./-]+\.\w+", README):
        assert (ROOT / path).exists(), path
    layout = README.split("## Layout\n", 1)[1].split("\n## ", 1)[0]
    listed = set(re.findall(r"^  (\w+(?:\.py|/))", layout, flags=re.MULTILINE))
    package = ROOT / "oblr_trl"
    modules = {path.name for path in package.glob("*.py")} - {"__init__.py"}
    assert listed == modules | {f"{path.parent.name}/" for path in package.glob("*/__init__.py")}
    assert len(modules) < 9  # and `__init__.py`


@pytest.mark.parametrize("name", TEXTS)
def test_links_to_files_lead_somewhere_and_every_page_is_listed(name):
    for link in re.findall(r"\]\((?!https?://|#)([^)#]+)", TEXTS[name]):
        assert (ROOT / name).parent.joinpath(link).exists(), link
    assert name in ("README.md", "docs/README.md") or f"({Path(name).name})" in TEXTS["docs/README.md"]


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory):
    """Local directories by the names on the hub."""
    path = tmp_path_factory.mktemp("stand-ins")
    return {HUB_MODEL: recipe_stand_ins.write_model(path / "model"), **recipe_stand_ins.write_datasets(path)}


@pytest.fixture
def run_block(stand_ins, tmp_path, monkeypatch):
    """A function that executes a block, of which only the hub's names are replaced, and returns its variables."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("oblr_trl.oblrpo_config.OBLRPOConfig", SmallConfig)

    def run(block):
        for name, directory in stand_ins.items():
            block = block.replace(f'"{name}"', f'"{directory}"')
        variables = {"__name__": "__main__"}
        exec(compile(block, "block", "exec"), variables)
        return variables

    return run


@pytest.mark.slow
@pytest.mark.parametrize("name", BLOCKS)
def test_every_python_block_runs(run_block, name):
    run_block(BLOCKS[name])


@pytest.mark.slow
def test_the_first_block_trains_on_16_prompts_per_step(run_block):
    trainer = run_block(BLOCKS["README.md-0"])["trainer"]

    # One process: 8 rows per batch x 16 batches / 8 completions of a prompt.
    assert (trainer.args.prompts_per_step, trainer.args.num_generations) == (16, 8)
    assert trainer.state.global_step == 1
    assert "gradient_snr/rho" in trainer.state.log_history[0]


@pytest.mark.slow
def test_the_block_of_scores_gives_sketches_of_the_exact_norms(run_block):
    variables = run_block(BLOCKS["README.md-1"])

    assert variables["sketches"].shape == (2, 4096)
    # 4096 numbers keep a squared norm to a few percent; the two completions differ in theirs by far more.
    torch.testing.assert_close(
        variables["sketches"].square().sum(dim=1), variables["squared_norms"], rtol=0.2, atol=0.0
    )


@pytest.mark.parametrize("name", TEXTS)
def test_every_dotted_name_of_the_package_exists(name):
    for found in set(re.findall(r"\boblr_trl(?:\.\w+)+", TEXTS[name])):
        pkgutil.resolve_name(found)


def test_dir_lists_the_public_names_and_each_is_there():
    assert set(oblr_trl.__all__) <= set(dir(oblr_trl))
    assert {"OBLRPOConfig", "OBLRPOTrainer"} <= set(dir(oblr_trl))
    for name in oblr_trl.__all__:
        assert getattr(oblr_trl, name)
