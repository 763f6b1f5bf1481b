"""wandb and tensorboard, the real packages without a network: what a user sees there is what was trained on."""

import dataclasses
import json
import math
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import wandb
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from trl import GRPOConfig

from oblr_trl import OBLRPOConfig
from oblr_trl.metrics import CORRELATION, ENTROPY, KL_TARGET, METRICS
from tests.recording import Recording
from tests.tiny_models import OF_LAST_STEP, train

ROOT = Path(__file__).parent.parent
DOCUMENT = (ROOT / "docs" / "wandb_report.md").read_text()
NUM_STEPS = 3
# TRL's names that the report uses in addition to ours
WITHOUT_TRUST_REGION = [name for name in METRICS if name not in (CORRELATION, ENTROPY, KL_TARGET, *OF_LAST_STEP)]
TRL_METRICS = ("reward", "reward_std", "frac_reward_zero_std", "learning_rate", "loss", "grad_norm", "step_time")
# Those that are known although no completion was scored
KNOWN = {"score/pass_time", "score/fraction", "lr_multiplier", "gradient_snr/num_prompts"}
KNOWN |= {"baseline/prior_strength", "baseline/memory_strength", "baseline/remembered_fraction"}


def no_reward(completions, **kwargs):
    """None for all: nothing is known of baseline, variance and SNR."""
    return [None] * len(completions)


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """Trains once per reward with all reporters that are installed, and hands out what lies on the disk afterwards."""
    folder = tmp_path_factory.mktemp("reporting")
    with pytest.MonkeyPatch.context() as monkeypatch:
        settings = {"MODE": "offline", "SILENT": "true", "CONSOLE": "off", "DISABLE_GIT": "true"}
        settings |= {name: str(folder / name) for name in ("DIR", "CONFIG_DIR", "CACHE_DIR", "DATA_DIR")}
        for name, value in {f"WANDB_{name}": value for name, value in settings.items()}.items():
            monkeypatch.setenv(name, value)
        (folder / "DIR").mkdir()
        wandb.teardown()  # a service of another test would have other settings
        yield SimpleNamespace(
            rewarded=run(folder, "rewarded", lr_adaptation="trust_region"),
            # an infinite strength is the one number that is not finite and yet known
            unknown=run(folder, "unknown", reward=no_reward, baseline_prior_strength=math.inf),
        )
        wandb.teardown()


def run(folder, name, **options):
    reporting = {"report_to": ["wandb", "tensorboard"], "run_name": name, "project": name, "log_completions": True}
    trainer = train(Recording, OBLRPOConfig, folder / name, max_steps=NUM_STEPS, **reporting, **options)
    files = Path(wandb.run.dir)
    wandb.finish()
    (log,) = files.parent.glob("*.wandb")
    # wandb's own reader of the log that `wandb sync` would upload
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(log)]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    records = [json.loads(line) for line in lines]
    history = [record["history"]["item"] for record in records if record["type"] == "history"]
    config = {}
    for record in records:
        if record["type"] == "config":
            config |= record["config"]["update"]
    return SimpleNamespace(trainer=trainer, files=files, records=records, history=history, config=config)


def step_logs(trainer):
    """What the trainer logged after each step, without its closing summary."""
    return [row for row in trainer.state.log_history if "loss" in row]


def in_wandb(run, name):
    """The values of one metric by step."""
    rows = [row for row in run.history if f"train/{name}" in row]
    assert [row["train/global_step"] for row in rows] == list(range(1, NUM_STEPS + 1)), name
    return [math.inf if row[f"train/{name}"] == "Infinity" else row[f"train/{name}"] for row in rows]


def tables(run):
    """The columns of the completions table of each step: the last one logged for it."""
    found = {}
    for row in run.history:
        if row.get("completions._type") == "table-file":
            table = json.loads((run.files / row["completions.path"]).read_text())
            found[row["train/global_step"]] = dict(
                zip(table["columns"], zip(*table["data"], strict=True), strict=True)
            )
    assert list(found) == list(range(1, NUM_STEPS + 1))
    return list(found.values())


# wandb


