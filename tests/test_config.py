import dataclasses
import json
import math
import re
import warnings
from pathlib import Path

import pytest
from trl import GRPOConfig, TrlParser

from oblr_trl import OBLRPOConfig

DOCS = Path(__file__).parent.parent / "docs" / "inherited_options.md"


def config(tmp_path, **options):
    defaults = {"use_cpu": True, "bf16": False, "report_to": "none", "per_device_train_batch_size": 128}
    return OBLRPOConfig(str(tmp_path), **(defaults | options))


# Inherited option -> settings under which it is refused.
REFUSED = {
    "use_liger_kernel": [{"use_liger_kernel": True}],
}
# Refused by the trainer (tests/test_trainer.py) rather than by the configuration.
REFUSED_ELSEWHERE = {"fsdp", "fsdp_config"}
# Inherited option -> settings under which it is honoured with a warning that names it.
QUALIFIED = {
    "top_entropy_quantile": [{"top_entropy_quantile": 0.2}],
    "off_policy_mask_threshold": [{"off_policy_mask_threshold": 0.5}],
    "loss_type": [{"loss_type": "vespo", "use_vllm": True, "vllm_importance_sampling_mode": "token_mask"}],
}
# Inherited option -> settings under which the learning rate is not adapted, which is an error where that was asked for.
NOT_ADAPTED = {
    "lr_scheduler_type": [
        {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps", "eval_steps": 1},
        {"lr_scheduler_type": "greedy", "eval_strategy": "steps", "eval_steps": 1},
    ],
    "optim": [{"optim": "galore_adamw_layerwise", "optim_target_modules": ["x"]}, {"optim": "lomo"}],
    "steps_per_generation": [
        {"steps_per_generation": 3, "gradient_accumulation_steps": 2},
        {"steps_per_generation": 1, "num_iterations": 2, "gradient_accumulation_steps": 3},
    ],
    "per_device_train_batch_size": [{"per_device_train_batch_size": 8}],
}
# By the trainer rather than by the configuration, or an alias of another row.
NOT_ADAPTED_ELSEWHERE = {"deepspeed", "gradient_accumulation_steps"}


def cases(table):
    return [(name, options) for name, rows in table.items() for options in rows]


@pytest.mark.parametrize(("name", "options"), cases(REFUSED))
def test_what_cannot_be_honoured_is_refused_with_field_reason_and_remedy(tmp_path, name, options):
    with pytest.raises(ValueError, match=rf"cannot honour {name}=.+: .+\. Remedy: .+\.$"):
        config(tmp_path, **options)
    kept = config(tmp_path, **options, baseline="leave_one_out", lr_adaptation="none")  # nothing needs scores
    assert getattr(kept, name) == options[name]


@pytest.mark.parametrize(("name", "options"), cases(QUALIFIED))
def test_what_is_honoured_in_part_is_warned_of_where_it_matters(tmp_path, name, options):
    with pytest.warns(UserWarning, match=f"(?i)^{name}={options[name]!r}: .+baseline.+ SNR.+"):
        assert getattr(config(tmp_path, **options), name) == options[name]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        config(tmp_path, **options, baseline="leave_one_out", lr_adaptation="none")


@pytest.mark.parametrize(("name", "options"), cases(NOT_ADAPTED))
def test_a_rate_that_cannot_be_adapted_is_an_error_only_where_that_was_asked_for(tmp_path, name, options):
    named = "lr_adaptation" if name == "per_device_train_batch_size" else name
    match = rf"cannot honour {named}=.+: .+\. Remedy: .+ lr_adaptation='none'\.$"
    for adaptation in ("trust_region", "snr"):
        with pytest.raises(ValueError, match=match):
            config(tmp_path, **options, lr_adaptation=adaptation)
    for scope in ({}, {"score_scope": "lm_head"}):
        with pytest.warns(UserWarning, match=f"learning rate is not adapted: lr_adaptation is 'none'.*{match}"):
            args = config(tmp_path, **options, **scope)
        assert args.lr_adaptation == "none"
        assert args.baseline == "gradient_weighted"
        assert args.learning_rate == GRPOConfig.learning_rate
    with pytest.warns(UserWarning, match="not adapted"):
        assert config(tmp_path, **options, learning_rate=0.1).learning_rate == 0.1
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert config(tmp_path, **options, lr_adaptation="none").lr_adaptation == "none"
    assert not [warning for warning in caught if "not adapted" in str(warning.message)]


def test_a_loss_that_nobody_knows_has_no_scores(tmp_path):
    with pytest.raises(ValueError, match=r"cannot honour loss_type='surprise': .+\. Remedy: .+\.$"):
        config(tmp_path, loss_type="surprise")
    assert config(tmp_path, loss_type="surprise", baseline="group_mean", lr_adaptation="none").loss_type == "surprise"


def table():
    """Rows of the document: option names and status."""
    rows = re.findall(r"^\| (`.+?) \| (.+?) \|", DOCS.read_text(), flags=re.MULTILINE)
    return [(re.findall(r"`(\w+)`", names), status) for names, status in rows]


def test_the_document_lists_every_inherited_option_once():
    listed = [name for names, _ in table() for name in names]
    fields = {field.name for field in dataclasses.fields(GRPOConfig)}
    newer = {"activation_checkpointing", "activation_checkpointing_kwargs"}  # than transformers 5.17, vLLM's
    assert sorted(listed) == sorted(fields | newer)


def test_the_document_marks_exactly_the_options_that_are_refused_and_those_with_a_warning():
    marked = {status: {name for names, s in table() if s == status for name in names} for _, status in table()}
    assert marked.keys() == {"honoured", "honoured with a warning", "refused"}
    assert marked["refused"] == set(REFUSED) | REFUSED_ELSEWHERE
    assert len(marked["refused"]) <= 6
    assert marked["honoured with a warning"] == set(QUALIFIED) | set(NOT_ADAPTED) | NOT_ADAPTED_ELSEWHERE


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"baseline": "median"}, "cannot honour baseline='median'"),
        ({"score_scope": "head"}, "cannot honour score_scope='head'"),
        ({"score_method": "guess"}, "cannot honour score_method='guess'"),
        ({"lr_adaptation": "adam"}, "cannot honour lr_adaptation='adam'"),
        ({"baseline": "leave_one_out", "baseline_leave_one_out": False}, "contradicts baseline='leave_one_out'"),
        ({"baseline": "leave_one_out", "baseline_prior_strength": 1.0}, "only 'gradient_weighted' has a prior"),
        ({"baseline_prior_strength": -1.0}, "cannot honour baseline_prior_strength=-1.0"),
        ({"baseline_prior_strength": math.nan}, "cannot honour baseline_prior_strength=nan"),
        ({"baseline_memory_size": -1}, "cannot honour baseline_memory_size=-1"),
        ({"baseline": "leave_one_out", "baseline_memory_size": 1}, "only 'gradient_weighted' has a memory"),
        ({"scale_rewards": "batch", "baseline_memory_size": 1}, "in another unit"),
        ({"multi_objective_aggregation": "normalize_then_sum", "baseline_memory_size": 1}, "in another unit"),
        ({"score_scope": "last_k"}, "cannot honour score_last_k=None"),
        ({"score_last_k": 2}, "cannot honour score_last_k=2"),
        ({"score_scope": "last_k", "score_last_k": 0}, "cannot honour score_last_k=0"),
        ({"score_sketch_dim": 1}, "cannot honour score_sketch_dim=1"),
        ({"per_device_score_batch_size": 0}, "cannot honour per_device_score_batch_size=0"),
        ({"snr_ema_decay": 1.0}, "cannot honour snr_ema_decay=1.0"),
        ({"snr_ema_decay": -0.1}, "cannot honour snr_ema_decay=-0.1"),
        ({"snr_min_multiplier": 0.5, "snr_max_multiplier": 0.2}, "cannot honour snr_min_multiplier=0.5"),
        ({"snr_min_multiplier": -0.5}, "cannot honour snr_min_multiplier=-0.5"),
        # refused by TRL
        ({"per_device_train_batch_size": 6, "num_generations": 4}, "must be divisible by num_generations"),
    ],
)
def test_bad_values_are_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        config(tmp_path, **options)


