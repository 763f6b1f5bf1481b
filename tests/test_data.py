"""Prompt sets: reasoning-gym tasks, local files, directories laid out like hub data sets, and every complaint."""

import json
import sys

import pytest
from datasets import Dataset

from oblr_trl.data.prompt_sets import DataArguments, load_prompts
from oblr_trl.data.tasks import decode_entry, encode_entry, make_task, task_entries

SUMS = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}  # 200 distinct questions


def sums(**arguments):
    return DataArguments(**({"task": "chain_sum", "task_params": SUMS, "train_size": 64, "test_size": 32} | arguments))


@pytest.fixture
def rows():
    return [{"question": f"{a}+1=", "answer": str(a + 1)} for a in range(10)]


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_a_task_gives_prompts_answers_and_entries_its_scorer_can_read():
    prompts = load_prompts(sums())

    assert {name: len(split) for name, split in prompts.items()} == {"train": 64, "test": 32}
    task = make_task("chain_sum", SUMS, size=1, seed=0)
    for row in prompts["train"]:
        entry = decode_entry(row["entry"])
        assert row["prompt"] == entry["question"]
        assert task.score_answer(row["solution"], entry) == 1.0
        assert task.score_answer(str(int(row["solution"]) + 1), entry) < 1.0


def test_no_test_prompt_of_a_task_is_trained_on_or_repeated():
    prompts = load_prompts(sums(train_size=500, test_size=100))  # of 200 questions, so both would be certain to happen

    assert len(prompts["train"]) == 500
    assert len(set(prompts["test"]["prompt"])) == 100
    assert not set(prompts["train"]["prompt"]) & set(prompts["test"]["prompt"])


def test_training_prompts_do_not_depend_on_whether_a_test_set_is_asked_for():
    assert load_prompts(sums(), with_test=False)["train"].to_list() == load_prompts(sums())["train"].to_list()


def test_seeds_choose_the_prompts_of_a_task():
    first, again = load_prompts(sums()), load_prompts(sums())
    other = load_prompts(sums(train_seed=7_000, test_seed=8_000_000))

    assert first["train"].to_list() == again["train"].to_list()
    assert first["train"]["prompt"][:] != other["train"]["prompt"][:]
    assert first["test"]["prompt"][:] != other["test"]["prompt"][:]


def test_entries_survive_json_with_their_tuples_and_number_keys():
    entry = {
        "question": "q",
        "answer": "a",
        "metadata": {"grid": ((1, 2), [3, (4,)]), "costs": {0: 1.5, (1, 2): None}},
    }

    assert decode_entry(encode_entry(entry)) == entry


def test_a_task_that_names_no_answer_has_no_solution():
    row = load_prompts(DataArguments(task="graph_color", train_size=1, test_size=1))["train"][0]

    assert row["solution"] is None


@pytest.mark.parametrize("name", ["rearc", "knights_knaves", "countdown", "gsm_symbolic"])
def test_scorers_give_the_reference_answer_of_a_decoded_entry_full_marks(name):
    # rearc compares tuples: through plain JSON its right answers would score 0.05.
    task = make_task(name, size=3, seed=1)
    for entry in task_entries(name, size=3, seed=1):
        decoded = decode_entry(encode_entry(entry))
        assert task.score_answer(entry["answer"], decoded) == task.score_answer(entry["answer"], entry) >= 0.99


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".parquet"])
def test_a_local_file_is_read_and_its_columns_are_renamed(tmp_path, rows, suffix):
    path = tmp_path / f"sums{suffix}"
    if suffix == ".parquet":
        Dataset.from_list(rows).to_parquet(path)
    elif suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        write_jsonl(path, rows)

    prompts = load_prompts(
        DataArguments(dataset_name=str(path), prompt_column="question", answer_column="answer", test_size=3)
    )

    assert {name: len(split) for name, split in prompts.items()} == {"train": 7, "test": 3}
    assert set(prompts["train"].column_names) == {"prompt", "solution"}
    pairs = {(row["prompt"], row["solution"]) for split in prompts.values() for row in split}
    assert pairs == {(row["question"], row["answer"]) for row in rows}


def test_rows_held_out_of_a_file_are_held_out_also_when_nobody_evaluates(tmp_path, rows):
    arguments = DataArguments(
        dataset_name=write_jsonl(tmp_path / "a.jsonl", rows), prompt_column="question", test_size=3
    )

    alone = load_prompts(arguments, with_test=False)

    assert list(alone) == ["train"]
    assert alone["train"]["prompt"][:] == load_prompts(arguments)["train"]["prompt"][:]


def test_a_second_file_can_hold_the_test_prompts_and_they_leave_the_training_set(tmp_path, rows, caplog):
    train, test = (write_jsonl(tmp_path / f"{name}.jsonl", rows[part]) for name, part in
                   (("train", slice(None)), ("test", slice(8, None))))  # fmt: skip

    prompts = load_prompts(DataArguments(dataset_name=train, dataset_test_name=test, prompt_column="question"))

    assert prompts["test"]["prompt"][:] == ["8+1=", "9+1="]
    assert prompts["train"]["prompt"][:] == [f"{a}+1=" for a in range(8)]
    assert "Left 2 training prompts out" in caplog.text


