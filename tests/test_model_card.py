"""The card of a trained model: names what was in use, claims nothing that was not, and stays TRL's otherwise."""

import re
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard
from trl import GRPOConfig, GRPOTrainer

from oblr_trl import OBLRPOConfig, OBLRPOTrainer, __version__
from tests.tiny_models import train

CITATION = yaml.safe_load((Path(__file__).parent.parent / "CITATION.cff").read_text())


def settings(text):
    """The table of settings, by name."""
    section = text.split("### Method settings\n", 1)[1].split("\n###", 1)[0]
    rows = re.findall(r"^\| ([^|]+) \| ([^|]+) \|$", section, flags=re.MULTILINE)
    assert rows[:2] == [("Setting", "Value"), ("---", "---")]
    return {name.strip("`"): value.strip("`") for name, value in rows[2:]}


def card_of(trainer, folder):
    trainer.create_model_card(model_name="tiny", dataset_name="sums", tags=["arithmetic"])
    return ModelCard.load(folder / "README.md")


def test_a_checkpoint_comes_with_a_card_that_names_every_setting_once(tmp_path):
    trainer = train(OBLRPOTrainer, OBLRPOConfig, tmp_path, max_steps=2, save_strategy="steps", save_steps=1)
    card = (tmp_path / "README.md").read_text()
    values = settings(card)
    theirs = vars(GRPOConfig("x", use_cpu=True, bf16=False))
    own = {name for name in vars(trainer.args) if name not in theirs and not name.startswith("_")}
    assert own < set(values)
    assert values["baseline"] == "gradient_weighted"
    assert values["prior strength, last"] == f"{trainer._baseline_estimator.prior_strength:g}"
    assert values["initial learning rate"] == "0.001"  # not the last step's, which the schedule and rho have lowered
    assert values["prompts x completions per optimizer step"] == "4 x 8"
    assert card.count("### Method settings") == 1
    assert "not the authors' code" in card
    assert "Not in use" not in card


def test_the_card_cites_the_paper_under_both_titles(tmp_path):
    text = card_of(train(OBLRPOTrainer, OBLRPOConfig, tmp_path, max_steps=1), tmp_path).text
    paper = CITATION["preferred-citation"]
    assert f"This model was trained with OBLR-PO, a method introduced in [{paper['title']}]" in text
    assert "https://huggingface.co/papers/2511.23310" in text
    entries = [" ".join(entry.split()) for entry in re.findall(r"```bibtex\n(.+?)\n```", text, flags=re.DOTALL)]
    assert [entry.split(",", 1)[0] for entry in entries] == ["@article{huang2025oblrpo", "@software{vonwerra2020trl"]
    assert all(entry.count("{") == entry.count("}") for entry in entries)
    (later_title,) = re.findall(r"Re-titled in 2026: ([^}]+)}", entries[0])
    assert later_title in paper["notes"]
    assert str(CITATION["version"]) == __version__


def test_all_that_trl_writes_is_kept(tmp_path):
    grpo = train(GRPOTrainer, GRPOConfig, tmp_path / "grpo", loss_type="dapo", scale_rewards="group", max_steps=1)
    ours = train(OBLRPOTrainer, OBLRPOConfig, tmp_path / "ours", max_steps=1)
    theirs, card = card_of(grpo, tmp_path / "grpo"), card_of(ours, tmp_path / "ours")
    assert card.data.to_dict() | {"tags": None} == theirs.data.to_dict() | {"tags": None}
    before, section, after = re.split(r"(?=### Method settings)|(?=### Framework versions)", card.text)
    assert section.startswith("### Method settings")
    headings = re.findall(r"^#+ .*$", theirs.text, flags=re.MULTILINE)
    ours_renamed = [
        heading.replace("OBLR-PO", "GRPO") for heading in re.findall(r"^#+ .*$", before + after, re.MULTILINE)
    ]
    assert ours_renamed == headings


@pytest.mark.parametrize(
    ("options", "unused"),
    [
        ({"baseline": "leave_one_out"}, "the baseline"),
        ({"lr_adaptation": "none"}, "the learning rate"),
        ({"baseline": "group_mean", "lr_adaptation": "none"}, "the baseline and the learning rate"),
    ],
)
def test_what_is_not_in_use_of_the_method_is_said(tmp_path, options, unused):
    card = card_of(train(OBLRPOTrainer, OBLRPOConfig, tmp_path, max_steps=1, **options), tmp_path)
    assert f"Not in use of OBLR-PO: {unused}." in card.text
    assert settings(card.text)["baseline"] == options.get("baseline", "gradient_weighted")
