"""Prompt sets: reasoning-gym tasks, local files, directories laid out like hub datasets, and every complaint."""

import json
import sys
from fractions import Fraction

import numpy as np
import pytest
from datasets import Dataset

from oblr_trl.data.prompt_sets import DataArguments, load_prompts
from oblr_trl.data.sources import load_rows
from oblr_trl.data.tasks import decode_entry, encode_entry, make_task, task_entries

SUMS = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}  # 200 distinct questions
ROWS = [{"question": f"{a}+1=", "answer": str(a + 1)} for a in range(10)]
ANSWERED = {"dataset_name": "x", "answer_column": "y"}
MESSAGES = [{"role": "user", "content": "1+1="}]


def load_sums(**arguments):
    settings = {"task": "chain_sum", "task_params": SUMS, "train_size": 64, "test_size": 32}
    return load_prompts(DataArguments(**(settings | arguments)))


@pytest.fixture
def write(tmp_path):
    """A function that writes rows as JSON lines and returns the file's name."""

    def write_jsonl(rows=ROWS, name="rows.jsonl"):
        (tmp_path / name).write_text("\n".join(json.dumps(row) for row in rows))
        return str(tmp_path / name)

    return write_jsonl


def load_train(path, **arguments):
    """The training split of a file, nobody evaluating."""
    return load_prompts(DataArguments(dataset_name=path, **arguments), with_test=False)["train"]


def test_a_task_gives_prompts_answers_and_entries_its_scorer_can_read():
    prompts = load_sums()

    assert {name: len(split) for name, split in prompts.items()} == {"train": 64, "test": 32}
    task = make_task("chain_sum", SUMS, size=1, seed=0)
    for row in prompts["train"]:
        entry = decode_entry(row["entry"])
        assert row["prompt"] == entry["question"]
        assert task.score_answer(row["solution"], entry) == 1.0
        assert task.score_answer(str(int(row["solution"]) + 1), entry) < 1.0


@pytest.mark.parametrize("seeds", [{}, {"train_seed": 5, "test_seed": 9}])  # far apart, and the same candidates
def test_no_test_prompt_of_a_task_is_trained_on_or_repeated(seeds):
    prompts = load_sums(train_size=500, test_size=100, **seeds)  # of 200 questions, so both would be certain to happen

    assert len(prompts["train"]) == 500
    assert len(set(prompts["test"]["prompt"])) == 100
    assert not set(prompts["train"]["prompt"]) & set(prompts["test"]["prompt"])


@pytest.mark.parametrize("source", ["task", "file"])
def test_training_prompts_do_not_depend_on_whether_a_test_set_is_asked_for(source, write):
    of_file = {"dataset_name": write([*ROWS, *ROWS]), "prompt_column": "question", "test_size": 3}
    of_task = {"task": "chain_sum", "task_params": SUMS, "train_size": 64, "test_size": 32}
    arguments = DataArguments(**(of_task if source == "task" else of_file))

    alone = load_prompts(arguments, with_test=False)

    assert list(alone) == ["train"]
    assert alone["train"].to_list() == load_prompts(arguments)["train"].to_list()


def test_seeds_choose_the_prompts_of_a_task():
    first, again, other = load_sums(), load_sums(), load_sums(train_seed=7_000, test_seed=8_000_000)

    assert first["train"].to_list() == again["train"].to_list()
    for split in ("train", "test"):
        assert first[split]["prompt"][:] != other[split]["prompt"][:]


def test_entries_survive_as_text_with_their_tuples_and_number_keys():
    metadata = {"grid": ((1, 2), [3, (4,)]), "costs": {0: 1.5, (1, 2): None}}
    entry = {"question": "q", "answer": "a", "metadata": metadata}

    assert decode_entry(encode_entry(entry)) == entry
    assert decode_entry(encode_entry({"share": Fraction(1, 4), "name": np.str_("A")})) == {"share": "1/4", "name": "A"}


def test_a_task_that_names_no_answer_has_no_solution():
    prompts = load_prompts(DataArguments(task="graph_color", train_size=1, test_size=1))

    assert prompts["train"][0]["solution"] is None