def test_every_metric_of_the_readme_arrives_in_wandb_as_it_was_logged(report):
    rows = step_logs(report.rewarded.trainer)
    assert {*METRICS, *TRL_METRICS} < set(rows[0])
    for name in rows[0].keys() - {"step", "epoch"}:
        known = [row for row in rows if row[name] is not None]
        sent = in_wandb(report.rewarded, name)[len(rows) - len(known) :]
        assert sent == pytest.approx([row[name] for row in known], rel=1e-12), name
    for name in set(METRICS) - {"baseline/prior_strength"}:  # which may choose one baseline for the whole batch
        values = in_wandb(report.rewarded, name)
        if name in OF_LAST_STEP:
            assert values.pop(0) is None
        assert all(math.isfinite(value) for value in values), name


def test_wandb_records_the_configuration_with_our_own_options(report):
    inherited = {field.name for field in dataclasses.fields(GRPOConfig)}
    own = [field.name for field in dataclasses.fields(OBLRPOConfig) if field.name not in inherited]
    assert {"baseline", "lr_adaptation", "score_scope", "baseline_prior_strength"} < set(own)
    args = report.rewarded.trainer.args
    for name in (*own, "learning_rate", "loss_type", "scale_rewards", "num_generations", "seed"):
        assert report.rewarded.config[name] == getattr(args, name), name
    assert report.unknown.config["baseline_prior_strength"] in (math.inf, "Infinity")
    assert report.rewarded.config["model_type"] == "qwen3"


def test_the_completions_table_has_the_advantages_that_were_trained_on(report):
    for table, batch in zip(tables(report.rewarded), report.rewarded.trainer.batches, strict=True):
        rewards = batch["rewards"]
        assert table["advantage"] == pytest.approx(batch["advantages"].tolist(), rel=1e-6)
        assert table["digit_reward"] == pytest.approx(rewards.flatten().tolist())
        of_trl = (rewards - rewards.mean(dim=1, keepdim=True)).flatten().tolist()
        assert table["advantage"] != pytest.approx(of_trl, abs=1e-3)
        assert len(table["completion"]) == len(table["prompt"]) == rewards.numel()


def test_what_is_unknown_is_null_in_wandb_and_an_infinite_strength_is_infinite(report):
    for name in WITHOUT_TRUST_REGION:
        values = in_wandb(report.unknown, name)
        if name == "baseline/prior_strength":
            assert values == [math.inf] * NUM_STEPS
        elif name in KNOWN:
            assert all(math.isfinite(value) for value in values), name
        else:
            assert values == [None] * NUM_STEPS, name
    for table in tables(report.unknown):
        assert table["advantage"] == (0.0,) * 32
        assert all(math.isnan(reward) for reward in table["no_reward"])


# tensorboard


def scalars(run):
    (folder,) = (Path(run.trainer.args.output_dir) / "runs").iterdir()
    events = EventAccumulator(str(folder)).Reload()
    return {name: {e.step: e.value for e in events.Scalars(name)} for name in events.Tags()["scalars"]}


def test_every_metric_arrives_in_tensorboard_and_what_is_unknown_is_missing(report):
    found = scalars(report.rewarded)
    for name in (*METRICS, *TRL_METRICS):
        expected = {row["step"]: row[name] for row in step_logs(report.rewarded.trainer) if row[name] is not None}
        assert found[f"train/{name}"] == pytest.approx(expected, rel=1e-6), name  # float32 there
    unknown = scalars(report.unknown)
    assert {name for name in METRICS if f"train/{name}" in unknown} == KNOWN
    assert list(unknown["train/baseline/prior_strength"].values()) == [math.inf] * NUM_STEPS


# The description of the report


def test_the_report_shows_every_metric_and_nothing_that_is_not_logged(report):
    panels = re.findall(r"^\| \d+ \| [^|]+ \| [^|]+ \| ([^|]+) \| [^|]+ \|$", DOCUMENT, flags=re.MULTILINE)
    described = [key for keys in panels for key in re.findall(r"`([^`]+)`", keys)]
    logged = {key.removesuffix("._type") for row in report.rewarded.history for key in row}  # as that of the table
    assert not [key for key in described if key not in logged]
    assert {f"train/{name}" for name in METRICS} | {"train/reward", "completions"} <= set(described)
    assert len(described) == len(set(described))


def test_its_expressions_choose_what_they_say(report):
    logged = {key for row in report.rewarded.history for key in row}
    listed = re.findall(r"^\| `(\^[^`]+)` \| ([^|]+) \|$", DOCUMENT, flags=re.MULTILINE)
    assert len(listed) == 3
    for expression, keys in listed:
        expression = expression.replace(r"\|", "|")  # a bar in a table of Markdown
        assert sorted(key for key in logged if re.search(expression, key)) == sorted(re.findall(r"`([^`]+)`", keys))
