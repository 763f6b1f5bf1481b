"""Rewards by name: TRL's calling convention, both kinds of completions, and every name that cannot be resolved."""

import pytest
from trl.rewards import accuracy_reward

from oblr_trl.data.prompt_sets import DataArguments
from oblr_trl.data.rewards import RewardArguments, load_rewards, task_reward
from oblr_trl.data.tasks import encode_entry, make_task

SUMS = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
ENTRY = make_task("chain_sum", SUMS, size=1, seed=3)[0]


def load(*names, task=None, columns=("prompt", "solution", "entry", "difficulty"), **arguments):
    data = DataArguments(task=task) if task else DataArguments(dataset_name="x")
    reward_args = RewardArguments(reward_funcs=list(names) or None, **arguments)
    return load_rewards(reward_args, data, columns=list(columns), max_completion_length=20)


def message(text):
    return [{"role": "assistant", "content": text}]


def call(reward, completions, **columns):
    """Call a reward as GRPOTrainer does."""
    ids = [list(range(len(str(completion)))) for completion in completions]
    keywords = {"trainer_state": None, "log_extra": lambda name, values: None, "log_metric": lambda name, value: None}
    prompts = ["p"] * len(completions)
    return reward(prompts=prompts, completions=completions, completion_ids=ids, **(keywords | columns))


@pytest.mark.parametrize("wrap", [str, message])
def test_the_task_reward_scores_and_logs_the_fraction_of_full_scores(wrap):
    answer, metrics = ENTRY["answer"], {}
    # The task pays a substring by its share of the length: an answer and as many characters again earn one half.
    completions = [answer, f" {answer} ", answer + "x" * len(answer), "nonsense"]

    scores = call(
        task_reward("chain_sum", SUMS),
        [wrap(completion) for completion in completions],
        entry=[encode_entry(ENTRY)] * 4,
        log_metric=metrics.__setitem__,
    )

    assert scores == [1.0, 1.0, 0.5, 0.0]
    assert metrics == {"accuracy": 0.5}


def test_a_task_rewards_by_its_own_scorer_unless_told_otherwise():
    (reward,) = load(task="chain_sum")

    assert reward.__name__ == "chain_sum"
    assert reward(completions=[ENTRY["answer"]], entry=[encode_entry(ENTRY)]) == [1.0]  # without a trainer


@pytest.mark.parametrize("wrap", [str, message])
def test_rewards_of_trl_take_plain_and_conversational_completions(wrap):
    accuracy, reasoning, think = load("accuracy_reward", "reasoning_accuracy_reward", "think_format_reward")
    solution = [r"\frac{1}{3}"] * 2

    assert call(accuracy, [wrap(r"\boxed{\frac{1}{3}}"), wrap(r"\boxed{2}")], solution=solution) == [1.0, 0.0]
    thought = "<think>a</think> "
    assert call(reasoning, [wrap(rf"{thought}\boxed{{1/3}}"), wrap(r"\boxed{1/3}")], solution=solution) == [1.0, 0.0]
    assert call(think, [wrap(f"{thought}b"), wrap("b")], solution=solution) == [1.0, 0.0]


def test_a_reward_of_trl_keeps_its_name_and_its_verdict_of_unscorable():
    (accuracy,) = load("accuracy_reward")

    assert accuracy.__name__ == accuracy_reward.__name__ == "accuracy_reward"
    assert call(accuracy, ["2"], solution=["no number"]) == [None]


def test_the_overlong_punishment_starts_below_the_longest_completion():
    (overlong,) = load("get_soft_overlong_punishment", soft_punish_cache=8)

    # 0 up to 20 - 8 = 12 tokens, then linearly to -1 at 20.
    assert call(overlong, ["x" * n for n in (12, 14, 20)]) == [0.0, -0.25, -1.0]


def test_a_reward_can_be_given_by_its_import_path_and_read_any_column():
    length, difficulty = load("tests.custom_rewards.length_reward", "tests.custom_rewards.difficulty_reward")

    assert call(length, ["a", "abc"]) == [1.0, 3.0]
    assert call(difficulty, ["a", "b"], difficulty=[1.0, 2.0]) == [1.0, 2.0]


def test_a_reward_can_lie_in_the_directory_that_training_is_launched_from(tmp_path, monkeypatch):
    (tmp_path / "rewards_of_the_launch.py").write_text("def zero(completions, **kwargs):\n    return [0.0]\n")
    monkeypatch.chdir(tmp_path)

    (zero,) = load("rewards_of_the_launch.zero")

    assert call(zero, ["a"]) == [0.0]


def test_a_single_name_may_be_written_without_a_list():
    assert RewardArguments(reward_funcs="task").reward_funcs == ["task"]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["acuracy_reward"], r"names 'acuracy_reward', which is unknown; the nearest name is 'accuracy_reward'"),
        (["zzzz"], r"'zzzz', which is unknown. Use one of task, accuracy_reward, .*, or a dotted import path"),
        (["task"], r"names 'task', but no reasoning-gym `task` is set"),
        ([], r"`reward_funcs` is empty: a dataset needs at least one reward"),
        (["no_such.rewards.mine"], r"'no_such.rewards.mine', which cannot be imported \(No module named.*install it"),
        (["tests.custom_rewards.lenght_reward"], r"cannot be imported \(.* has no attribute 'lenght_reward'"),
        (["get_soft_overlong_punishment"], r"`soft_punish_cache` is 256, but .*below `max_completion_length` \(20"),
    ],
)
def test_unavailable_rewards_are_refused_with_field_reason_and_remedy(names, message):
    with pytest.raises(ValueError, match=message):
        load(*names)


@pytest.mark.parametrize(
    ("name", "column", "remedy"),
    [
        ("accuracy_reward", "solution", "set `answer_column`"),
        ("reasoning_accuracy_reward", "solution", "set `answer_column`"),
        ("tests.custom_rewards.difficulty_reward", "difficulty", "add the column 'difficulty'"),
        ("task", "entry", "add the column 'entry'"),
    ],
)
def test_a_reward_without_its_column_is_refused(name, column, remedy):
    task = "chain_sum" if name == "task" else None

    with pytest.raises(
        ValueError, match=rf"'{name}', which reads the column '{column}', but .* only prompt: {remedy}"
    ):
        load(name, task=task, columns=("prompt",))
