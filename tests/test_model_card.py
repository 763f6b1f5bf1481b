"""The card of a trained model: names what was in use, claims nothing that was not, and stays TRL's otherwise."""

import re
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from trl import GRPOConfig, GRPOTrainer

from oblr_trl import OBLRPOConfig, OBLRPOTrainer, __version__
from oblr_trl.model_card import PAPER_TITLE, PAPER_TITLE_2026, training_details
from tests.tiny_models import tiny_model, train

CITATION = yaml.safe_load((Path(__file__).parent.parent / "CITATION.cff").read_text())
PLAIN_GRPO = {"baseline": "group_mean", "lr_adaptation": "none"}


def settings(text):
    """The table of settings, by name."""
    section = text.split("### Method settings\n", 1)[1].split("\n###", 1)[0]
    rows = re.findall(r"^\| ([^|]+) \| ([^|]+) \|$", section, flags=re.MULTILINE)
    assert rows[:2] == [("Setting", "Value"), ("---", "---")]
    return dict(rows[2:])


def config(tmp_path, **options):
    batch = {"gradient_accumulation_steps": 16}  # of one prompt each
    return OBLRPOConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none", **(batch | options))


def described(tmp_path, prior_strength=16.0, **options):
    """The settings in the card of a run that has not started."""
    return settings(training_details(config(tmp_path, **options), None, prior_strength))


def test_a_checkpoint_comes_with_a_card_that_names_every_setting(tmp_path):
    trainer = train(OBLRPOTrainer, OBLRPOConfig, tmp_path, save_strategy="steps", save_steps=3)
    assert settings((tmp_path / "README.md").read_text()) == {
        "Baseline": "`gradient_weighted`: mean of rewards weighted by squared score norms, OBLR-PO's",
        "Leave-one-out": "yes",
        "Prior strength": f"automatic, last chosen: {trainer._baseline_estimator.prior_strength:g}",
        "Score scope": "`all`",
        "Scores": "`sketch`: norms of sketches of length 4096",
        "Learning-rate adaptation": "`snr`: schedule x rho, rho clamped to [0.05, 1]; signal and noise smoothed with EMA "
        "decay 0.9",
        "Initial learning rate": "0.001",  # not the last step's, which the schedule and rho have lowered
        "Optimizer": "`AdamW`",
        "Loss": "`dr_grpo`, reward scaling `none`, KL coefficient 0",
        "Rollouts": "N = 4 prompts x G = 8 completions per optimizer step; 4 prompts per generated batch; "
        "`num_iterations` 1",
        "Generation": "transformers, no vLLM",
    }


def test_the_card_cites_the_paper_under_both_titles_and_this_project(tmp_path):
    trainer = train(OBLRPOTrainer, OBLRPOConfig, tmp_path, max_steps=1)
    trainer.create_model_card(model_name="tiny", dataset_name="sums", tags="arithmetic")
    card = ModelCard.load(tmp_path / "README.md")
    assert f"This model was trained with OBLR-PO, a method introduced in [{PAPER_TITLE}]" in card.text
    assert "https://huggingface.co/papers/2511.23310" in card.text
    assert f"The paper was re-titled in 2026: *{PAPER_TITLE_2026}*" in card.text
    entries = re.findall(r"```bibtex\n(.+?)\n```", card.text, flags=re.DOTALL)
    assert [entry.split(",", 1)[0] for entry in entries] == [
        "@article{huang2025oblrpo",
        "@software{vonwerra2020trl",
        "@software{oblr_trl",
    ]
    assert all(entry.count("{") == entry.count("}") for entry in entries)
    assert PAPER_TITLE in entries[0]
    assert PAPER_TITLE_2026 in entries[0]
    assert f"version = {{{__version__}}}" in entries[2]
    assert f"title   = {{{{{CITATION['title']}}}}}" in entries[2]


def test_titles_and_version_are_those_of_the_citation_file():
    assert CITATION["preferred-citation"]["title"] == PAPER_TITLE
    assert PAPER_TITLE_2026 in CITATION["preferred-citation"]["notes"]
    assert str(CITATION["version"]) == __version__


def test_all_that_trl_writes_is_kept(tmp_path):
    """A run with GRPO's settings has the card of `GRPOTrainer`, to the letter, but for one section, one citation and a tag."""
    options = {"loss_type": "dapo", "scale_rewards": "group", "max_steps": 1}
    grpo = train(GRPOTrainer, GRPOConfig, tmp_path / "grpo", **options)
    ours = train(OBLRPOTrainer, OBLRPOConfig, tmp_path / "ours", **PLAIN_GRPO, **options)
    for trainer in (grpo, ours):
        trainer.create_model_card(model_name="tiny", dataset_name="sums", tags=["arithmetic"])
    theirs = ModelCard.load(tmp_path / "grpo" / "README.md")
    card = ModelCard.load(tmp_path / "ours" / "README.md")
    assert set(card.data.tags) == {*theirs.data.tags, "oblr_trl"}
    assert card.data.to_dict() | {"tags": None} == theirs.data.to_dict() | {"tags": None}
    before, section, after = re.split(r"(?=### Method settings)|(?=### Framework versions)", card.text)
    assert section.startswith("### Method settings")
    assert (before + after).split("\nCite oblr_trl as:")[0].rstrip() == theirs.text.rstrip()