ALONE = {"num_generations": 1}


@pytest.mark.parametrize(
    "options",
    [
        {"baseline_prior_strength": 0.0},
        {"baseline": "group_mean"},
        {"baseline": "leave_one_out", "lr_adaptation": "none"},
        {"baseline": "length_weighted", "loss_type": "dapo"},
        {"generation_batch_size": 1, "per_device_train_batch_size": 1},
        # As many prompts in a step, but in generation batches of one.
        {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 16, "steps_per_generation": 1},
        {"per_device_train_batch_size": 1, "lr_adaptation": "none"},
    ],
)
def test_one_completion_per_prompt_is_refused_where_no_other_completion_gives_a_baseline(tmp_path, options):
    with pytest.raises(ValueError, match=r"cannot honour num_generations=1: .+\. Remedy: .+\.$"):
        config(tmp_path, **(ALONE | options))


@pytest.mark.parametrize(
    ("options", "per_batch", "micro_batches", "per_step"),
    [
        ({}, 128, 1, 128),
        ({"baseline_prior_strength": math.inf}, 128, 1, 128),
        ({"baseline_leave_one_out": False, "baseline_prior_strength": 4.0}, 128, 1, 128),
        ({"gradient_accumulation_steps": 4}, 512, 4, 512),
        ({"gradient_accumulation_steps": 4, "steps_per_generation": 2}, 256, 2, 512),
        ({"generation_batch_size": 384, "num_iterations": 2}, 384, 3, 128),
        ({"per_device_train_batch_size": 1, "gradient_accumulation_steps": 33}, 33, 33, 33),
        ({"per_device_train_batch_size": 1, "world_size": 32}, 32, 1, 32),
        ({"scale_rewards": "batch"}, 128, 1, 128),
    ],
)
def test_one_completion_per_prompt_is_honoured_with_a_prior(
    tmp_path, monkeypatch, options, per_batch, micro_batches, per_step
):
    options = dict(options)
    monkeypatch.setattr(GRPOConfig, "world_size", options.pop("world_size", 1))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        args = config(tmp_path, **(ALONE | options))
    assert (args.num_generations, type(args.num_generations)) == (1, int)
    assert (args.generation_batch_size, args.steps_per_generation) == (per_batch, micro_batches)
    assert args.prompts_per_step == per_step
    assert args.num_generations_eval is None  # as in TRL: that of training