@pytest.mark.parametrize("name", ["rearc", "knights_knaves", "countdown", "gsm_symbolic"])
def test_scorers_give_the_reference_answer_of_a_decoded_entry_full_marks(name):
    # rearc compares tuples: through plain JSON its right answers would score 0.05.
    task = make_task(name, size=5, seed=30)
    for entry in task_entries(
        name, size=5, seed=30
    ):  # of gsm_symbolic the last one has a fraction, which JSON does not
        decoded = decode_entry(encode_entry(entry))
        assert task.score_answer(entry["answer"], decoded) == task.score_answer(entry["answer"], entry) >= 0.99


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".parquet"])
def test_a_local_file_is_read_and_its_columns_are_renamed(tmp_path, write, suffix):
    path = tmp_path / f"rows{suffix}"
    if suffix == ".parquet":
        Dataset.from_list(ROWS).to_parquet(path)
    elif suffix == ".json":
        path.write_text(json.dumps(ROWS))
    else:
        write()

    prompts = load_prompts(
        DataArguments(dataset_name=str(path), prompt_column="question", answer_column="answer", test_size=3)
    )

    assert {name: len(split) for name, split in prompts.items()} == {"train": 7, "test": 3}
    assert set(prompts["train"].column_names) == {"prompt", "solution"}
    pairs = {(row["prompt"], row["solution"]) for split in prompts.values() for row in split}
    assert pairs == {(row["question"], row["answer"]) for row in ROWS}


def test_a_second_file_can_hold_the_test_prompts_and_they_leave_the_training_set(write, caplog):
    train, test = write(), write(ROWS[8:], "test.jsonl")

    prompts = load_prompts(DataArguments(dataset_name=train, dataset_test_name=test, prompt_column="question"))

    assert prompts["test"]["prompt"][:] == ["8+1=", "9+1="]
    assert prompts["train"]["prompt"][:] == [f"{a}+1=" for a in range(8)]
    assert "Left 2 training prompts out" in caplog.text


def test_a_directory_laid_out_like_a_hub_dataset_is_read_by_split(tmp_path):
    for split, part in (("train", ROWS[:6]), ("validation", ROWS[6:])):
        Dataset.from_list(part).to_parquet(tmp_path / "data" / f"{split}-00000-of-00001.parquet")
    columns = {"prompt_column": "question", "answer_column": "answer"}

    prompts = load_prompts(
        DataArguments(dataset_name=str(tmp_path), dataset_test_split="validation", train_size=4, **columns)
    )

    assert len(prompts["train"]) == 4
    assert prompts["test"]["solution"][:] == ["7", "8", "9", "10"]


@pytest.mark.parametrize(
    ("row", "arguments", "prompt"),
    [
        ("1+1=", {}, "1+1="),
        ("1+1=", {"prompt_template": "Q: {prompt}\n\\boxed{}?"}, "Q: 1+1=\n\\boxed{}?"),
        ("1+1=", {"conversational": True}, MESSAGES),
        (
            "1+1",
            {"conversational": True, "system_prompt": "Add.", "prompt_template": "{prompt}="},
            [{"role": "system", "content": "Add."}, *MESSAGES],
        ),
        (MESSAGES, {}, MESSAGES),
        (MESSAGES, {"system_prompt": "Add."}, [{"role": "system", "content": "Add."}, *MESSAGES]),
    ],
)
def test_prompts_get_their_template_conversation_and_system_prompt(write, row, arguments, prompt):
    assert load_train(write([{"prompt": row, "n": 1}]), **arguments)[0] == {"prompt": prompt, "n": 1}
    assert load_train(write([{"prompt": row}]), **arguments).to_list() == [{"prompt": prompt}]  # without other columns


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, r"Exactly one source of prompts is needed, got task=None and dataset_name=None"),
        ({"task": "chain_sum", "dataset_name": "x"}, r"Exactly one source of prompts.*leave the other out"),
        ({"dataset_name": "x", "task_params": {"a": 1}}, r"`task_params` is for `task`, which is not set"),
        ({"task": "x", "dataset_test_name": "y"}, r"`dataset_test_name` is for `dataset_name`, .*remove it"),
        ({"dataset_name": "x", "answer_pattern": "y"}, r"`answer_pattern` is for `answer_column`"),
        (ANSWERED | {"answer_pattern": "#### .+"}, r"`answer_pattern` is '#### .\+', which has 0 groups"),
        (ANSWERED | {"answer_template": "$$"}, r"`answer_template` is '\$\$', which would drop the answer"),
        ({"task": "x", "task_params": "max_terms=3"}, r"`task_params` is 'max_terms=3', which is not a JSON object"),
        ({"task": "x", "train_size": 0}, r"`train_size` is 0, but a prompt set needs at least one"),
        ({"task": "x", "test_size": -1}, r"`test_size` is -1, .*set test_size >= 1"),
        ({"task": "x", "prompt_template": "Q:"}, r"`prompt_template` is 'Q:', which would drop the prompt"),
    ],
)
def test_arguments_that_contradict_each_other_are_refused_at_once(arguments, message):
    with pytest.raises(ValueError, match=message):
        DataArguments(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"task": "chain_sums"}, r"`task` is 'chain_sums'.*the nearest name is 'chain_sum'"),
        ({"task_params": {"max_term": 3}}, r"do not suit task 'chain_sum': .* keyword argument 'max_term'"),
        ({"task_params": {"min_terms": 3, "max_terms": 2}}, r"do not suit task 'chain_sum': max_terms must be >= min"),
        ({"task_params": {"size": 3}}, r"do not suit task 'chain_sum': .* 'size'"),
        ({"test_size": 201}, r"gave only 200 of the 201 prompts wanted \(all distinct\).*widen `task_params`"),
        ({"test_size": 200}, r"gave only 0 of the 64 prompts wanted, not counting 200 test prompts.*lower"),
        ({"prompt_column": "question"}, r"`prompt_column` is 'question', which the train set of 'chain_sum' does not"),
        ({"system_prompt": "Add."}, r"`system_prompt` needs a conversation.*set `conversational: true`"),
    ],
)
def test_an_unavailable_task_is_refused_with_field_reason_and_remedy(arguments, message):
    with pytest.raises(ValueError, match=message):
        load_sums(**arguments)


