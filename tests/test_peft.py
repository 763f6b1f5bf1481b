"""LoRA against one float64 backward per sequence, and through the real trainer: what is scored, what is refused."""

import pytest
import torch
from peft import IA3Config, LNTuningConfig, LoraConfig, PrefixTuningConfig, get_peft_model
from peft.tuners.lily import LilyConfig

from oblr_trl import OBLRPOConfig, OBLRPOTrainer, gradient_weighted_baseline
from oblr_trl.scores import reference_scores, score_sketches
from oblr_trl.scores.scopes import resolve_scope
from tests.recording import Recording
from tests.test_scores import SCOPES, assert_equal_to_the_oracle
from tests.tiny_models import algorithm_state, construct, logged, random_batch, tiny_model, train

# A parameter that the pass cannot see is an error here.
pytestmark = pytest.mark.filterwarnings("error:.*were not called in the scoring pass")


def lora_config(**options):
    return LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], **options})


@torch.no_grad()
def adapted(config, architecture="qwen3"):
    """A float64 model with the adapter, its parameters moved away from zeros and from copies of the base."""
    model = get_peft_model(tiny_model(architecture, num_layers=2), config).double().eval()
    generator = torch.Generator().manual_seed(7)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return model


def trainable(model):
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


HONOURED = {
    "queries and values": (lora_config(), "qwen3"),
    "transposed layers": (lora_config(target_modules=["c_attn", "c_proj"], fan_in_fan_out=True), "gpt2"),
    "rank-stabilised": (lora_config(use_rslora=True), "qwen3"),
    "biases of the adapter": (lora_config(lora_bias=True), "qwen2"),
    "all biases": (lora_config(bias="all"), "qwen2"),
    "biases of adapted layers": (lora_config(bias="lora_only"), "qwen2"),
    "a whole block part": (lora_config(modules_to_save=["mlp"]), "qwen3"),
    "the last norm": (lora_config(modules_to_save=["norm"]), "qwen3"),
    "an untied head": (lora_config(modules_to_save=["lm_head"]), "qwen3_untied"),
    "a copy of a tied head": (lora_config(modules_to_save=["lm_head"]), "qwen3"),
    "an untied embedding": (lora_config(modules_to_save=["embed_tokens"]), "qwen3_untied"),
    "norms": (LNTuningConfig(target_modules=["input_layernorm", "norm"]), "qwen3"),
    "two copies": (lora_config(modules_to_save=["lm_head", "embed_tokens"]), "qwen3"),
    "two copies that stay tied": (
        lora_config(modules_to_save=["lm_head", "embed_tokens"], ensure_weight_tying=True),
        "qwen3",
    ),
}


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize("name", HONOURED)
def test_scores_of_an_adapter_equal_the_oracle_over_its_parameters(name):
    model = adapted(*HONOURED[name])
    names = trainable(model)
    assert_equal_to_the_oracle(model)
    assert set(resolve_scope(model, "all", None).shapes) == set(names)  # the adapter, and only it


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize(("scope", "last_k"), SCOPES)
@pytest.mark.parametrize("modules_to_save", [None, ["lm_head"]], ids=["adapters", "adapters and head"])
def test_every_scope_serves_adapters(scope, last_k, checkpointing, modules_to_save):
    model = adapted(lora_config(target_modules="all-linear", modules_to_save=modules_to_save))
    if checkpointing:  # as the trainer switches it on: the frozen embedding's output is made to require a gradient
        model.train().gradient_checkpointing_enable()
        model.enable_input_require_grads()
    assert_equal_to_the_oracle(model, scope=scope, last_k=last_k)
    expected = {"all": 28, "last_k": 14 * (last_k or 0), "lm_head": 0}  # A and B of 7 layers in each of 2 blocks
    scored = resolve_scope(model, scope, last_k)
    assert sum(len(names) for names in scored.names.values()) == expected[scope]
    # the head's score is taken where it is frozen, too, if it is asked for by name
    assert list(scored.head_names) == (["weight"] if modules_to_save or scope == "lm_head" else [])