def test_one_completion_per_prompt_survives_replace_json_and_yaml(tmp_path):
    args = config(tmp_path, **ALONE, gradient_accumulation_steps=2)
    # TRL refuses both of the sizes that it has made of one another.
    replaced = dataclasses.replace(args, generation_batch_size=None, temperature=0.5)
    assert (replaced.num_generations, replaced.generation_batch_size, replaced.temperature) == (1, 256, 0.5)
    assert type(args.to_dict()["num_generations"]) is int
    assert json.loads(args.to_json_string())["num_generations"] == 1
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"output_dir: {tmp_path}\nnum_generations: 1\nper_device_train_batch_size: 32\nuse_cpu: true\nbf16: false\n"
    )
    (parsed,) = TrlParser(OBLRPOConfig).parse_args_and_config(["--config", str(recipe)])
    assert (parsed.num_generations, parsed.generation_batch_size) == (1, 32)


def test_what_trl_checks_of_its_options_is_checked_with_one_completion_per_prompt_too(tmp_path):
    with pytest.raises(ValueError, match="divisible by the number of generations used for evaluation"):
        config(tmp_path, **ALONE, num_generations_eval=3, eval_strategy="steps", eval_steps=1)
    with pytest.raises(ValueError, match="divisible by the global batch size"):
        config(tmp_path, **ALONE, generation_batch_size=129)


def test_few_prompts_of_one_completion_are_warned_of_without_the_advice_to_lower_it(tmp_path):
    with pytest.warns(UserWarning, match="mostly noise: an optimizer step has 4 prompts x 1 completion ") as caught:
        config(tmp_path, **ALONE, per_device_train_batch_size=4, lr_adaptation="snr")
    assert not any("lower num_generations" in str(warning.message) for warning in caught)


def test_defaults_are_the_papers_objective_and_an_automatic_prior(tmp_path):
    args = config(tmp_path)
    assert (args.loss_type, args.scale_rewards, args.beta, args.num_iterations) == ("dr_grpo", "none", 0.0, 1)
    assert args.baseline == "gradient_weighted"
    assert args.baseline_prior_strength is None
    assert args.lr_adaptation == "trust_region"
    assert args.needs_scores


def test_a_memory_is_the_default_of_what_has_a_prior(tmp_path):
    assert config(tmp_path).baseline_memory_size == 65536
    assert config(tmp_path, baseline_prior_strength=4.0).baseline_memory_size == 65536
    assert config(tmp_path, baseline_memory_size=0).baseline_memory_size == 0
    assert config(tmp_path, baseline="group_mean").baseline_memory_size == 0
    assert config(tmp_path, baseline_prior_strength=0.0).baseline_memory_size == 0
    assert config(tmp_path, baseline_prior_strength=0.0, baseline_memory_size=9).baseline_memory_size == 9
    assert config(tmp_path, baseline_prior_strength=math.inf).baseline_memory_size == 0
    # A deviation of the batch divides what lies in it; a remembered reward may not.
    for scaled in ("group", "batch", True):
        assert config(tmp_path, scale_rewards=scaled).baseline_memory_size == 0
    assert config(tmp_path, scale_rewards=False).baseline_memory_size == 65536
    assert config(tmp_path, multi_objective_aggregation="normalize_then_sum").baseline_memory_size == 0
    # The default that a copy inherits is still one.
    copied = dataclasses.replace(config(tmp_path), baseline="group_mean", generation_batch_size=None)
    assert copied.baseline_memory_size == 0