def test_a_missing_reasoning_gym_is_reported_with_the_command_that_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym.factory", None)

    with pytest.raises(ValueError, match=r"`task` is .*not installed: run `pip install 'oblr_trl\[demo\]'`"):
        load_sums()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt_column": "questoin"}, r"`prompt_column` is 'questoin'.*nearest name is 'question'. Its columns: "),
        ({"answer_column": "reply"}, r"`answer_column` is 'reply', which the train set of .* does not have.*Its col"),
        ({"train_size": 11}, r"`train_size` is 11, but the split has 10 rows: lower it"),
        ({"prompt_column": "messages", "prompt_template": "Q: {prompt}"}, r"is for string prompts.*remove it"),
    ],
)
def test_settings_that_a_file_cannot_serve_are_refused(write, arguments, message):
    path = write([row | {"messages": MESSAGES} for row in ROWS])

    with pytest.raises(ValueError, match=message):
        load_train(path, **({"prompt_column": "question"} | arguments))


def test_a_single_file_without_test_prompts_is_refused_where_they_are_wanted(write):
    message = r"is the single file .* no test split .*`test_size`.*`dataset_test_name`.*`eval_strategy: no`"
    with pytest.raises(ValueError, match=message):
        load_prompts(DataArguments(dataset_name=write(), prompt_column="question"))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing.jsonl", r"missing.jsonl', which could not be loaded"),
        ("a.txt", r"a.txt', which could not be loaded .* a .json, .jsonl or .parquet file"),
        ("broken.jsonl", r"broken.jsonl', which could not be loaded"),
        ("empty.jsonl", r"empty.jsonl', which could not be loaded"),
        ("empty.json", r"empty.json', which could not be loaded .*(no data|no rows)"),
        ("empty.parquet", r"empty.parquet', which could not be loaded .*(no data|no rows)"),
        ("nowhere", r"nowhere', which could not be loaded .*Give a hub id, a local directory"),
        ("d", r"split 'test'\).*Unknown split \"test\". Should be one of \['train'\]"),
    ],
)
def test_sources_that_do_not_exist_or_are_empty_are_refused(tmp_path, name, message):
    for file, text in (("a.txt", "1+1="), ("broken.jsonl", "{1+1=\n"), ("empty.jsonl", ""), ("empty.json", "[]")):
        (tmp_path / file).write_text(text)
    Dataset.from_dict({"prompt": []}).to_parquet(tmp_path / "empty.parquet")
    Dataset.from_list([{"prompt": "1+1="}]).to_parquet(tmp_path / "d" / "data" / "train-00000-of-00001.parquet")

    with pytest.raises(ValueError, match=rf"`dataset_name` is .*{message}"):
        load_prompts(DataArguments(dataset_name=str(tmp_path / name)))


@pytest.mark.parametrize(
    ("prompts", "number"), [(["1+1=", ""], 1), (["1+1=", None], 1), ([3, 4], 0), ([MESSAGES, []], 1)]
)
def test_rows_without_a_prompt_are_refused_by_number(write, prompts, number):
    path = write([{"prompt": prompt} for prompt in prompts])

    with pytest.raises(ValueError, match=rf"Row {number} of .* neither text nor a list of messages.*remove the row"):
        load_train(path)


def test_a_slice_of_a_split_is_taken_of_a_file_too(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(f'{{"prompt": "{number}"}}\n' for number in range(5)))
    assert load_rows(str(path), field_name="dataset_name", config=None, split="test[:2]")["prompt"] == ["0", "1"]
    assert len(load_rows(str(path), field_name="dataset_name", config=None, split="test")) == 5
