"""Prompts and endings of an evaluation against those of a training, and the answers that both read from datasets."""

import json
import sys
from types import ModuleType, SimpleNamespace

import pytest
from transformers import AutoTokenizer
from trl import GRPOTrainer
from trl.rewards import accuracy_reward

from oblr_trl.data.prompt_sets import DataArguments, load_prompts
from oblr_trl.evaluation import generation
from oblr_trl.scripts import train
from tests import recipe_stand_ins
from tests.evaluation import files
from tests.evaluation.files import benchmark_rows, evaluate, gsm8k_rows, read_jsonl, write_jsonl

MATH_4B = files.ROOT / "recipes" / "Qwen3-4B-Base" / "oblrpo" / "config_math.yaml"
GSM8K_LORA = files.ROOT / "recipes" / "Qwen3-1.7B-Base" / "oblrpo" / "config_gsm8k_lora.yaml"
SYSTEM = r"Please reason step by step, and put your final answer within \boxed{}."
THINKING_TEMPLATE = recipe_stand_ins.CHAT_TEMPLATE + "{% if enable_thinking %}think {% endif %}"
THINKING_TEMPLATE += "{% if add_generation_prompt %}assistant: {% endif %}"
ASKED = ["--prompt_template", "{prompt}", "--conversational", "true"]
GSM8K_COLUMNS = {"prompt_column": "question", "answer_column": "answer", "answer_pattern": "#### (.+)"}
OPTIONS = {
    "per_device_train_batch_size": 8,
    "per_device_eval_batch_size": 8,
    "num_generations": 4,
    "num_generations_eval": 1,
    "max_completion_length": 8,
    "max_steps": 1,
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "report_to": "none",
    "save_strategy": "no",
    "eval_strategy": "steps",
    "logging_steps": 1,
    "disable_tqdm": True,
}


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory):
    path = tmp_path_factory.mktemp("stand-ins")
    model = recipe_stand_ins.write_model(path / "model")
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = THINKING_TEMPLATE
    tokenizer.save_pretrained(model)
    return model, recipe_stand_ins.write_datasets(path)


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    """Command line that puts the questions of the stand-ins' training sets in place of GSM8K."""
    rows = [{"question": f"What is {i} + 2?", "answer": f"#### {i + 2}"} for i in range(16)]
    return files.local(gsm8k=write_jsonl(tmp_path_factory.mktemp("data") / "questions.jsonl", rows))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("base", "changes", "options"),
    [
        (MATH_4B, {}, [*ASKED, "--system_prompt", SYSTEM]),
        (
            MATH_4B,
            {"system_prompt": None, "chat_template_kwargs": {"enable_thinking": True}},
            [*ASKED, "--chat_template_kwargs", '{"enable_thinking": true}'],
        ),
        (GSM8K_LORA, {}, [*ASKED, "--system_prompt", SYSTEM]),  # questions made conversations
        (
            GSM8K_LORA,
            {"conversational": None, "system_prompt": None, "prompt_template": "Add.\n{prompt}\n"},
            ["--prompt_template", "Add.\n{prompt}\n"],
        ),
    ],
    ids=["system", "template-kwargs", "questions", "text"],
)
def test_the_prompts_of_training_and_evaluation_are_the_same_tokens(
    stand_ins, questions, tmp_path, monkeypatch, base, changes, options
):
    trained, evaluated = [], []
    tokenize, load = GRPOTrainer._tokenize_prompts, generation.load_transformers

    def record_training(self, prompts):
        result = tokenize(self, prompts)
        trained.extend(map(tuple, result[0]))
        return result

    def load_and_record(*args):
        generate = load(*args)
        return lambda prompt_ids, *rest: evaluated.extend(map(tuple, prompt_ids)) or generate(prompt_ids, *rest)

    monkeypatch.setattr(GRPOTrainer, "_tokenize_prompts", record_training)
    monkeypatch.setattr(generation, "load_transformers", load_and_record)
    model, datasets = stand_ins
    dataset_name = datasets[recipe_stand_ins.read(base)["dataset_name"]]
    recipe = recipe_stand_ins.write_recipe(tmp_path / "recipe.yaml", base, dataset_name=dataset_name, **changes)
    overrides = recipe_stand_ins.shrink(base, model, datasets, tmp_path / "run")
    overrides |= {"use_cpu": True, "use_vllm": False, "generation_kwargs": "{}", "num_completions_to_print": 0}
    overrides |= {"eval_strategy": "no", "eval_on_start": False, "use_peft": False}

    train.main(*train.parse(["--config", str(recipe), *recipe_stand_ins.flags(overrides)]))
    model = ["--model_name_or_path", tmp_path / "run", "--backend", "transformers"]
    evaluate(*questions, *model, *options, "--max_new_tokens", "2", "--output_dir", tmp_path / "evaluated")

    assert len(set(evaluated)) == 16
    assert len(set(trained)) == 4  # two steps of two prompts
    assert set(trained) <= set(evaluated)


