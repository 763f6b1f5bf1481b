"""Completions that a rollout function or continuous batching has made are scored as those of `generate` are."""

import pytest

from tests.drop_in.expected_advantages import assert_advantages
from tests.drop_in.scripts import CONFIGS, OFF_POLICY, G, both_trainers, run


@both_trainers
@pytest.mark.filterwarnings("ignore:You are using 'rollout_func', which is an experimental feature")
@pytest.mark.parametrize("with_mask", [False, True], ids=["", "with env_mask"])
@pytest.mark.parametrize("options", [{}, OFF_POLICY], ids=["on policy", "off policy"])
def test_a_rollout_function_writes_the_completions(tmp_path, trainer_class, with_mask, options):
    """Row i of call n completes with tokens that the test knows, and hands over its own reward. Off policy there is a forward
    pass for old log-probabilities, which knows of no mask."""
    num_calls = 0

    def rollout(prompts, trainer):
        nonlocal num_calls
        rows = range(len(prompts))
        output = {
            "prompt_ids": trainer.processing_class(prompts)["input_ids"],
            "completion_ids": [completion(num_calls, i) for i in rows],
            "logprobs": [[-1.0] * len(completion(num_calls, i)) for i in rows],
            "points": [points(num_calls, i) for i in rows],
        }
        if with_mask:
            output["env_mask"] = [mask(num_calls, i) for i in rows]
        num_calls += 1
        return output

    def completion(call, i):
        return [3 + (5 * i + 7 * j + call) % 25 for j in range(2 + i % 4)] + [1]

    def mask(call, i):
        return [j % 2 for j in range(len(completion(call, i)))]

    def points(call, i):
        return (3 * i + call) % 7 / 7

    trainer = run(
        trainer_class,
        tmp_path,
        trainer={"rollout_func": rollout, "reward_funcs": lambda completions, points, **kwargs: points},
        **options,
    )
    assert num_calls == 2
    for call, batch in enumerate(trainer.batches):
        rows = zip(batch["completion_ids"], batch["completion_mask"], strict=True)
        for i, (ids, completion_mask) in enumerate(rows):
            assert ids[completion_mask.bool()].tolist() == completion(call, i)
            if with_mask:
                assert batch["tool_mask"][i][completion_mask.bool()].tolist() == mask(call, i)
    call_of = {id(batch): call for call, batch in enumerate(trainer.batches)}
    assert_advantages(trainer, lambda batch: [points(call_of[id(batch)], i) for i in range(4 * G)])


@both_trainers
def test_continuous_batching_generates(tmp_path, trainer_class):
    trainer = run(
        trainer_class,
        tmp_path,
        use_transformers_continuous_batching=True,
        transformers_continuous_batching_config={"page_size": 16, "num_blocks": 64, "max_batch_tokens": 64},
    )
    assert_advantages(trainer)


@both_trainers
@pytest.mark.filterwarnings("ignore:`use_transformers_paged` is deprecated")
def test_the_older_name_of_continuous_batching_still_switches_it_on(tmp_path, trainer_class):
    options = {"use_cpu": True, "bf16": False, "gradient_accumulation_steps": 2}
    args = CONFIGS[trainer_class](str(tmp_path), use_transformers_paged=True, **options)
    assert args.use_transformers_continuous_batching