def test_float32_adapters_of_a_bfloat16_model_stay_close():
    """PEFT keeps adapters in float32 by default; their scores must neither fail on two dtypes nor lose the small one."""
    config = lora_config(target_modules="all-linear", init_lora_weights=False)
    batch = random_batch()
    truth = score_sketches(get_peft_model(tiny_model(num_layers=2), config).eval(), *batch, method="exact")
    half = get_peft_model(tiny_model(num_layers=2).to(torch.bfloat16), config).eval()
    assert {p.dtype for p in half.parameters() if p.requires_grad} == {torch.float32}
    estimate = score_sketches(half, *batch, method="exact")
    torch.testing.assert_close(estimate[1:], truth[1:], rtol=0.1, atol=0)


REFUSED = {
    "DoRA": (lora_config(use_dora=True), r"DoraLinearVariant`, which trains `base_model.*lora_A\.default\.weight"),
    "LoRA on the embedding": (
        lora_config(target_modules=["q_proj", "embed_tokens"]),
        r"lora\.layer\.Embedding`.*embed_tokens\.lora_embedding_A\.default",
    ),
    "bare parameters": (
        lora_config(target_modules=[], target_parameters=["mlp.gate_proj.weight"]),
        r"lora\.layer\.ParamWrapper`",
    ),
    "trainable tokens": (lora_config(trainable_token_indices=[3, 4]), "TrainableTokensLayer`"),
    "IA3": (IA3Config(target_modules=["q_proj"], feedforward_modules=[]), r"peft\.tuners\.ia3.*ia3_l\.default"),
    "Lily": (LilyConfig(target_modules=["q_proj"]), r"peft\.tuners\.lily.*lily_A"),
    "a prefix": (PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"), "PrefixEncoder`"),
}


@pytest.mark.filterwarnings("ignore:.*lm_head")
@pytest.mark.parametrize("name", REFUSED)
def test_methods_other_than_lora_are_refused_by_name_before_any_work(tmp_path, name):
    config, message = REFUSED[name]
    model, trainer = tiny_model("qwen3_untied", num_layers=2), {"peft_config": config}
    with pytest.raises(ValueError, match=rf"{message}.*use `scope='auto'`.*or `scope='lm_head'`"):
        construct(OBLRPOTrainer, OBLRPOConfig, tmp_path, model=model, trainer=trainer, score_scope="all")


@pytest.mark.filterwarnings("ignore:.*lm_head")
@pytest.mark.parametrize("name", [name for name in REFUSED if name not in ("Lily", "a prefix")])
def test_methods_without_a_rule_train_with_the_default_options(tmp_path, name, caplog):
    options = {"gradient_checkpointing": False, "lr_adaptation": None, "max_steps": 1}
    model = tiny_model("qwen3_untied", num_layers=2)
    trainer = train(Recording, OBLRPOConfig, tmp_path, model=model, peft_config=REFUSED[name][0], **options)
    assert "Left out of the baseline's weights and of the SNR" in caplog.text
    covered = resolve_scope(trainer.model, "auto", None).coverage
    assert trainer.args.lr_adaptation == ("trust_region" if covered >= 0.9 else "snr")
    moved = [
        key for key, parameter in trainer.model.named_parameters() if not torch.equal(parameter, trainer.start[key])
    ]
    assert moved
    assert all(value > 0 for value in logged(trainer, "score/norm/mean"))


# Lily's router averages over the batch, so no sequence has a log-probability of its own.
@pytest.mark.parametrize("name", [name for name in REFUSED if name != "Lily"])
def test_the_remedy_of_scoring_the_head_alone_works(name):
    assert_equal_to_the_oracle(adapted(REFUSED[name][0], "qwen3_untied"), scope="lm_head")


@pytest.mark.parametrize("scope", ["all", "lm_head"])
@pytest.mark.parametrize(
    ("config", "architecture", "message"),
    [
        (lora_config(target_modules=["q_proj", "lm_head"]), "qwen3_untied", r"lora\.layer\.Linear`"),
        (lora_config(trainable_token_indices=[3, 4]), "qwen3", "TrainableTokensWrapper`"),  # tied: the head takes part
    ],
    ids=["LoRA", "trainable tokens"],
)
def test_adapters_that_replace_the_head_are_refused_by_name(config, architecture, message, scope):
    with pytest.raises(ValueError, match=rf"{message}.*Leave the head out of adapters.*modules_to_save="):
        score_sketches(adapted(config, architecture), *random_batch(), scope=scope)


