"""`evaluate --like RECIPE`: the prompts and endings of a training, on a real tiny model, and adapters."""

import json
import sys
from types import ModuleType, SimpleNamespace

import pytest
import yaml
from transformers import AutoTokenizer
from trl import GRPOTrainer

from oblr_trl.evaluation.generation import TransformersGenerator
from oblr_trl.evaluation.training import benchmark_datasets, training_prompt_settings
from oblr_trl.scripts import evaluate, train
from tests import recipe_stand_ins
from tests.evaluation.files import GSM8K, MATH, ROOT, write_benchmarks, write_jsonl

MATH_4B = ROOT / "recipes" / "Qwen3-4B-Base" / "oblrpo" / "config_math.yaml"
GSM8K_LORA = ROOT / "recipes" / "Qwen3-1.7B-Base" / "oblrpo" / "config_gsm8k_lora.yaml"
CHAIN_SUM = ROOT / "recipes" / "tiny-Qwen3" / "oblrpo" / "config_chain_sum.yaml"
SYSTEM = r"Please reason step by step, and put your final answer within \boxed{}."
THINKING_TEMPLATE = recipe_stand_ins.CHAT_TEMPLATE + "{% if enable_thinking %}think {% endif %}"
THINKING_TEMPLATE += "{% if add_generation_prompt %}assistant: {% endif %}"


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory):
    path = tmp_path_factory.mktemp("stand-ins")
    model = recipe_stand_ins.write_model(path / "model")
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = THINKING_TEMPLATE
    tokenizer.save_pretrained(model)
    return model, recipe_stand_ins.write_data_sets(path)


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    """Command line that puts the questions of the stand-ins' training sets in place of GSM8K."""
    rows = [{"question": f"What is {i} + 2?", "answer": f"#### {i + 2}"} for i in range(16)]
    path = write_jsonl(tmp_path_factory.mktemp("data") / "questions.jsonl", rows)
    return ["--config", GSM8K, "--files", json.dumps({"gsm8k": path}), "--disable_tqdm", "true"]


def write_recipe(path, base=MATH_4B, **changes):
    """A copy of a recipe with some keys changed, or left out where the change is None."""
    recipe = yaml.safe_load(base.read_text()) | changes
    path.write_text(yaml.safe_dump({key: value for key, value in recipe.items() if value is not None}))
    return path


