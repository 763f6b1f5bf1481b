"""The benchmarks as held-out prompts of a training run: by the recipe's `dataset_test_name`, or as a dictionary of sets."""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest
from trl.rewards import accuracy_reward

from oblr_trl import OBLRPOConfig, OBLRPOTrainer
from oblr_trl.data.prompt_sets import DataArguments, load_prompts
from oblr_trl.evaluation.rewards import math_accuracy
from oblr_trl.evaluation.training import benchmark_datasets
from oblr_trl.scripts.train import main, parse
from tests.evaluation.files import MATH, ROOT, gsm8k_rows, math500_rows, write_benchmarks, write_jsonl

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


def test_gsm8k_answers_are_taken_out_of_their_prose(tmp_path):
    path = write_jsonl(tmp_path / "gsm8k.jsonl", gsm8k_rows(40))
    arguments = DataArguments(
        dataset_name=path, prompt_column="question", answer_column="answer", answer_pattern="#### (.+)", test_size=10
    )

    prompts = load_prompts(arguments)

    solutions = {row["prompt"]: row["solution"] for split in prompts.values() for row in split}
    assert solutions == {row["question"]: f"{i * i:,}" for i, row in enumerate(gsm8k_rows(40))}
    assert "1,024" in solutions.values()


def test_a_template_puts_latex_answers_between_the_dollar_signs_that_accuracy_reward_needs(tmp_path):
    path = write_jsonl(tmp_path / "math.jsonl", math500_rows())
    arguments = DataArguments(
        dataset_name=path, prompt_column="problem", answer_column="answer", answer_template="${answer}$"
    )

    solutions = load_prompts(arguments, with_test=False)["train"]["solution"][:]

    assert solutions == [f"${row['answer']}$" for row in math500_rows()]
    boxed = [[{"role": "assistant", "content": f"\\boxed{{{row['answer']}}}"}] for row in math500_rows()]
    assert accuracy_reward(boxed, solutions) == [1.0] * len(solutions)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"answer_pattern": "#### (.+)"}, r"`answer_pattern` is for the answers of `answer_column`, which is not set"),
        ({"answer_column": "a", "answer_pattern": "#### .+"}, r"`answer_pattern` is '#### .\+', which has 0 groups"),
        ({"answer_column": "a", "answer_template": "$$"}, r"`answer_template` is '\$\$', which would drop the answer"),
    ],
)
def test_options_of_answers_that_cannot_be_meant_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        DataArguments(dataset_name="x", **arguments)


def test_a_row_without_the_pattern_is_refused_by_number(tmp_path):
    path = write_jsonl(tmp_path / "gsm8k.jsonl", [*gsm8k_rows(2), {"question": "?", "answer": "no mark"}])
    arguments = DataArguments(
        dataset_name=path, prompt_column="question", answer_column="answer", answer_pattern="#### (.+)"
    )
    with pytest.raises(
        ValueError, match=r"Row 2 of the train set of .* has no answer in `answer_column` 'answer': 'no ma"
    ):
        load_prompts(arguments, with_test=False)


def test_the_benchmarks_of_the_recipe_are_prompts_and_solutions(tmp_path):
    sets = benchmark_datasets(MATH, files=write_benchmarks(tmp_path))

    assert list(sets) == ["gsm8k", "math500", "amc23", "aime25", "olympiadbench"]
    assert all(rows.column_names == ["prompt", "solution", "benchmark"] for rows in sets.values())
    assert sets["gsm8k"]["solution"][:] == [f"${i * i}$" for i in range(6)]
    assert sets["olympiadbench"]["solution"][2:4] == ["$1,3$", "$1, 3$"]
    assert sets["aime25"]["prompt"][0].startswith("Problem 0\nPlease reason step by step")


@pytest.mark.slow
def test_a_recipe_evaluates_on_a_local_file_of_gsm8k_during_training(model_dir, tmp_path):
    train, test = (
        write_jsonl(tmp_path / f"{name}.jsonl", rows)
        for name, rows in (("train", gsm8k_rows(24)[8:]), ("test", gsm8k_rows(8)))
    )
    recipe = tmp_path / "recipe.yaml"
    settings = {
        **OPTIONS,
        "model_name_or_path": model_dir,
        "dataset_name": train,
        "dataset_test_name": test,
        "prompt_column": "question",
        "answer_column": "answer",
        "answer_pattern": "#### (.+)",
        "reward_funcs": "accuracy_reward",
        "output_dir": str(tmp_path / "run"),
    }
    recipe.write_text(json.dumps(settings))

    trainer = main(*parse(["--config", str(recipe)]))

    assert trainer.eval_dataset["solution"][:] == [str(i * i) for i in range(8)]
    assert [row["step"] for row in trainer.state.log_history if "eval_rewards/accuracy_reward/mean" in row] == [1]


@pytest.mark.slow
def test_a_trainer_evaluates_on_several_benchmarks_by_name(model_dir, tmp_path):
    sets = benchmark_datasets(MATH, files=write_benchmarks(tmp_path), only=["gsm8k", "aime25"])
    trainer = OBLRPOTrainer(
        model=model_dir,
        reward_funcs=math_accuracy,
        args=OBLRPOConfig(str(tmp_path / "run"), **OPTIONS),
        train_dataset=sets["gsm8k"],
        eval_dataset=sets,
    )
    trainer.train()

    for name in ("gsm8k", "aime25"):
        rows = [row for row in trainer.state.log_history if f"eval_accuracy/{name}" in row]
        assert [row["step"] for row in rows] == [1]
        assert rows[0][f"eval_accuracy/{name}"] == rows[0]["eval_reward"]


def test_the_reward_is_the_grade_of_the_evaluation():
    metrics = {}
    rewards = math_accuracy(
        [r"\boxed{\sqrt{12}}", [{"role": "assistant", "content": r"\boxed{2}"}], "so 7", "7"],
        [r"2\sqrt{3}", r"2\sqrt{3}", "7", "???"],
        benchmark=["a", "a", "b", "b"],
        log_metric=metrics.__setitem__,
    )

    assert rewards == [1.0, 0.0, 1.0, None]
    assert metrics == {"accuracy/a": 0.5, "accuracy/b": 1.0}


def test_the_reward_can_be_computed_beside_the_main_thread():
    with ThreadPoolExecutor(1) as pool:  # where math-verify's own timeouts do not work
        assert pool.submit(math_accuracy, [r"\boxed{1/2}"], ["0.5"]).result() == [1.0]


def test_the_recipes_header_says_that_nothing_was_downloaded():
    for name in ("math", "gsm8k"):
        assert "ot downloaded on the machine" in (ROOT / "recipes" / "evaluation" / f"{name}.yaml").read_text()
