"""The start model: its tokenizer, its size, its accuracy's bounds, and the same weights for the same settings."""

import json

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples.tiny_qwen3 import start_model
from examples.tiny_qwen3.model import build_model, build_tokenizer
from examples.tiny_qwen3.start_model import StartModelArguments, main, make_start_model, supervised_set
from oblr_trl.data.prompt_sets import DataArguments, load_prompts
from tests import recipe_stand_ins

QUICK = {"max_steps": 3, "batch_size": 8, "test_size": 16, "min_accuracy": 0.0, "max_accuracy": 1.0}


def make(path, **settings):
    return make_start_model(StartModelArguments(output_dir=str(path), **(QUICK | settings)))


def make_by_command(path, *arguments):
    return main([*recipe_stand_ins.flags({"output_dir": path} | QUICK), *arguments])


def load_sums(**sizes):
    return load_prompts(DataArguments(task=start_model.TASK, task_params=start_model.TASK_PARAMS, **sizes))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    path = tmp_path_factory.mktemp("cache") / "model"
    return path, make(path)


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(load_sums(train_size=256)["train"]["prompt"][:])


def test_the_tokenizer_gives_back_every_printable_text(tokenizer):
    printable = "".join(map(chr, range(32, 127))) + "\n"
    question = load_sums(train_size=1)["train"]["prompt"][0]

    for text in (question, printable, " 12 + 345 - 6 =", "unseen  words, here!"):
        ids = tokenizer(text).input_ids
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids) == text


def test_the_tokenizer_keeps_digits_apart_on_request_letters_too_and_words_of_the_question_whole(tokenizer):
    of_letters = build_tokenizer(["Spell this word backward: neon"] * 8, letters_apart=True)

    assert tokenizer.tokenize(" 12 - 345 =") == [" ", "1", "2", " -", " ", "3", "4", "5", " ="]
    assert len(tokenizer.tokenize("State the final answer to the following arithmetic problem:")) == 9
    assert of_letters.tokenize("neon") == list("neon")


def test_the_tokenizer_pads_on_the_left_and_marks_what_it_does_not_know(tokenizer):
    batch = tokenizer(["1", "123"], padding=True)

    assert batch["attention_mask"] == [[0, 0, 1], [1, 1, 1]]
    assert batch["input_ids"][0][:2] == [tokenizer.pad_token_id] * 2
    assert tokenizer("é").input_ids == [tokenizer.unk_token_id]
    assert len({tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id}) == 4


def test_the_model_is_a_qwen3_of_at_most_a_million_parameters(tokenizer):
    model = build_model(tokenizer)

    assert model.config.model_type == "qwen3"
    assert model.num_parameters() <= 1_000_000
    assert model.config.head_dim >= 32  # the minimum of vLLM's attention
    assert (model.config.pad_token_id, model.config.eos_token_id) == (tokenizer.pad_token_id, tokenizer.eos_token_id)
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id  # or completions would never end


def test_the_wanted_fraction_of_supervised_answers_is_off_by_one_to_nine():
    solved = Dataset.from_dict({"prompt": [f"{n} =" for n in range(4000)], "solution": [str(n) for n in range(4000)]})

    off = [int(row["completion"]) - n for n, row in enumerate(supervised_set(solved, wrong_answers=0.3, seed=0))]

    # 1200 wrong answers expected with a standard deviation of sqrt(4000 * 0.3 * 0.7) = 29.
    assert abs(sum(error != 0 for error in off) - 1200) < 4 * 29
    assert {abs(error) for error in off} == set(range(10))
    assert supervised_set(solved, wrong_answers=0.0, seed=0)["completion"][:] == solved["solution"][:]


def test_harder_prompts_have_more_wrong_answers():
    easy, hard = ([f"{digit} * {n} =" for n in range(4000)] for digit in (13, 29))
    solved = Dataset.from_dict({"prompt": easy + hard, "solution": [str(n) for n in range(8000)]})

    completions = supervised_set(solved, 0.0, seed=0, hardest_wrong_answers=0.6)["completion"]

    off = [completion != solution for completion, solution in zip(completions, solved["solution"], strict=True)]
    for rows, fraction in ((off[:4000], 0.2), (off[4000:], 0.6)):  # a third of the way, and all of it
        assert abs(sum(rows) - 4000 * fraction) < 4 * (4000 * fraction * (1 - fraction)) ** 0.5