def test_a_card_that_is_written_again_has_each_section_once(tmp_path):
    trainer = train(OBLRPOTrainer, OBLRPOConfig, tmp_path, max_steps=2, save_strategy="steps", save_steps=1)
    saved_with_the_checkpoint = (tmp_path / "README.md").read_text()
    trainer.create_model_card(model_name=tmp_path.name)
    card = (tmp_path / "README.md").read_text()
    # TRL keeps the tags in a set, so their order may differ
    assert sorted(card.splitlines()) == sorted(saved_with_the_checkpoint.splitlines())
    assert card.count("### Method settings") == card.count("@software{oblr_trl") == 1


@pytest.mark.parametrize(
    ("baseline", "name", "paper"),
    [
        ("group_mean", "GRPO", "2402.03300"),
        ("leave_one_out", "RLOO", "2402.14740"),
        ("length_weighted", "OPO", "2505.23585"),
    ],
)
def test_a_run_without_baseline_and_learning_rate_of_the_paper_does_not_claim_it(tmp_path, baseline, name, paper):
    trainer = train(OBLRPOTrainer, OBLRPOConfig, tmp_path, baseline=baseline, lr_adaptation="none", max_steps=1)
    trainer.create_model_card(model_name="tiny")
    card = ModelCard.load(tmp_path / "README.md")
    assert f"This model was trained with {name}, a method introduced in" in card.text
    assert f"https://huggingface.co/papers/{paper}" in card.text
    assert set(card.data.tags) == {"generated_from_trainer", "trl", name.lower(), "oblr_trl"}
    method = card.text.split("Cite oblr_trl as:")[0]  # the package itself has the name in its title
    for claim in ("OBLR-PO", "oblr-po", "2511.23310", PAPER_TITLE_2026, "score", "sketch", "prior", "rho", "EMA"):
        assert claim not in method, claim
    values = settings(card.text)
    assert values["Baseline"].startswith(f"`{baseline}`: ")
    assert values["Leave-one-out"] == ("no" if baseline == "group_mean" else "yes")
    assert values["Learning-rate adaptation"] == "none"


def test_half_of_the_method_is_called_half(tmp_path):
    for options, expected in (
        ({"baseline": "leave_one_out"}, "Of OBLR-PO only the learning rate is in use, not the baseline."),
        ({"lr_adaptation": "none"}, "Of OBLR-PO only the baseline is in use, not the learning rate."),
    ):
        trainer = train(OBLRPOTrainer, OBLRPOConfig, tmp_path, max_steps=1, **options)
        trainer.create_model_card(model_name="tiny")
        card = (tmp_path / "README.md").read_text()
        assert "This model was trained with OBLR-PO" in card
        assert expected in card
    assert "only" not in training_details(config(tmp_path), None, 16.0)


def test_every_choice_shows(tmp_path):
    exact = described(tmp_path, score_method="exact", score_scope="last_k", score_last_k=2, score_sketch_dim=512)
    assert exact["Scores"] == "`exact`: exact norms; sketches of length 512 for signal and noise"
    assert exact["Score scope"] == "`last_k`, 2 blocks"
    assert (
        described(tmp_path, baseline="group_mean")["Scores"] == "sketches of length 4096, for the learning rate alone"
    )
    assert described(tmp_path, baseline_leave_one_out=False)["Leave-one-out"] == "no"
    fixed = described(tmp_path, 0.5, baseline_prior_strength=0.5)
    assert fixed["Prior strength"] == "0.5"
    assert described(tmp_path, float("inf"))["Prior strength"] == "automatic, last chosen: infinite"
    adapted = described(
        tmp_path, snr_ema_decay=0.0, snr_min_multiplier=0.0, snr_max_multiplier=2.0, learning_rate=5e-6
    )
    assert "rho clamped to [0, 2]; signal and noise smoothed with EMA decay 0" in adapted["Learning-rate adaptation"]
    assert adapted["Initial learning rate"] == "5e-06"
    assert described(tmp_path, optim="adafactor")["Optimizer"] == "`adafactor`"
    vllm = described(tmp_path, use_vllm=True, vllm_mode="server")
    assert vllm["Generation"] == "vLLM, mode `server`"
    # 4 rows x 12 micro-batches = 48 completions = 6 prompts x 8, trained on in steps of 4 x 6 = 3 x 8
    rollouts = described(
        tmp_path,
        num_generations=8,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=6,
        steps_per_generation=12,
        num_iterations=3,
        beta=0.04,
    )
    assert rollouts["Rollouts"] == (
        "N = 3 prompts x G = 8 completions per optimizer step; 6 prompts per generated batch; `num_iterations` 3"
    )
    assert rollouts["Loss"] == "`dr_grpo`, reward scaling `none`, KL coefficient 0.04"


def test_an_optimizer_of_the_users_own_is_the_one_named(tmp_path):
    """`optim` and `learning_rate` of the configuration are without effect then, and not shown."""
    model = tiny_model(num_layers=2)
    head, others = [*model.lm_head.parameters()], [*model.model.parameters()][1:]  # the embedding is tied to the head
    optimizer = torch.optim.SGD([{"params": head, "lr": 0.25}, {"params": others}], lr=0.5)
    trainer = train(OBLRPOTrainer, OBLRPOConfig, tmp_path, model=model, optimizers=(optimizer, None), max_steps=2)
    trainer.create_model_card(model_name="tiny")
    values = settings((tmp_path / "README.md").read_text())
    assert values["Optimizer"] == "`SGD`"
    assert values["Initial learning rate"] == "0.25, 0.5"