def test_a_directory_laid_out_like_a_hub_data_set_is_read_by_split(tmp_path, rows):
    for split, part in (("train", rows[:6]), ("validation", rows[6:])):
        Dataset.from_list(part).to_parquet(tmp_path / "data" / f"{split}-00000-of-00001.parquet")

    prompts = load_prompts(
        DataArguments(
            dataset_name=str(tmp_path),
            dataset_test_split="validation",
            prompt_column="question",
            answer_column="answer",
            train_size=4,
        )
    )

    assert len(prompts["train"]) == 4
    assert prompts["test"]["solution"][:] == ["7", "8", "9", "10"]


def test_prompts_can_be_put_into_a_template_and_into_a_conversation(tmp_path, rows):
    path = write_jsonl(tmp_path / "a.jsonl", rows)

    def first_prompt(**arguments):
        arguments = {"dataset_name": path, "prompt_column": "question"} | arguments
        return load_prompts(DataArguments(**arguments), with_test=False)["train"]["prompt"][0]

    assert first_prompt(prompt_template="Q: {prompt}\n\\boxed{}?") == "Q: 0+1=\n\\boxed{}?"
    assert first_prompt(conversational=True) == [{"role": "user", "content": "0+1="}]
    assert first_prompt(conversational=True, system_prompt="Add.", prompt_template="{prompt} ") == [
        {"role": "system", "content": "Add."},
        {"role": "user", "content": "0+1= "},
    ]


def test_conversations_stay_as_they_are_but_for_the_system_prompt(tmp_path):
    conversation = [{"role": "user", "content": "1+1="}]
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": conversation, "n": 1}])

    plain = load_prompts(DataArguments(dataset_name=path), with_test=False)["train"]
    with_system = load_prompts(DataArguments(dataset_name=path, system_prompt="Add."), with_test=False)["train"]

    assert plain[0] == {"n": 1, "prompt": conversation}
    assert with_system[0]["prompt"] == [{"role": "system", "content": "Add."}, *conversation]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, r"Exactly one source of prompts is needed, got task=None and dataset_name=None"),
        ({"task": "chain_sum", "dataset_name": "x"}, r"Exactly one source of prompts.*leave the other out"),
        ({"dataset_name": "x", "task_params": {"a": 1}}, r"`task_params` belongs to a reasoning-gym `task`"),
        ({"task": "chain_sum", "dataset_test_name": "x"}, r"`dataset_test_name` belongs to `dataset_name`.*remove it"),
        ({"task": "chain_sum", "dataset_config": "x"}, r"`dataset_config` belongs to `dataset_name`.*remove it"),
        (
            {"task": "chain_sum", "task_params": "max_terms=3"},
            r"`task_params` is 'max_terms=3', which is not a JSON obj",
        ),
        ({"task": "chain_sum", "task_params": "[3]"}, r"`task_params` is '\[3\]', which is not a JSON object"),
        ({"task": "chain_sum", "train_size": 0}, r"`train_size` is 0, but a prompt set needs at least one"),
        ({"task": "chain_sum", "test_size": -1}, r"`test_size` is -1, .*set test_size >= 1"),
        ({"task": "chain_sum", "prompt_template": "Q:"}, r"`prompt_template` is 'Q:', which would drop the prompt"),
    ],
)
def test_arguments_that_contradict_each_other_are_refused_at_once(arguments, message):
    with pytest.raises(ValueError, match=message):
        DataArguments(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"task": "chain_sums"}, r"`task` is 'chain_sums'.*the nearest name is 'chain_sum'"),
        ({"task_params": {"max_term": 3}}, r"'max_term', which task 'chain_sum' does not know; .* 'max_terms'"),
        ({"task_params": {"min_terms": 3, "max_terms": 2}}, r"do not suit task 'chain_sum': max_terms must be >= min"),
        ({"task_params": {"min_terms": "two"}}, r"`task_params` .* do not suit task 'chain_sum'.*Correct the value"),
        ({"task_params": {"size": 3}}, r"`task_params` sets `size`: set `train_size` and `test_size` instead"),
        ({"task_params": {"seed": 3}}, r"`task_params` sets `seed`: set `train_seed` and `test_seed` instead"),
        ({"test_size": 201}, r"gave only 200 of the 201 prompts wanted \(all distinct\).*widen `task_params`"),
        ({"test_size": 200}, r"gave only 0 of the 64 prompts wanted, not counting 200 test prompts.*lower"),
        ({"train_seed": 5, "test_seed": 9}, r"`train_seed` 5 and `test_seed` 9 are too close.*at least 1280 apart"),
        ({"prompt_column": "question"}, r"`prompt_column` is 'question', which the train set of 'chain_sum' does not"),
        ({"system_prompt": "Add."}, r"`system_prompt` needs a conversation.*set `conversational: true`"),
    ],
)
def test_a_task_that_cannot_be_had_is_refused_with_field_reason_and_remedy(arguments, message):
    with pytest.raises(ValueError, match=message):
        load_prompts(sums(**arguments))