def test_wrong_words_and_lists_differ_from_the_right_ones_in_one_character_of_the_same_kind():
    solutions = ["noen", "['75.0', '9.0']", "-4.7"] * 50
    prompts = Dataset.from_dict({"prompt": [""] * len(solutions), "solution": solutions})

    for right, wrong in zip(solutions, supervised_set(prompts, 1.0, seed=0)["completion"], strict=True):
        (index,) = [i for i, pair in enumerate(zip(right, wrong, strict=True)) if pair[0] != pair[1]]
        assert right[index].isalnum()
        assert (right[index].isdecimal(), right[index].isalpha()) == (wrong[index].isdecimal(), wrong[index].isalpha())


@pytest.mark.slow
def test_another_task_and_size_are_taught_from_the_command_line(tmp_path):
    task = ["--task", "spell_backward", "--task_params", '{"min_word_len": 3, "max_word_len": 4}', "--letters_apart"]

    record = make_by_command(tmp_path / "m", *task, "--hidden_size", "64", "--num_hidden_layers", "1")

    assert record["settings"]["task_params"] == {"min_word_len": 3, "max_word_len": 4}
    config = AutoModelForCausalLM.from_pretrained(tmp_path / "m").config
    assert (config.hidden_size, config.num_hidden_layers, config.num_key_value_heads) == (64, 1, 1)


def test_wrong_options_are_refused_by_name():
    with pytest.raises(ValueError, match=r"`hidden_size` is 96.*multiple of 64"):
        StartModelArguments(hidden_size=96)
    with pytest.raises(ValueError, match=r"--max_step"):
        main(["--max_step", "3"])  # not taken for an abbreviation


@pytest.mark.slow
def test_the_model_loads_with_its_tokenizer_and_the_record_says_how_it_was_made(made):
    path, record = made

    model, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)

    assert model.num_parameters() == record["num_parameters"] <= 1_000_000
    assert len(tokenizer) == model.config.vocab_size
    assert tokenizer.padding_side == "left"
    assert json.loads((path / start_model.RECORD).read_text()) == record
    assert record["settings"]["max_steps"] == 3
    assert 0.0 <= record["accuracy"] <= 1.0
    assert [entry.name for entry in path.parent.iterdir()] == ["model"]  # nothing temporary is left


@pytest.mark.slow
def test_the_same_settings_give_the_same_weights_and_another_seed_gives_others(made, tmp_path):
    torch.manual_seed(11)  # the state that earlier code left behind must not matter
    for seed in (0, 1):
        make(tmp_path / str(seed), seed=seed)

    first, *others = ((path / "model.safetensors").read_bytes() for path in (made[0], tmp_path / "0", tmp_path / "1"))
    assert [other == first for other in others] == [True, False]


@pytest.mark.slow
def test_a_complete_model_of_the_same_settings_is_kept_and_of_others_is_made_again(made, tmp_path, capsys):
    path, record = made
    stamp = (path / "model.safetensors").stat().st_mtime_ns

    assert make_by_command(path) == record
    assert (path / "model.safetensors").stat().st_mtime_ns == stamp
    assert f"{record['accuracy']:.3f} of 16 held-out problems right" in capsys.readouterr().out

    other, again = make(tmp_path / "m"), make_by_command(tmp_path / "m", "--max_steps", "2")
    assert (other["settings"]["max_steps"], again["settings"]["max_steps"]) == (3, 2)
    assert json.loads((tmp_path / "m" / start_model.RECORD).read_text()) == again


@pytest.mark.slow
def test_an_accuracy_out_of_bounds_is_an_error_and_leaves_nothing_behind(tmp_path):
    message = r"answers 0\.\d+ of the held-out problems, outside of \[0.9, 1.0\]: change `max"
    with pytest.raises(ValueError, match=message):
        make(tmp_path / "m", min_accuracy=0.9)

    assert list(tmp_path.iterdir()) == []