def records(directory):
    return [json.loads(line) for line in (directory / "gsm8k.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("base", "changes"),
    [
        (MATH_4B, {}),  # conversations with a system prompt
        (
            MATH_4B,
            {"system_prompt": None, "chat_template_kwargs": {"enable_thinking": True}},
        ),  # of which only the data tell
        (GSM8K_LORA, {}),  # questions made conversations
        (GSM8K_LORA, {"conversational": None, "system_prompt": None, "prompt_template": "Add.\n{prompt}\n"}),
    ],
    ids=["system", "template-kwargs", "questions", "text"],
)
def test_the_prompts_of_training_and_evaluation_are_the_same_tokens(
    stand_ins, questions, tmp_path, monkeypatch, base, changes
):
    trained, evaluated = [], []
    tokenize, generate = GRPOTrainer._tokenize_prompts, TransformersGenerator.generate

    def record_training(self, prompts):
        result = tokenize(self, prompts)
        trained.extend(map(tuple, result[0]))
        return result

    def record_evaluation(self, prompt_ids, **kwargs):
        evaluated.extend(map(tuple, prompt_ids))
        return generate(self, prompt_ids, **kwargs)

    monkeypatch.setattr(GRPOTrainer, "_tokenize_prompts", record_training)
    monkeypatch.setattr(TransformersGenerator, "generate", record_evaluation)
    model, data_sets = stand_ins
    dataset_name = data_sets[yaml.safe_load(base.read_text())["dataset_name"]]
    recipe = write_recipe(tmp_path / "recipe.yaml", base, dataset_name=dataset_name, **changes)
    overrides = recipe_stand_ins.shrink(base, model, data_sets, tmp_path / "run")
    overrides |= {"use_cpu": True, "use_vllm": False, "generation_kwargs": "{}", "num_completions_to_print": 0}
    overrides |= {"eval_strategy": "no", "eval_on_start": False, "use_peft": False}

    train.main(*train.parse(["--config", str(recipe), *recipe_stand_ins.flags(overrides)]))
    tokens = [*questions, "--model_name_or_path", str(tmp_path / "run"), "--backend", "transformers"]
    like = ["--like", str(recipe), "--max_new_tokens", "2", "--output_dir", str(tmp_path / "evaluated")]
    evaluate.main(evaluate.parse([*tokens, *like]))

    assert len(set(evaluated)) == 16
    assert len(set(trained)) == 4  # two steps of two prompts
    assert set(trained) <= set(evaluated)


def test_a_recipe_gives_its_prompts_stop_token_and_length(tmp_path):
    assert training_prompt_settings(MATH_4B) == {
        "prompt_template": None,
        "conversational": True,
        "system_prompt": SYSTEM,
        "chat_template_kwargs": None,
        "stop_token_ids": [151645],
        "max_new_tokens": 4096,
    }
    assert training_prompt_settings(CHAIN_SUM)["conversational"] is False
    changes = {"generation_kwargs": '{"eos_token_id": 7, "stop_token_ids": [5, 6]}', "max_completion_length": None}
    settings = training_prompt_settings(
        write_recipe(tmp_path / "r.yaml", chat_template_kwargs='{"enable_thinking": false}', **changes)
    )
    assert (settings["stop_token_ids"], settings["max_new_tokens"]) == ([5, 6, 7], 512)  # TRL's default
    assert settings["chat_template_kwargs"] == {"enable_thinking": False}


def test_the_training_recipe_replaces_the_evaluations_prompt_and_the_command_line_comes_first():
    args = evaluate.parse(["--config", MATH, "--like", str(MATH_4B)])
    assert (args.prompt_template, args.conversational, args.system_prompt) == (None, True, SYSTEM)
    assert (args.stop_token_ids, args.max_new_tokens, args.temperature) == ([151645], 4096, 1.0)

    args = evaluate.parse(["--config", MATH, "--like", str(MATH_4B), "--max-new-tokens", "9", "--system_prompt=Add."])
    assert (args.max_new_tokens, args.system_prompt, args.stop_token_ids) == (9, "Add.", [151645])


def test_benchmarks_during_training_are_asked_as_the_training_recipe_asks(tmp_path):
    sets = benchmark_datasets(MATH, files=write_benchmarks(tmp_path), only=["aime25"], like=MATH_4B)

    assert sets["aime25"]["prompt"][0] == [
        {"role": "system", "content": SYSTEM},
        {"role": "user", "content": "Problem 0"},
    ]


def test_a_recipe_whose_prompts_or_endings_cannot_be_taken_is_refused(tmp_path):
    for recipe, message in (
        (tmp_path / "none.yaml", r"`like` names .*none.yaml', but there is no such file"),
        (MATH, r"`like` is .*math.yaml', which is a recipe of an evaluation: name one of a training"),
        (
            write_recipe(tmp_path / "r.yaml", generation_kwargs={"stop": ["\n"]}),
            r"`like` is .*r.yaml', whose `generation_kwargs.stop` shapes completions .* `stop_token_ids` instead",
        ),
        (write_recipe(tmp_path / "s.yaml", vllm_structured_outputs_regex="\\d+"), r"`vllm_structured_outputs_regex`"),
    ):
        with pytest.raises(ValueError, match=message):
            training_prompt_settings(recipe)


def test_a_stop_token_ends_a_completion_of_transformers(stand_ins, questions, tmp_path):
    tokens = [*questions, "--model_name_or_path", stand_ins[0], "--backend", "transformers", "--max_new_tokens", "12"]
    evaluate.main(evaluate.parse([*tokens, "--output_dir", str(tmp_path / "whole")]))
    tokenizer = AutoTokenizer.from_pretrained(stand_ins[0])
    whole = records(tmp_path / "whole")[0]["completions"][0]
    ids = tokenizer(whole, add_special_tokens=False).input_ids
    stop = ids[5]
    end = ids.index(stop)

    stopping = ["--stop_token_ids", str(stop), "--output_dir", str(tmp_path / "stopped")]
    evaluate.main(evaluate.parse([*tokens, *stopping]))

    stopped = records(tmp_path / "stopped")[0]
    assert stopped["completions"] == [tokenizer.decode(ids[:end])]
    assert (stopped["num_tokens"], stopped["truncated"]) == ([end + 1], [False])
    assert json.loads((tmp_path / "stopped" / "settings.json").read_text())["settings"]["stop_token_ids"] == [stop]


def test_vllm_is_told_the_stop_tokens_and_given_the_prompts_of_the_recipe(stand_ins, questions, tmp_path, monkeypatch):
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
    tokens = [*questions, "--model_name_or_path", stand_ins[0], "--backend", "vllm", "--like", str(MATH_4B)]
    evaluate.main(evaluate.parse([*tokens, "--max_new_tokens", "2", "--output_dir", str(tmp_path)]))

    eos = AutoTokenizer.from_pretrained(stand_ins[0]).eos_token_id
    assert len(asked) == 16
    assert all(parameters["stop_token_ids"] == [eos, 151645] for _, parameters in asked)
    text = AutoTokenizer.from_pretrained(stand_ins[0]).decode(asked[0][0]["prompt_token_ids"])
    assert text == f"system: {SYSTEM} user: What is 0 + 2? assistant: "