def test_a_missing_reasoning_gym_is_reported_with_the_command_that_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym.factory", None)

    with pytest.raises(
        ValueError, match=r"`task` is 'chain_sum'.*not installed: run `pip install 'oblr_trl\[demo\]'`"
    ):
        load_prompts(sums())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"prompt_column": "questoin"},
            r"`prompt_column` is 'questoin'.*the nearest name is 'question'. Its columns: ",
        ),
        (
            {"answer_column": "reply"},
            r"`answer_column` is 'reply', which the train set of .* does not have.*Its columns",
        ),
        ({"train_size": 11}, r"`train_size` is 11, but the split has 10 rows: lower it"),
        ({"test_size": 10}, r"`test_size` is 10, but .* has 10 rows: lower it"),
        (
            {"with_test": True},
            r"is the single file .* no test split .*`test_size`.*`dataset_test_name`.*`eval_strategy: no`",
        ),
    ],
)
def test_columns_and_sizes_that_a_file_does_not_have_are_refused(tmp_path, rows, arguments, message):
    arguments = {"dataset_name": write_jsonl(tmp_path / "a.jsonl", rows), "prompt_column": "question"} | arguments
    with_test = arguments.pop("with_test", False)

    with pytest.raises(ValueError, match=message):
        load_prompts(DataArguments(**arguments), with_test=with_test)


def test_sources_that_do_not_exist_are_refused(tmp_path):
    (tmp_path / "a.txt").write_text("1+1=")
    (tmp_path / "broken.jsonl").write_text("{1+1=\n")
    Dataset.from_list([{"prompt": "1+1="}]).to_parquet(tmp_path / "d" / "data" / "train-00000-of-00001.parquet")
    for name, message in (
        ("missing.jsonl", r"`dataset_name` is .*missing.jsonl', which could not be loaded .* no file"),
        ("a.txt", r"files with the suffix '.txt' cannot be read, only .json, .jsonl, .parquet"),
        ("broken.jsonl", r"`dataset_name` is .*broken.jsonl', which could not be loaded"),
        ("nowhere", r"`dataset_name` is .*nowhere', which could not be loaded .*Give a hub id, a local directory"),
        ("d", r"`dataset_name` is .*split 'test'\).*Unknown split \"test\". Should be one of \['train'\]"),
    ):
        with pytest.raises(ValueError, match=message):
            load_prompts(DataArguments(dataset_name=str(tmp_path / name)))


def test_a_hub_data_set_out_of_reach_is_refused():
    with pytest.raises(ValueError, match=r"`dataset_name` is 'no-such-user/no-such-set', which could not be loaded"):
        load_prompts(DataArguments(dataset_name="no-such-user/no-such-set"))


@pytest.mark.parametrize("prompt", ["", None, 3, []])
def test_rows_without_a_prompt_are_refused_by_number(tmp_path, prompt):
    good = (
        "1+1="
        if isinstance(prompt, str) or prompt is None
        else 4
        if prompt == 3
        else [{"role": "user", "content": "1"}]
    )
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": good}, {"prompt": prompt}])
    number = 0 if prompt == 3 else 1

    with pytest.raises(ValueError, match=rf"Row {number} of .* neither text nor a list of messages.*remove the row"):
        load_prompts(DataArguments(dataset_name=path), with_test=False)


def test_empty_sets_are_refused(tmp_path):
    Dataset.from_dict({"prompt": []}).to_parquet(tmp_path / "empty.parquet")
    for name, text in (("empty.json", "[]"), ("empty.jsonl", "")):
        (tmp_path / name).write_text(text)
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "1+1="}])

    for name in ("empty.parquet", "empty.json", "empty.jsonl"):
        with pytest.raises(
            ValueError, match=rf"`dataset_name` is .*{name}', which could not be loaded .*(no data|no rows)"
        ):
            load_prompts(DataArguments(dataset_name=str(tmp_path / name)), with_test=False)
    with pytest.raises(ValueError, match=r"Every training prompt is also a test prompt"):
        load_prompts(DataArguments(dataset_name=path, dataset_test_name=path))


def test_a_template_for_conversations_is_refused(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": [{"role": "user", "content": "1+1="}]}])

    with pytest.raises(ValueError, match=r"`prompt_template` is for string prompts.*remove it"):
        load_prompts(DataArguments(dataset_name=path, prompt_template="Q: {prompt}"), with_test=False)


def test_a_file_of_prompts_alone_keeps_its_rows(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": f"{i}+{i}="}) for i in range(4)))

    prompts = load_prompts(DataArguments(dataset_name=str(path)), with_test=False)

    assert sorted(prompts["train"]["prompt"]) == ["0+0=", "1+1=", "2+2=", "3+3="]