def test_a_stop_token_ends_a_completion_of_transformers(stand_ins, questions, tmp_path):
    model = ["--model_name_or_path", stand_ins[0], "--backend", "transformers", "--max_new_tokens", "12"]
    evaluate(*questions, *model, "--output_dir", tmp_path / "whole")
    tokenizer = AutoTokenizer.from_pretrained(stand_ins[0])
    text = read_jsonl(tmp_path / "whole" / "gsm8k.jsonl")[0]["completions"][0]
    ids = tokenizer(text, add_special_tokens=False).input_ids
    stop = ids[5]
    end = ids.index(stop)

    evaluate(*questions, *model, "--stop_token_ids", stop, "--output_dir", tmp_path / "stopped")

    stopped = read_jsonl(tmp_path / "stopped" / "gsm8k.jsonl")[0]
    assert stopped["completions"] == [tokenizer.decode(ids[:end])]
    assert (stopped["num_tokens"], stopped["truncated"]) == ([end + 1], [False])
    assert json.loads((tmp_path / "stopped" / "settings.json").read_text())["stop_token_ids"] == [stop]


def test_vllm_is_told_the_stop_tokens_and_given_the_prompts(stand_ins, questions, tmp_path, monkeypatch):
    asked = []

    class Engine:
        def __init__(self, **kwargs):
            pass

        def generate(self, prompts, parameters, use_tqdm):
            asked.extend(zip(prompts, parameters, strict=True))
            sample = SimpleNamespace(text="7", token_ids=[7], finish_reason="stop")
            return [SimpleNamespace(outputs=[sample]) for _ in prompts]

    vllm = ModuleType("vllm")
    vllm.LLM, vllm.SamplingParams = Engine, lambda **kwargs: kwargs
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: True)
    model = ["--model_name_or_path", stand_ins[0], "--backend", "vllm", *ASKED, "--system_prompt", SYSTEM]
    evaluate(*questions, *model, "--stop_token_ids", "151645", "--max_new_tokens", "2", "--output_dir", tmp_path)

    tokenizer = AutoTokenizer.from_pretrained(stand_ins[0])
    assert len(asked) == 16
    assert len({parameters["seed"] for _, parameters in asked}) == 16
    assert all(parameters["stop_token_ids"] == [tokenizer.eos_token_id, 151645] for _, parameters in asked)
    text = tokenizer.decode(asked[0][0]["prompt_token_ids"])
    assert text == f"system: {SYSTEM} user: What is 0 + 2? assistant: "


@pytest.mark.slow
def test_a_recipe_evaluates_on_a_local_file_of_gsm8k_during_training(model_dir, tmp_path):
    rows = gsm8k_rows(24)
    settings = OPTIONS | GSM8K_COLUMNS
    settings["dataset_name"] = write_jsonl(tmp_path / "train.jsonl", rows[8:])
    settings["dataset_test_name"] = write_jsonl(tmp_path / "test.jsonl", rows[:8])
    settings |= {"model_name_or_path": model_dir, "reward_funcs": "accuracy_reward"}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps(settings | {"output_dir": str(tmp_path / "run")}))

    trainer = train.main(*train.parse(["--config", str(recipe)]))

    assert trainer.eval_dataset["solution"][:] == [str(i * i) for i in range(8)]
    assert [row["step"] for row in trainer.state.log_history if "eval_rewards/accuracy_reward/mean" in row] == [1]


def test_gsm8k_answers_are_taken_out_of_their_prose(tmp_path):
    path = write_jsonl(tmp_path / "gsm8k.jsonl", gsm8k_rows(40))
    prompts = load_prompts(DataArguments(dataset_name=path, **GSM8K_COLUMNS, test_size=10))

    solutions = {row["prompt"]: row["solution"] for split in prompts.values() for row in split}
    assert solutions == {row["question"]: f"{i * i:,}" for i, row in enumerate(gsm8k_rows(40))}
    assert "1,024" in solutions.values()


def test_a_template_puts_latex_answers_between_the_dollar_signs_that_accuracy_reward_needs(tmp_path):
    rows = benchmark_rows("math500")
    columns = {"prompt_column": "problem", "answer_column": "answer", "answer_template": "${answer}$"}
    arguments = DataArguments(dataset_name=write_jsonl(tmp_path / "math.jsonl", rows), **columns)

    solutions = load_prompts(arguments, with_test=False)["train"]["solution"][:]

    assert solutions == [f"${row['answer']}$" for row in rows]
    boxed = [[{"role": "assistant", "content": f"\\boxed{{{row['answer']}}}"}] for row in rows]
    assert accuracy_reward(boxed, solutions) == [1.0] * len(solutions)


def test_a_row_without_the_pattern_is_refused_by_number(tmp_path):
    path = write_jsonl(tmp_path / "gsm8k.jsonl", [*gsm8k_rows(2), {"question": "?", "answer": "no mark"}])
    message = r"Row 2 of the train set of .* has no answer in `answer_column` 'answer': 'no ma"
    with pytest.raises(ValueError, match=message):
        load_prompts(DataArguments(dataset_name=path, **GSM8K_COLUMNS), with_test=False)
