"""`oblr_trl.scripts.evaluate`: scores worked by hand, a kill and a resume, strict keys, refusals before the model."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, GPT2Config

from oblr_trl.evaluation.records import read_records
from oblr_trl.scripts.evaluate import parse
from tests.evaluation import files
from tests.evaluation.files import GSM8K, MATH, evaluate, evaluate_texts, gsm8k_rows, local, read_jsonl, write_jsonl

ENTRY = "benchmarks.gsm8k."
NO_MODEL = ["--model_name_or_path", "/no/such/model"]


@pytest.fixture(scope="module")
def gsm8k(tmp_path_factory):
    """Command line that puts twelve local problems in place of GSM8K."""
    return local(gsm8k=write_jsonl(tmp_path_factory.mktemp("data") / "gsm8k_rows.jsonl", gsm8k_rows(12)))


@pytest.fixture(scope="module")
def tiny(gsm8k, model_dir):
    """The same with a model, which gives a few tokens."""
    return [*gsm8k, "--backend", "transformers", "--max_new_tokens", "8", "--model_name_or_path", model_dir]


@pytest.fixture(scope="module")
def sampled(tiny):
    """Command line of two sampled completions for each of twelve problems, in six batches."""
    options = "--num_completions 2 --pass_at 1 2 --temperature 1 --max_new_tokens 48 --batch_size 4"
    return [*tiny, *options.split()]


@pytest.fixture(scope="module")
def evaluated(sampled, tmp_path_factory):
    """The same command line, with a directory in which it was run."""
    command = [*sampled, "--output_dir", str(tmp_path_factory.mktemp("evaluated"))]
    evaluate(*command)
    return command


def test_200_problems_score_what_is_counted_by_hand(tmp_path):
    sources = local(gsm8k=write_jsonl(tmp_path / "gsm8k_rows.jsonl", gsm8k_rows(200)))
    # Of problem i the first i mod 5 of 4 completions are right.
    texts = [[f"So it is \\boxed{{{i * i if j < i % 5 else i * i + 1}}}." for j in range(4)] for i in range(200)]
    options = ["--temperature", "1", "--num_completions", "4", "--pass_at", "1", "2", "3", "4"]
    results = evaluate_texts({"gsm8k": texts}, *sources, *options, "--output_dir", tmp_path / "out")

    entry = results["benchmarks"]["gsm8k"]
    values = {name: metric["value"] for name, metric in entry["metrics"].items()}
    # 40 problems each with c = 0, 1, 2, 3, 4 of n = 4 right: 1 - C(4 - c, k) / C(4, k) is
    # k = 1: 0, 1/4, 1/2, 3/4, 1, mean 1/2; k = 2: 0, 1/2, 5/6, 1, 1, mean 2/3; k = 3: 0, 3/4, 1, 1, 1, mean 3/4;
    # k = 4: 0, 1, 1, 1, 1, mean 4/5.
    assert values == {"avg": 1 / 2, "pass@1": 1 / 2, "pass@2": 2 / 3, "pass@3": 3 / 4, "pass@4": 4 / 5}
    assert entry["num_problems"] == 200
    # The standard deviation over problems is sqrt(1/8): 1.96 sqrt(1/8 / 200) = 0.049.
    average = entry["metrics"]["avg"]
    assert (average["low"], average["high"]) == (pytest.approx(0.451, abs=0.003), pytest.approx(0.549, abs=0.003))
    records = read_jsonl(tmp_path / "out" / "gsm8k.jsonl")
    assert [record["index"] for record in records] == list(range(200))
    assert all(record["correct"] == [j < i % 5 for j in range(4)] for i, record in enumerate(records))
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == results
    table = (tmp_path / "out" / "results.md").read_text()
    assert re.search(r"\| gsm8k +\| +200 \| 4 \| 50\.0 \[\d\d\.\d, \d\d\.\d\] \| 50\.0 .* \| 66\.7 ", table)


def test_a_killed_evaluation_continues_and_equals_an_uninterrupted_one(sampled, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    sources = local(gsm8k=write_jsonl(tmp_path / "rows.jsonl", gsm8k_rows(24)))
    sampled = [*sampled, *sources, "--max_new_tokens", "128"]  # twelve batches, long enough to be killed among
    evaluate(*sampled, "--output_dir", whole)
    command = [sys.executable, "-m", "oblr_trl.scripts.evaluate", "--config", GSM8K, *sampled]
    process = subprocess.Popen([*command, "--output_dir", str(killed)], cwd=files.ROOT, stderr=subprocess.DEVNULL)
    records = killed / "gsm8k.jsonl"
    deadline = time.monotonic() + 120
    while not (records.is_file() and records.read_bytes().count(b"\n") >= 2) and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    lines = records.read_bytes().splitlines(keepends=True)
    assert 2 <= len(lines) < 24
    # As if the kill had come in the middle of writing: one record of the last batch is complete, the next is cut.
    records.write_bytes(b"".join(lines[:-1]) + lines[-1][:50])

    evaluate(*sampled, "--output_dir", killed)

    for name in ("gsm8k.jsonl", "results.json", "results.md", "settings.json"):
        assert (killed / name).read_bytes() == (whole / name).read_bytes(), name


def test_a_finished_evaluation_is_not_generated_again(evaluated, tmp_path, monkeypatch):
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", None)  # would raise
    shutil.copytree(evaluated[-1], tmp_path, dirs_exist_ok=True)
    results = tmp_path / "results.json"
    first = json.loads(results.read_text())["benchmarks"]["gsm8k"]

    again = evaluate(*evaluated, "--output_dir", tmp_path, "--pass_at", "1")["benchmarks"]["gsm8k"]

    assert again["metrics"]["avg"] == first["metrics"]["avg"]
    assert (again["pass_at"], first["pass_at"]) == ([1], [1, 2])
    assert json.loads(results.read_text())["benchmarks"]["gsm8k"] == again


def test_completions_are_of_the_number_length_and_kind_asked_for(evaluated, tmp_path):
    records = read_jsonl(Path(evaluated[-1]) / "gsm8k.jsonl")
    assert len({text for record in records for text in record["completions"]}) == 24  # sampled, not repeated
    for record in records:
        assert record["prompt"].endswith("within \\boxed{}.\n")
        assert all(1 <= count <= 48 for count in record["num_tokens"])
        assert all(count == 48 for count, cut in zip(record["num_tokens"], record["truncated"], strict=True) if cut)

    evaluate(*evaluated, "--output_dir", tmp_path, "--seed", "1")

    assert read_jsonl(tmp_path / "gsm8k.jsonl")[0]["completions"] != records[0]["completions"]


def test_greedy_completions_do_not_depend_on_seed_or_batch(tiny, tmp_path):
    evaluate(*tiny, "--output_dir", tmp_path / "a", "--batch_size", "5")
    evaluate(*tiny, "--output_dir", tmp_path / "b", "--batch_size", "12", "--seed", "7")

    texts = [[row["completions"] for row in read_jsonl(tmp_path / name / "gsm8k.jsonl")] for name in "ab"]
    assert texts[0] == texts[1]


def test_more_completions_of_a_problem_than_a_batch_holds_are_generated_in_parts(tiny, tmp_path):
    options = "--num_completions 5 --temperature 1 --max_new_tokens 4 --batch_size 2"
    evaluate(*tiny, *options.split(), "--output_dir", tmp_path)

    assert [len(record["completions"]) for record in read_jsonl(tmp_path / "gsm8k.jsonl")] == [5] * 12


def test_conversations_reach_the_model_through_its_chat_template(tiny, model_dir, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(model_dir, model)
    (model / "chat_template.jinja").write_text(
        "{% for message in messages %}{{ message.content + ' ' }}{% endfor %}"
        "{% if add_generation_prompt %}={% endif %}"
    )
    chat = ["--conversational", "true", "--system_prompt", "Add.", "--prompt_template", "{prompt}"]
    evaluate(*tiny, "--model_name_or_path", model, *chat, "--output_dir", tmp_path / "chat")
    evaluate(*tiny, "--prompt_template", "Add. {prompt} =", "--output_dir", tmp_path / "text")

    chats, texts = (read_jsonl(tmp_path / name / "gsm8k.jsonl") for name in ("chat", "text"))
    assert chats[1]["prompt"] == [
        {"role": "system", "content": "Add."},
        {"role": "user", "content": "Ann has 1 bags of 1 marbles. How many marbles?"},
    ]
    assert [row["completions"] for row in chats] == [row["completions"] for row in texts]


def test_an_adapter_is_evaluated_with_its_model_or_refused(tiny, model_dir, tmp_path, monkeypatch):
    lora = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    adapter = get_peft_model(AutoModelForCausalLM.from_pretrained(model_dir), lora)
    adapter.save_pretrained(tmp_path / "adapter")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(model_dir) / name, tmp_path / "adapter")

    evaluate(*tiny, "--output_dir", tmp_path / "a")
    evaluate(*tiny, "--model_name_or_path", tmp_path / "adapter", "--output_dir", tmp_path / "b")

    texts = [[row["completions"] for row in read_jsonl(tmp_path / name / "gsm8k.jsonl")] for name in "ab"]
    assert texts[0] != texts[1]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: True)
    with pytest.raises(ValueError, match=r"holds an adapter, which `backend: vllm` does not load: .* merge it"):
        evaluate(*tiny, "--model_name_or_path", tmp_path / "adapter", "--backend", "vllm")


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--temperature", "0.5", r"`temperature` was 1.0 when the evaluation in .* began, and is 0.5 now"),
        ("--batch_size", "8", r"`batch_size` was 4 when .* is 8 now.*set it back, or set another `output_dir`"),
        ("--seed", "3", r"`seed` was 0 .* is 3 now"),
        ("--num_completions", "3", r"`benchmarks.gsm8k.num_completions` was 2 .* is 3 now"),
        ("--stop_token_ids", "5", r"`stop_token_ids` was None .* is \[5\] now"),
        ("--chat_template_kwargs", '{"a": 1}', r"`chat_template_kwargs` was None .* is {'a': 1} now"),
        ("--prompt_template", "{prompt}", r"`prompt_template` was .* is '{prompt}' now"),
        ("--files", None, r"`benchmarks.gsm8k.problems` was '\w+' .* is '\w+' now"),
        ("--model_name_or_path", None, r"`model_name_or_path` was .* now"),
    ],
)
def test_an_evaluation_of_other_settings_is_not_continued(evaluated, tmp_path, option, value, message):
    if option == "--files":
        value = local(gsm8k=write_jsonl(tmp_path / "other.jsonl", gsm8k_rows(11)))[1]
    if option == "--model_name_or_path":
        value = files.make_model(tmp_path / "other")

    with pytest.raises(ValueError, match=message):
        evaluate(*evaluated, option, value)


def test_weights_trained_further_under_the_same_name_are_not_taken_for_the_old_ones(tiny, tmp_path):
    model = files.make_model(tmp_path / "model")
    command = [*tiny, "--model_name_or_path", model, "--output_dir", tmp_path / "out"]
    evaluate(*command)
    os.utime(Path(model) / "model.safetensors", (1, 1))

    with pytest.raises(ValueError, match=r"`weights_changed_at` was .* is 1.0 now"):
        evaluate(*command)


def test_local_files_stand_in_for_all_five_benchmarks(tmp_path):
    sources = local(**files.write_benchmarks(tmp_path))
    right = {
        "gsm8k": [str(i * i) for i in range(6)],
        "math500": files.SCHEMAS["math500"][2],
        "amc23": ["10", "11", "12"],
        "aime25": ["70", "71", "0"],  # the last one is wrong
        "olympiadbench": ["2", "0.5", "3, 1", r"\{1, 3\}", r"(3, \infty) \cup (-\infty, -3)"],
    }
    num_completions = {"amc23": 32, "aime25": 32}  # from the recipe
    texts = {
        name: [[f"\\boxed{{{text}}}"] * num_completions.get(name, 4) for text in answers]
        for name, answers in right.items()
    }
    results = evaluate_texts(texts, *sources, "--output_dir", tmp_path / "out", recipe=MATH)

    scores = {name: entry["metrics"]["avg"]["value"] for name, entry in results["benchmarks"].items()}
    assert scores == {"gsm8k": 1, "math500": 1, "amc23": 1, "aime25": 2 / 3, "olympiadbench": 1}
    assert results["mean"]["value"] == pytest.approx((4 + 2 / 3) / 5, abs=1e-15)
    assert results["benchmarks"]["aime25"]["pass_at"] == [8, 32]
    assert results["benchmarks"]["gsm8k"]["pass_at"] == [4]


def test_benchmarks_are_added_to_an_evaluation_one_by_one(tmp_path):
    texts = dict.fromkeys(("amc23", "aime25"), [["71"] * 32] * 3)
    common = [texts, *local(**files.write_benchmarks(tmp_path)), "--output_dir", tmp_path / "out"]

    alone = evaluate_texts(*common, "--only", "aime25", recipe=MATH)
    both = evaluate_texts(*common, "--only", "aime25", "amc23", recipe=MATH)

    assert list(both["benchmarks"]) == ["amc23", "aime25"]
    assert both["benchmarks"]["aime25"] == alone["benchmarks"]["aime25"]
    assert alone["benchmarks"]["aime25"]["metrics"]["avg"]["value"] == 1 / 3
    assert alone["mean"] is None


def test_problems_whose_answer_cannot_be_parsed_are_left_out_named_and_counted(tmp_path, caplog):
    rows = gsm8k_rows(5)
    rows[1]["answer"] = "no mark"
    rows[3]["answer"] = "#### ???"
    texts = {"gsm8k": [[rf"\boxed{{{i * i}}}"] for i in range(5)]}
    sources = local(gsm8k=write_jsonl(tmp_path / "rows.jsonl", rows))
    common = [texts, *sources, "--output_dir", tmp_path / "out"]

    entry = evaluate_texts(*common)["benchmarks"]["gsm8k"]

    assert "`benchmarks.gsm8k.answer_column` 'answer' of " in caplog.text
    assert "holds 2 answers of 5 that are missing" in caplog.text
    assert "row 1: 'no mark'; row 3: '#### ???'" in caplog.text
    assert (entry["num_problems"], entry["excluded"], entry["metrics"]["avg"]["value"]) == (3, [1, 3], 1.0)
    assert "3 (2 excluded)" in (tmp_path / "out" / "results.md").read_text()
    write_jsonl(tmp_path / "rows.jsonl", [rows[1]])
    with pytest.raises(ValueError, match=r"No problem is left: set another `answer_column` or `answer_pattern`"):
        evaluate_texts(*common)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt_column": "questoin"}, rf"`{ENTRY}prompt_column` is 'questoin', .*the nearest name is 'question'"),
        ({"answer_column": "answr"}, rf"`{ENTRY}answer_column` is 'answr', .*nearest name is 'answer'. Its columns"),
        (
            {"answer_colum": "answer"},
            rf"Unknown key `{ENTRY}answer_colum`; the nearest name is '{ENTRY}answer_column'",
        ),
        ({"answer_column": None}, rf"`{ENTRY}answer_column` is not set, and has no default"),
        ({"answer_pattern": "#### .+"}, rf"`{ENTRY}answer_pattern` is '#### .\+', which has 0 groups"),
        ({"pass_at": [1, 8], "num_completions": 4}, r"`pass_at` of benchmark 'gsm8k' has k = 8, but of its 4 complet"),
        ({"pass_at": [0]}, r"`pass_at` of benchmark 'gsm8k' has k = 0"),
        ({"num_completions": 0}, rf"`{ENTRY}num_completions` is 0: give a whole number, at least 1"),
        ({"num_completions": 2}, r"`temperature` is 0, which makes the 2 completions .* equal"),
        ({"dataset_name": "missing.jsonl"}, rf"`{ENTRY}dataset_name` is 'missing.jsonl', which could not be loaded"),
        ({"dataset_name": "no-user/no-set"}, rf"`{ENTRY}dataset_name` is 'no-user/no-set', which could not be loaded"),
        ({}, r"`model_name_or_path` is '/no/such/model', but there is no such directory"),
    ],
)
def test_a_benchmark_that_is_not_available_is_refused_before_the_model(gsm8k, tmp_path, monkeypatch, changes, message):
    monkeypatch.chdir(tmp_path)
    entry = yaml.safe_load(Path(GSM8K).read_text())["benchmarks"]["gsm8k"]
    entry |= {"dataset_name": json.loads(gsm8k[1])["gsm8k"], "dataset_config": None} | changes

    with pytest.raises(ValueError, match=message):
        evaluate("--benchmarks", json.dumps({"gsm8k": entry}), *NO_MODEL)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("--temperatur 1", r"Unknown key `temperatur`; the nearest name is 'temperature'"),
        ("--only gsm8", r"`only` names 'gsm8', which is not one of the `benchmarks`; the nearest name is 'gsm8k'"),
        ("--files '{\"gsm9k\": 0}'", r"`files` names 'gsm9k'.*the nearest name is 'gsm8k'"),
        ("--files gsm8k.jsonl", r"`files` is 'gsm8k.jsonl', which is not a JSON object"),
        ("--benchmarks {}", r"`benchmarks` is {}, which is not a mapping"),
        ("--backend vlm", r"`backend` is 'vlm'; the nearest name is 'vllm': use one of auto, vllm, transformers"),
        ("--temperature -1", r"`temperature` is -1.0, but must be a number, at least 0"),
        ("--top_p 0", r"`top_p` is 0.0, but must be a number, above 0 and at most 1"),
        ("--top_k 0", r"`top_k` is 0, but must be a whole number, at least 1"),
        ("--batch_size 0", r"`batch_size` is 0, but must be a whole number, at least 1"),
        ("--prompt_template Q:", r"`prompt_template` is 'Q:', which would drop the prompt"),
        ("", r"`model_name_or_path` is not set"),
    ],
)
def test_a_wrong_command_line_is_refused_by_name(gsm8k, command, message):
    with pytest.raises(ValueError, match=message):
        evaluate(*gsm8k, *shlex.split(command))


def test_a_wrong_key_of_a_recipe_is_refused_by_name(tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text(Path(GSM8K).read_text() + "top_pp: 0.5\n")
    with pytest.raises(ValueError, match=r"Unknown key `top_pp`; the nearest name is 'top_p'"):
        parse(["--config", str(recipe)])
    recipe.write_text(Path(GSM8K).read_text().replace("0.0", "yes"))
    with pytest.raises(ValueError, match=r"`temperature` is True, but must be a number"):
        parse(["--config", str(recipe)])


def test_a_backend_a_context_and_a_template_that_are_not_there_are_refused(tiny, monkeypatch):
    with pytest.raises(ValueError, match=r"`max_new_tokens` is 512, but the model's context is 256 .* at most 1\d\d"):
        evaluate(*tiny, "--max_new_tokens", "512")
    with monkeypatch.context() as patch:  # GPT-2 calls its context otherwise
        patch.setattr("transformers.AutoConfig.from_pretrained", lambda *args, **kwargs: GPT2Config(n_positions=100))
        with pytest.raises(ValueError, match="the model's context is 100 tokens"):
            evaluate(*tiny, "--max_new_tokens", "99")
    with pytest.raises(ValueError, match="chat template"):
        evaluate(*tiny, "--conversational", "true")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"`backend` is 'vllm', which is not installed.*`backend: transformers`"):
        evaluate(*tiny, "--backend", "vllm")


def test_a_record_that_is_broken_within_the_file_is_named(tmp_path):
    path = tmp_path / "gsm8k.jsonl"
    record = json.dumps({"benchmark": "gsm8k", "index": 0, "completions": ["1"], "correct": [True]})
    for text, message in (
        ('{"question": "1+1="}', "not a file of graded problems. Set another `output_dir`"),  # without a line break
        (f"{record}\n{{\n{record}\n", "line 2: not a graded problem"),
        ("[1]\n", "line 1: not a graded problem"),
        (record.replace("correct", "grades") + "\n", "line 1: not a graded problem"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_records(path)
        assert path.read_text() == text  # refused before anything is cut off


def test_the_recipes_parse_and_name_the_five_benchmarks():
    args = parse(["--config", MATH])

    assert list(args.benchmarks) == ["gsm8k", "math500", "amc23", "aime25", "olympiadbench"]
    assert "{prompt}\n" in args.prompt_template
    for recipe in (files.ROOT / "recipes" / "evaluation").glob("*.yaml"):
        assert parse(["--config", str(recipe)]).benchmarks
        assert re.search(r"# Hardware: .*\bGPU", recipe.read_text())
        assert "ot downloaded on the machine" in recipe.read_text()
    assert os.environ["HF_HUB_OFFLINE"] == "1"


def test_the_commands_of_the_documentation_parse():
    text = (files.ROOT / "docs" / "evaluation.md").read_text().replace("\\\n", " ")
    commands = re.findall(r"^python -m oblr_trl\.scripts\.evaluate (.*)$", text, flags=re.MULTILINE)
    parsed = [parse(shlex.split(command)) for command in commands]
    assert all(args.benchmarks for args in parsed)
    recipe = yaml.safe_load((files.ROOT / "recipes/Qwen3-4B-Base/oblrpo/config_math.yaml").read_text())
    (trained,) = [args for args in parsed if args.conversational]
    assert trained.system_prompt == recipe["system_prompt"]
    assert trained.stop_token_ids == recipe["generation_kwargs"]["stop_token_ids"]
    assert trained.max_new_tokens == recipe["max_completion_length"]
