"""wandb, tensorboard and trackio, the real packages without a network: what a user sees there is what was trained on."""

import dataclasses
import json
import math
import os
import re
import socket
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pandas
import pytest
import wandb
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from trl import GRPOConfig

from oblr_trl import OBLRPOConfig
from oblr_trl.metrics import METRICS
from tests.test_trainer import Recording
from tests.tiny_models import train

ROOT = Path(__file__).parent.parent
DOCUMENT = (ROOT / "docs" / "wandb_report.md").read_text()
NUM_STEPS = 3
# TRL's names that the report uses beside ours
TRL_METRICS = ("reward", "reward_std", "frac_reward_zero_std", "learning_rate", "loss", "grad_norm", "step_time")


def no_reward(completions, **kwargs):
    """None for all: nothing is known of baseline, variance and SNR."""
    return [None] * len(completions)


class Tripwire:
    """A local server that counts who calls; while it listens, it is the only way out that a well-behaved client knows."""

    def __init__(self, monkeypatch):
        self._server = socket.create_server(("127.0.0.1", 0))
        self.num_calls = 0
        threading.Thread(target=self._listen, daemon=True).start()
        url = f"http://127.0.0.1:{self._server.getsockname()[1]}"
        for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
            monkeypatch.setenv(name, url)
        for name in ("NO_PROXY", "no_proxy"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("WANDB_BASE_URL", url)

    def _listen(self):
        while True:
            try:
                connection, _ = self._server.accept()
            except OSError:  # closed
                return
            self.num_calls += 1
            connection.close()

    def call(self):
        socket.create_connection(self._server.getsockname()).close()

    def close(self):
        self._server.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """Trains once per reward with all reporters that are installed, and hands out what lies on the disk afterwards."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        folder = tmp_path_factory.mktemp("reporting")
        for name in ("WANDB_DIR", "WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
            (folder / name).mkdir()
            monkeypatch.setenv(name, str(folder / name))
        for name, value in (("MODE", "offline"), ("SILENT", "true"), ("CONSOLE", "off"), ("DISABLE_GIT", "true")):
            monkeypatch.setenv(f"WANDB_{name}", value)
        tripwire = Tripwire(monkeypatch)
        wandb.teardown()  # a service of another test would have other settings
        yield SimpleNamespace(
            rewarded=run(folder, "rewarded"),
            # an infinite strength is the one number that is not finite and yet known
            unknown=run(folder, "unknown", reward=no_reward, baseline_prior_strength=math.inf),
            tripwire=tripwire,
        )
        wandb.teardown()
        tripwire.close()


def run(folder, name, **options):
    trainer = train(
        Recording,
        OBLRPOConfig,
        folder / name,
        report_to=["wandb", "tensorboard"],
        run_name=name,
        project=name,
        max_steps=NUM_STEPS,
        log_completions=True,
        **options,
    )
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
    """The completions tables by step: the last one logged for each."""
    found = {}
    for row in run.history:
        if row.get("completions._type") == "table-file":
            table = json.loads((run.files / row["completions.path"]).read_text())
            found[row["train/global_step"]] = pandas.DataFrame(table["data"], columns=table["columns"])
    assert list(found) == list(range(1, NUM_STEPS + 1))
    return list(found.values())


def test_every_metric_of_the_readme_arrives_in_wandb_as_it_was_logged(report):
    for name in METRICS:
        values = in_wandb(report.rewarded, name)
        assert values == pytest.approx([row[name] for row in step_logs(report.rewarded.trainer)], rel=1e-12), name
        if name != "baseline/prior_strength":  # which may choose one baseline for the whole batch
            assert all(math.isfinite(value) for value in values), name
    clamped = [min(max(ratio, 0.05), 1.0) for ratio in in_wandb(report.rewarded, "gradient_snr/rho")]
    assert in_wandb(report.rewarded, "lr_multiplier") == clamped


def test_all_else_that_the_trainer_logs_arrives_too(report):
    for name in step_logs(report.rewarded.trainer)[0]:
        if name not in ("step", "epoch"):
            assert len(in_wandb(report.rewarded, name)) == NUM_STEPS
    assert set(TRL_METRICS) < set(step_logs(report.rewarded.trainer)[0])


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
        assert table["advantage"].tolist() == pytest.approx(batch["advantages"].tolist(), rel=1e-6)
        assert table["digit_reward"].tolist() == pytest.approx(rewards.flatten().tolist())
        of_trl = (rewards - rewards.mean(dim=1, keepdim=True)).flatten()
        assert abs(table["advantage"].to_numpy() - of_trl.numpy()).max() > 1e-3
        assert len(table["completion"]) == len(table["prompt"]) == rewards.numel()


def test_what_is_unknown_is_null_in_wandb_and_an_infinite_strength_is_infinite(report):
    known = {"score/pass_time", "lr_multiplier", "baseline/prior_strength", "gradient_snr/num_prompts"}
    for name in METRICS:
        values = in_wandb(report.unknown, name)
        if name == "baseline/prior_strength":
            assert values == [math.inf] * NUM_STEPS
        elif name in known:
            assert all(math.isfinite(value) for value in values), name
        else:
            assert values == [None] * NUM_STEPS, name
    for table in tables(report.unknown):
        assert table["advantage"].tolist() == [0.0] * 32
        assert table["no_reward"].isna().all()


def test_the_runs_ended_well_and_nothing_was_sent(report):
    for run_ in (report.rewarded, report.unknown):
        assert [record["exit"].get("exit_code", 0) for record in run_.records if record["type"] == "exit"] == [0]
    assert report.tripwire.num_calls == 0
    report.tripwire.call()  # it does count
    for _ in range(100):
        if report.tripwire.num_calls:
            break
        threading.Event().wait(0.01)
    assert report.tripwire.num_calls == 1
    report.tripwire.num_calls = 0


def scalars(run):
    (folder,) = (Path(run.trainer.args.output_dir) / "runs").iterdir()
    events = EventAccumulator(str(folder)).Reload()
    return {
        name: {event.step: event.value for event in events.Scalars(name)} for name in events.Tags()["scalars"]
    }, events


def test_every_metric_of_the_readme_arrives_in_tensorboard(report):
    found, events = scalars(report.rewarded)
    for name in (*METRICS, *TRL_METRICS):
        expected = {row["step"]: row[name] for row in step_logs(report.rewarded.trainer)}
        assert found[f"train/{name}"] == pytest.approx(expected, rel=1e-6), name  # float32 there
    text = events.Tensors("args/text_summary")[0].tensor_proto.string_val[0].decode()
    assert json.loads(text)["baseline"] == "gradient_weighted"


def test_what_is_unknown_is_missing_in_tensorboard(report):
    found, _ = scalars(report.unknown)
    known = {"score/pass_time", "lr_multiplier", "baseline/prior_strength", "gradient_snr/num_prompts"}
    assert {name for name in METRICS if f"train/{name}" in found} == known
    assert list(found["train/baseline/prior_strength"].values()) == [math.inf] * NUM_STEPS


# In a process of its own: trackio reads its folder's name once, when TRL imports it.
TRACKED = """
import json, math, socket, sys
from trackio.sqlite_storage import SQLiteStorage
from oblr_trl import OBLRPOConfig, OBLRPOTrainer
from tests.tiny_models import digit_reward, train

calls = []
connect = socket.socket.connect
def watched(self, address):
    if self.family != socket.AF_UNIX:
        calls.append(address)
    return connect(self, address)
socket.socket.connect = watched

def no_reward(completions, **kwargs):
    return [None] * len(completions)

found = {}
for name, options in (
    ("rewarded", {"reward": digit_reward}),
    ("unknown", {"reward": no_reward, "baseline_prior_strength": math.inf}),
):
    reporting = {"report_to": ["trackio"], "project": name, "run_name": name, "log_completions": True}
    trainer = train(OBLRPOTrainer, OBLRPOConfig, f"{sys.argv[1]}/{name}", **reporting, **options)
    rows = [{k: v for k, v in row.items() if k != "timestamp"} for row in SQLiteStorage.get_logs(name, name)]
    config = SQLiteStorage.get_run_config(name, name)
    found[name] = {"logged": trainer.state.log_history, "rows": rows, "config": config, "calls": calls}
with open(f"{sys.argv[1]}/found.json", "w") as f:
    json.dump(found, f)
"""


@pytest.mark.slow
def test_every_metric_of_the_readme_arrives_in_trackio(tmp_path):
    environment = os.environ | {"TRACKIO_DIR": str(tmp_path / "trackio")}
    subprocess.run([sys.executable, "-c", TRACKED, str(tmp_path)], check=True, env=environment, cwd=ROOT)
    found = json.loads((tmp_path / "found.json").read_text())
    for name, run_ in found.items():
        assert run_["calls"] == []
        assert run_["config"]["baseline"] == "gradient_weighted"
        logged = [row for row in run_["logged"] if "loss" in row]
        arrived = [row for row in run_["rows"] if "train/loss" in row]
        assert len(arrived) == NUM_STEPS
        for metric in (*METRICS, *TRL_METRICS):
            assert [row[f"train/{metric}"] for row in arrived] == [row[metric] for row in logged], metric
        if name == "unknown":
            assert arrived[0]["train/baseline/prior_strength"] == math.inf
            assert arrived[0]["train/gradient_snr/rho"] is None
        tables = [row["completions"] for row in run_["rows"] if "completions" in row]
        assert {record["step"] for table in tables for record in table["_value"]} == {1, 2, 3}
        assert "advantage" in tables[0]["_value"][0]


# --- the description of the report --------------------------------------------------------------------------------------


def panels():
    rows = re.findall(r"^\| (\d+) \| ([^|]+) \| ([^|]+) \| ([^|]+) \| ([^|]+) \|$", DOCUMENT, flags=re.MULTILINE)
    return {title: (kind, re.findall(r"`([^`]+)`", keys), axis) for _, title, kind, keys, axis in rows}


def test_the_report_shows_every_metric_and_nothing_that_is_not_logged(report):
    described = [key for _, keys, _ in panels().values() for key in keys]
    logged = {key.removesuffix("._type") for row in report.rewarded.history for key in row}  # as that of the table
    assert not [key for key in described if key not in logged]
    assert {f"train/{name}" for name in METRICS} <= set(described)
    assert {"train/reward", "completions"} <= set(described)
    assert len(described) == len(set(described))


def test_its_expressions_choose_what_they_say(report):
    logged = {key for row in report.rewarded.history for key in row}
    listed = re.findall(r"^\| `(\^[^`]+)` \| ([^|]+) \|$", DOCUMENT, flags=re.MULTILINE)
    assert len(listed) == 3
    for expression, keys in listed:
        expression = expression.replace(r"\|", "|")  # a bar in a table of Markdown
        assert sorted(key for key in logged if re.search(expression, key)) == sorted(re.findall(r"`([^`]+)`", keys))


def test_its_commands_exist():
    commands = re.findall(r"^wandb ([a-z ]+[a-z])", DOCUMENT, flags=re.MULTILINE)
    assert commands == ["sync", "leet inspect"]
    for command in commands:
        subprocess.run([sys.executable, "-m", "wandb", *command.split(), "--help"], check=True, capture_output=True)