TRAINED = {
    "LoRA": lora_config(target_modules="all-linear"),
    "LoRA and the head": lora_config(modules_to_save=["lm_head"]),
}


@pytest.mark.parametrize(
    "checkpointing", ["plain", "checkpointing", "reentrant"]
)  # TRL sets the last one under ZeRO-3
@pytest.mark.parametrize("name", TRAINED)
def test_advantages_come_from_the_adapters_full_gradients(tmp_path, name, checkpointing):
    options = {"score_method": "exact", "baseline_prior_strength": 2.0, "learning_rate": 1e-2}
    options["gradient_checkpointing"] = checkpointing != "plain"
    if checkpointing != "plain":
        options["gradient_checkpointing_kwargs"] = {"use_reentrant": checkpointing == "reentrant"}
    trainer = train(Recording, OBLRPOConfig, tmp_path, peft_config=TRAINED[name], **options)
    assert trainer.model.is_gradient_checkpointing == options["gradient_checkpointing"]

    oracle = get_peft_model(tiny_model(num_layers=2), TRAINED[name])
    assert len(trainer.batches) == trainer.state.global_step
    for batch in trainer.batches:
        oracle.load_state_dict(batch["state"])
        input_ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
        attention_mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
        scores = reference_scores(oracle, input_ids, attention_mask, batch["completion_mask"], dtype=torch.float64)
        weights = scores.square().sum(dim=1).view_as(batch["rewards"])
        expected = batch["rewards"] - gradient_weighted_baseline(batch["rewards"], weights, prior_strength=2.0)
        torch.testing.assert_close(batch["advantages"].view_as(expected), expected, rtol=1e-4, atol=1e-6)
    for parameter_name, parameter in trainer.model.named_parameters():
        assert torch.equal(parameter, trainer.start[parameter_name]) != parameter.requires_grad, parameter_name


def test_a_run_resumed_with_an_adapter_equals_an_uninterrupted_one(tmp_path):
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "cosine"}
    options["peft_config"] = lora_config(modules_to_save=["lm_head"])
    whole = train(OBLRPOTrainer, OBLRPOConfig, tmp_path / "whole", **options)
    checkpoint = str(tmp_path / "whole" / "checkpoint-2")
    resumed = train(OBLRPOTrainer, OBLRPOConfig, tmp_path / "resumed", **options, resume_from_checkpoint=checkpoint)
    for (name, a), (_, b) in zip(whole.model.named_parameters(), resumed.model.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    for name in ("learning_rate", "lr_multiplier", "loss", "score/norm/mean", "gradient_snr/rho", "baseline/mean"):
        assert logged(resumed, name) == logged(whole, name), name
    assert algorithm_state(resumed) == algorithm_state(whole)


def test_dora_trains_with_the_score_of_the_head(tmp_path):
    options = {"peft_config": lora_config(use_dora=True), "score_scope": "lm_head", "max_steps": 2}
    trainer = train(Recording, OBLRPOConfig, tmp_path, **options)
    for name, parameter in trainer.model.named_parameters():
        assert torch.equal(parameter, trainer.start[name]) != parameter.requires_grad, name
    assert all(value > 0 for value in logged(trainer, "score/norm/mean"))


def test_a_head_copy_whose_forward_the_trainer_replaces_is_refused(tmp_path):
    with pytest.raises(ValueError, match="cast_lm_head_to_fp32=False"):
        construct(
            OBLRPOTrainer,
            OBLRPOConfig,
            tmp_path,
            model=tiny_model("qwen3_untied", num_layers=2),
            trainer={"peft_config": lora_config(modules_to_save=["lm_head"])},
            cast_lm_head_to_fp32=True,
        )