def test_every_own_field_has_help_and_a_docstring_entry():
    inherited = {field.name for field in dataclasses.fields(GRPOConfig)}
    for field in dataclasses.fields(OBLRPOConfig):
        if field.name not in inherited:
            assert field.metadata["help"]
            assert f"        {field.name} (`" in OBLRPOConfig.__doc__


def test_the_default_rate_is_trls_where_nothing_multiplies_it(tmp_path):
    assert config(tmp_path, lr_adaptation="snr").learning_rate == 5e-6
    assert config(tmp_path).learning_rate == GRPOConfig(str(tmp_path), bf16=False).learning_rate
    assert config(tmp_path, lr_adaptation="none").learning_rate == GRPOConfig(str(tmp_path), bf16=False).learning_rate
    assert config(tmp_path, lr_adaptation="none", learning_rate=3e-6).learning_rate == 3e-6


# Prompts per step: TRL's batch defaults are 8 completions, one prompt, on one process.
def test_one_prompt_per_step_has_neither_an_snr_nor_a_prior(tmp_path):
    with pytest.raises(
        ValueError, match=r"lr_adaptation='trust_region': an optimizer step has 1 prompt x 8 .* Remedy: raise grad"
    ):
        config(tmp_path, per_device_train_batch_size=8, lr_adaptation="trust_region")
    with pytest.warns(UserWarning, match="The baseline has no prior"):
        config(tmp_path, per_device_train_batch_size=8)


@pytest.mark.parametrize(
    "options",
    [
        {"lr_adaptation": "none", "baseline_prior_strength": 0.0},
        {"lr_adaptation": "none", "baseline": "leave_one_out"},
        {"lr_adaptation": "none", "baseline": "group_mean"},
    ],
)
def test_one_prompt_per_step_is_enough_for_what_looks_at_one_prompt(tmp_path, options):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert config(tmp_path, per_device_train_batch_size=8, **options).prompts_per_step == 1


@pytest.mark.parametrize("num_prompts", [2, 8, 15])
def test_few_prompts_per_step_are_warned_of(tmp_path, num_prompts):
    with pytest.warns(UserWarning, match=f"rho will be mostly noise: an optimizer step has {num_prompts} prompts x 8"):
        config(tmp_path, per_device_train_batch_size=8, gradient_accumulation_steps=num_prompts, lr_adaptation="snr")


@pytest.mark.parametrize(("accumulation", "warned"), [(2, True), (3, True), (4, False)])
def test_few_completions_per_batch_are_warned_of_under_the_trust_region(tmp_path, accumulation, warned):
    """It does not need rho, and few prompts as such are no matter."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        config(tmp_path, per_device_train_batch_size=8, gradient_accumulation_steps=accumulation)
    texts = [str(warning.message) for warning in caught]
    assert any(f"measured on {8 * accumulation} completions" in text for text in texts) == warned
    assert not any("rho" in text for text in texts)


def test_sixteen_prompts_per_step_are_not_warned_of(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        config(tmp_path, per_device_train_batch_size=8, gradient_accumulation_steps=16, lr_adaptation="snr")
        # Two steps of 8 prompts share a batch of 16, from which rho is estimated.
        config(tmp_path, per_device_train_batch_size=64, steps_per_generation=2, lr_adaptation="snr")


@pytest.mark.parametrize(
    ("accumulation", "per_generation", "iterations", "prompts"),
    [(4, 4, 1, 4), (4, 1, 2, 2), (4, 1, 4, 1), (4, 2, 4, 2), (4, 4, 2, 4), (2, 4, 2, 2)],
)
def test_a_prompt_that_a_step_sees_in_several_iterations_counts_once(
    accumulation, per_generation, iterations, prompts
):
    options = {
        "per_device_train_batch_size": 8,
        "num_generations": 8,
        "gradient_accumulation_steps": accumulation,
        "steps_per_generation": per_generation,
        "num_iterations": iterations,
        "use_cpu": True,
        "bf16": False,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain = OBLRPOConfig("folder", lr_adaptation="none", baseline="leave_one_out", **options)
        assert plain.prompts_per_step == prompts
        if prompts == 1:
            with pytest.raises(ValueError, match="has 1 prompt x 8 completions"):
                OBLRPOConfig("folder", lr_adaptation="snr", **options)
