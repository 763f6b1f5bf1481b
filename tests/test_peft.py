"""PEFT adapters against one float64 backward per sequence, and through the real trainer: what is scored, what is refused."""

import pytest
import torch
from peft import (
    IA3Config,
    LNTuningConfig,
    LoHaConfig,
    LoraConfig,
    OFTConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    VeraConfig,
    get_peft_model,
)
from peft.tuners.lily import LilyConfig

from oblr_trl import OBLRPOConfig, OBLRPOTrainer, gradient_weighted_baseline
from oblr_trl.scores import reference_scores, score_sketches
from oblr_trl.scores.scopes import resolve_scope
from tests.recording import Recording
from tests.tiny_models import construct, logged, random_batch, tiny_model, train

TOLERANCE = 1e-10

# A parameter that the pass cannot see is an error here, unless a test expects the warning.
pytestmark = pytest.mark.filterwarnings("error:.*were not called in the scoring pass")


def lora_config(**options):
    return LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], **options})


def adapted(config, architecture="qwen3", *, generic=True):
    """A float64 model with the adapter; `generic` moves its parameters away from zeros and from copies of the base."""
    model = get_peft_model(tiny_model(architecture, num_layers=2), config).double().eval()
    return perturbed(model) if generic else model


@torch.no_grad()
def perturbed(model):
    generator = torch.Generator().manual_seed(7)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return model


def trainable(model):
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def assert_equal_to_the_oracle(model, *, scope="all", last_k=None, batch=None):
    """Exact norms, and inner products of sketches that are wide enough not to be projected."""
    batch = random_batch() if batch is None else batch
    options = {"scope": scope, "last_k": last_k}
    scores = reference_scores(model, *batch, **options)
    gram = scores @ scores.T
    norms = gram.diagonal()
    assert (norms[1:] > 0).all()  # the first completion of the batch is empty
    exact = score_sketches(model, *batch, method="exact", **options)
    torch.testing.assert_close(exact, norms, rtol=TOLERANCE, atol=0)
    sketches = score_sketches(model, *batch, sketch_dim=65536, **options)
    scale = norms.sqrt().outer(norms.sqrt())
    assert ((sketches @ sketches.T - gram).abs() <= TOLERANCE * scale).all()


# --- scores -------------------------------------------------------------------------------------------------------------

HONOURED = {
    "all linear layers": (lora_config(target_modules="all-linear"), "qwen3"),
    "queries and values": (lora_config(), "qwen3"),
    "transposed layers": (lora_config(target_modules=["c_attn", "c_proj"], fan_in_fan_out=True), "gpt2"),
    "rank-stabilised": (lora_config(use_rslora=True), "qwen3"),
    "biases of the adapter": (lora_config(lora_bias=True), "qwen2"),
    "all biases": (lora_config(bias="all"), "qwen2"),
    "biases of adapted layers": (lora_config(bias="lora_only"), "qwen2"),
    "principal components": (lora_config(init_lora_weights="pissa"), "qwen3"),
    "ranks by layer": (lora_config(rank_pattern={"v_proj": 2}, alpha_pattern={"v_proj": 32}), "qwen3"),
    "a whole block part": (lora_config(modules_to_save=["mlp"]), "qwen3"),
    "the last norm": (lora_config(modules_to_save=["norm"]), "qwen3"),
    "an untied head": (lora_config(modules_to_save=["lm_head"]), "qwen3_untied"),
    "a copy of a tied head": (lora_config(modules_to_save=["lm_head"]), "qwen3"),
    "an untied embedding": (lora_config(modules_to_save=["embed_tokens"]), "qwen3_untied"),
    "a copy of a tied embedding": (lora_config(modules_to_save=["embed_tokens"]), "qwen3"),
    "two copies": (lora_config(modules_to_save=["lm_head", "embed_tokens"]), "qwen3"),
    "two copies that stay tied": (
        lora_config(modules_to_save=["lm_head", "embed_tokens"], ensure_weight_tying=True),
        "qwen3",
    ),
    "LayerNorm tuning": (LNTuningConfig(target_modules=["input_layernorm", "norm"]), "qwen3"),
    "a prefix": (PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"), "qwen3"),
    "a projected prefix": (
        PrefixTuningConfig(num_virtual_tokens=3, prefix_projection=True, encoder_hidden_size=8, task_type="CAUSAL_LM"),
        "qwen3",
    ),
}


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize("name", HONOURED)
def test_scores_of_an_adapter_equal_the_oracle_over_its_parameters(name):
    config, architecture = HONOURED[name]
    model = adapted(config, architecture)
    names = trainable(model)
    assert_equal_to_the_oracle(model)
    scored = resolve_scope(model, "all", None).shapes
    assert set(scored) == set(names)  # the adapter, and only it


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize(("scope", "last_k"), [("all", None), ("last_k", 1), ("last_k", 2), ("lm_head", None)])
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


def test_a_tied_copy_is_one_matrix():
    """With `ensure_weight_tying` the head and the embedding train one matrix: the cross term of its two uses counts."""
    tied = adapted(lora_config(modules_to_save=["embed_tokens"], ensure_weight_tying=True))
    shapes = resolve_scope(tied, "all", None).shapes
    assert [shape for shape in shapes.values() if 40 in shape] == [(40, 64)]
    assert_equal_to_the_oracle(tied)


def test_fresh_adapters_have_a_score_through_b_alone():
    """B starts at zero, so the gradient of A is zero and that of B is not."""
    model = adapted(lora_config(), generic=False)
    scores = reference_scores(model, *random_batch())
    a = torch.cat([torch.full((p.numel(),), "lora_A" in n) for n, p in model.named_parameters() if p.requires_grad])
    assert (scores[:, a] == 0).all()
    assert_equal_to_the_oracle(model)


def test_the_scaling_of_rank_stabilised_lora_is_in_its_scores():
    """Fresh adapters leave the forward pass alone and the gradient of B is proportional to the scaling: alpha / r is
    8 / 4 = 2, alpha / sqrt(r) is 8 / 2 = 4, and squared norms differ by (4 / 2)^2 = 4."""
    batch = random_batch()
    plain, stabilised = (
        score_sketches(adapted(lora_config(use_rslora=rslora), generic=False), *batch, method="exact")
        for rslora in (False, True)
    )
    torch.testing.assert_close(stabilised, 4 * plain, rtol=TOLERANCE, atol=0)


def test_dropout_inside_an_adapter_is_that_of_the_pass():
    model = adapted(lora_config(lora_dropout=0.5))
    batch = [tensor[1:2] for tensor in random_batch()]  # one sequence: the oracle then draws the same masks
    norms = []
    for training in (False, True):
        model.train(training)
        torch.manual_seed(1)
        norms.append(score_sketches(model, *batch, method="exact"))
        torch.manual_seed(1)
        truth = reference_scores(model, *batch).square().sum(dim=1)
        torch.testing.assert_close(norms[-1], truth, rtol=TOLERANCE, atol=0)
    assert (norms[1] - norms[0]).abs() > 1e-6 * norms[0]


def test_only_active_adapters_are_scored():
    model = adapted(lora_config())
    model.add_adapter("second", lora_config(target_modules=["o_proj"], modules_to_save=["norm"]))
    for active in (["second"], ["default"], ["default", "second"]):
        model.base_model.set_adapter(active)
        perturbed(model.double())
        # "...lora_A.default.weight": PEFT's name of the adapter is the second to last part
        assert {name.split(".")[-2] for name in resolve_scope(model, "all", None).shapes} == set(active)
        assert_equal_to_the_oracle(model)


def test_a_head_copy_of_an_inactive_adapter_is_not_the_head():
    model = adapted(lora_config(modules_to_save=["lm_head"]))
    model.add_adapter("headless", lora_config())
    model.set_adapter("headless")
    perturbed(model.double())
    assert resolve_scope(model, "all", None).head is model.get_output_embeddings().original_module
    assert_equal_to_the_oracle(model)
    model.set_adapter("default")
    with model.disable_adapter():
        assert_equal_to_the_oracle(model, scope="lm_head")


def test_an_inactive_adapter_of_a_refused_kind_is_nobodys_business():
    model = adapted(lora_config())
    model.add_adapter("weighted", lora_config(use_dora=True))
    assert_equal_to_the_oracle(model.double())
    model.set_adapter("weighted")
    with pytest.raises(ValueError, match="DoRA"):
        score_sketches(model, *random_batch())


@pytest.mark.parametrize("modules_to_save", [None, ["lm_head"]], ids=["adapters", "adapters and head"])
def test_a_reloaded_adapter_has_the_scores_of_the_saved_one(tmp_path, modules_to_save):
    model = adapted(lora_config(target_modules="all-linear", modules_to_save=modules_to_save))
    model.save_pretrained(tmp_path)
    batch = random_batch()
    expected = score_sketches(model, *batch)

    base = tiny_model(num_layers=2).double()
    reloaded = PeftModel.from_pretrained(base, tmp_path, is_trainable=True, autocast_adapter_dtype=False).eval()
    assert torch.equal(score_sketches(reloaded, *batch), expected)

    frozen = PeftModel.from_pretrained(tiny_model(num_layers=2).double(), tmp_path)
    with pytest.raises(ValueError, match=r"no trainable parameter in scope 'all'.*is_trainable=True"):
        score_sketches(frozen, *batch)


def test_merging_and_unmerging_leave_the_scores():
    model = adapted(lora_config())
    batch = random_batch()
    before = score_sketches(model, *batch)
    head = score_sketches(model, *batch, scope="lm_head")
    model.merge_adapter()
    with pytest.warns(UserWarning, match="8 layers with trainable parameters were not called"):
        assert (score_sketches(model, *batch) == 0).all()  # as autograd has it: a merged adapter is not used
    model.unmerge_adapter()
    torch.testing.assert_close(score_sketches(model, *batch), before, rtol=1e-8, atol=1e-10)

    merged = model.merge_and_unload()  # the same policy without adapter: its head has the same score
    torch.testing.assert_close(score_sketches(merged, *batch, scope="lm_head"), head, rtol=1e-8, atol=1e-10)
    with pytest.raises(ValueError, match="no trainable parameter"):
        score_sketches(merged, *batch)


def test_float32_adapters_of_a_bfloat16_model_stay_close():
    """PEFT keeps adapters in float32 by default; their scores must neither fail on two dtypes nor lose the small one."""
    config = lora_config(target_modules="all-linear", init_lora_weights=False)
    batch = random_batch()
    truth = score_sketches(get_peft_model(tiny_model(num_layers=2), config).eval(), *batch, method="exact")
    half = get_peft_model(tiny_model(num_layers=2).to(torch.bfloat16), config).eval()
    assert {p.dtype for p in half.parameters() if p.requires_grad} == {torch.float32}
    estimate = score_sketches(half, *batch, method="exact")
    torch.testing.assert_close(estimate[1:], truth[1:], rtol=0.1, atol=0)


# --- refusals -----------------------------------------------------------------------------------------------------------

REFUSED = {
    "DoRA": (lora_config(use_dora=True), r"DoRA.*`base_model.*lora_A\.default\.weight`.*`use_dora=False`"),
    "LoRA on the embedding": (
        lora_config(target_modules=["q_proj", "embed_tokens"]),
        r"LoRA on an embedding.*embed_tokens\.lora_embedding_A\.default.*Remove it from `target_modules`",
    ),
    "bare parameters": (
        lora_config(target_modules=[], target_parameters=["mlp.gate_proj.weight"]),
        r"bare parameters \(`target_parameters`\).*`target_modules`",
    ),
    "trainable tokens": (lora_config(trainable_token_indices=[3, 4]), r"`trainable_token_indices`.*`modules_to_save`"),
    "an invocation sequence": (
        lora_config(alora_invocation_tokens=[5], task_type="CAUSAL_LM"),
        "ALoraLinearVariant.*plain LoRA",
    ),
    "IA3": (IA3Config(target_modules=["q_proj"], feedforward_modules=[]), r"peft\.tuners\.ia3.*ia3_l\.default"),
    "LoHa": (LoHaConfig(target_modules=["q_proj"]), r"peft\.tuners\.loha.*hada_w1_a\.default"),
    "OFT": (OFTConfig(target_modules=["q_proj"]), r"peft\.tuners\.oft.*oft_R\.default"),
    "VeRA": (VeraConfig(target_modules=["q_proj"]), r"peft\.tuners\.vera.*vera_lambda_b\.default"),
    "Lily": (LilyConfig(target_modules=["q_proj"]), r"peft\.tuners\.lily.*lily_A"),
    "prompt tuning": (
        PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
        r"peft\.tuners\.prompt_tuning.*prompt_encoder\.default\.embedding\.weight",
    ),
}


def construct_with(config, output_dir, **options):
    model = tiny_model("qwen3_untied", num_layers=2)
    return construct(OBLRPOTrainer, OBLRPOConfig, output_dir, model=model, trainer={"peft_config": config}, **options)


@pytest.mark.filterwarnings("ignore:.*lm_head")
@pytest.mark.parametrize("name", REFUSED)
def test_methods_that_taps_cannot_see_are_refused_by_name_before_any_work(tmp_path, name):
    config, message = REFUSED[name]
    with pytest.raises(ValueError, match=rf"{message}.*or score the output projection alone \(`scope='lm_head'`"):
        construct_with(config, tmp_path)


# Lily's router averages over the batch, so no sequence has a log-probability of its own.
@pytest.mark.parametrize("name", [name for name in REFUSED if name != "Lily"])
def test_the_remedy_of_scoring_the_head_alone_works(name):
    model = adapted(REFUSED[name][0], "qwen3_untied")
    assert_equal_to_the_oracle(model, scope="lm_head")


@pytest.mark.parametrize("scope", ["all", "lm_head"])
@pytest.mark.parametrize(
    ("config", "architecture", "message"),
    [
        (
            lora_config(target_modules=["q_proj", "lm_head"]),
            "qwen3_untied",
            r"peft\.tuners\.lora\.layer\.Linear`: LoRA on the head.*modules_to_save=",
        ),
        (
            lora_config(trainable_token_indices=[3, 4]),
            "qwen3",  # tied: the head takes part
            r"TrainableTokensWrapper`: .*`trainable_token_indices` with tied embeddings",
        ),
    ],
    ids=["LoRA", "trainable tokens"],
)
def test_adapters_that_replace_the_head_are_refused_by_name(config, architecture, message, scope):
    with pytest.raises(ValueError, match=message):
        score_sketches(adapted(config, architecture), *random_batch(), scope=scope)


def test_trl_refuses_an_adapter_of_the_head_first(tmp_path):
    with pytest.raises(ValueError, match="PEFT adapter to `lm_head` is not supported"):
        construct_with(lora_config(target_modules=["q_proj", "lm_head"]), tmp_path)


def test_a_head_copy_whose_forward_the_trainer_replaces_is_refused(tmp_path):
    with pytest.raises(ValueError, match="cast_lm_head_to_fp32=False"):
        construct_with(lora_config(modules_to_save=["lm_head"]), tmp_path, cast_lm_head_to_fp32=True)


# --- the trainer --------------------------------------------------------------------------------------------------------


EXACT = {"score_method": "exact", "baseline_prior_strength": 2.0, "learning_rate": 1e-2}


def assert_advantages_of_the_oracle(trainer, oracle):
    """`oracle` has the trainer's parameters by name; those of them that require a gradient are theta."""
    assert len(trainer.batches) == trainer.state.global_step
    for batch in trainer.batches:
        oracle.load_state_dict(batch["state"])
        input_ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
        attention_mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
        scores = reference_scores(oracle, input_ids, attention_mask, batch["completion_mask"], dtype=torch.float64)
        weights = scores.square().sum(dim=1).view_as(batch["rewards"])
        expected = batch["rewards"] - gradient_weighted_baseline(batch["rewards"], weights, prior_strength=2.0)
        torch.testing.assert_close(batch["advantages"].view_as(expected), expected, rtol=1e-4, atol=1e-6)


def assert_only_adapters_were_trained(trainer):
    frozen, moved = 0, 0
    for name, parameter in trainer.model.named_parameters():
        if parameter.requires_grad:
            moved += not torch.equal(parameter, trainer.start[name])
        else:
            frozen += 1
            assert parameter.grad is None, name
            assert torch.equal(parameter, trainer.start[name]), name
    assert frozen
    assert moved == len(trainable(trainer.model))


TRAINED = {
    "LoRA": lora_config(target_modules="all-linear"),
    "rank-stabilised LoRA": lora_config(use_rslora=True),
    "LoRA and the head": lora_config(modules_to_save=["lm_head"]),
    "a prefix": PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
}


@pytest.mark.parametrize("name", TRAINED)
def test_advantages_come_from_the_adapters_full_gradients(tmp_path, name):
    # transformers drops the cache, and with it the prefix, under gradient checkpointing
    options = EXACT | {"gradient_checkpointing": name != "a prefix"}
    trainer = train(Recording, OBLRPOConfig, tmp_path, peft_config=TRAINED[name], **options)
    assert_advantages_of_the_oracle(trainer, get_peft_model(tiny_model(num_layers=2), TRAINED[name]))
    assert_only_adapters_were_trained(trainer)


def test_gradient_checkpointing_changes_no_advantage_of_an_adapter(tmp_path):
    """Not even the reentrant kind, which TRL sets for adapters under ZeRO-3."""

    def run(name, **options):
        return train(Recording, OBLRPOConfig, tmp_path / name, peft_config=lora_config(), **options, **EXACT)

    plain = run("plain", gradient_checkpointing=False)
    assert not plain.model.is_gradient_checkpointing
    for name, reentrant in (("checkpointed", False), ("reentrant", True)):
        options = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
        checkpointed = run(name, **options)
        assert checkpointed.model.is_gradient_checkpointing
        for a, b in zip(plain.batches, checkpointed.batches, strict=True):
            torch.testing.assert_close(a["advantages"], b["advantages"], rtol=1e-4, atol=1e-6)
        assert logged(plain, "gradient_snr/rho") == pytest.approx(logged(checkpointed, "gradient_snr/rho"), rel=1e-3)


def test_a_kl_term_takes_the_model_without_its_adapter_as_reference(tmp_path):
    trainer = train(Recording, OBLRPOConfig, tmp_path, peft_config=lora_config(), beta=0.1, **EXACT)
    assert_advantages_of_the_oracle(trainer, get_peft_model(tiny_model(num_layers=2), lora_config()))
    assert_only_adapters_were_trained(trainer)
    divergences = logged(trainer, "kl")
    assert divergences[0] == pytest.approx(0.0, abs=1e-6)  # a fresh adapter is the model without it
    assert divergences[-1] > 1e-6


def test_a_resumed_adapter_is_scored_without_its_frozen_reference(tmp_path):
    """TRL copies a given adapter to an adapter "ref" for the KL term, which must not become part of theta."""

    def resumed():
        return PeftModel.from_pretrained(tiny_model(num_layers=2), tmp_path / "adapter", is_trainable=True)

    perturbed(get_peft_model(tiny_model(num_layers=2), lora_config())).save_pretrained(tmp_path / "adapter")
    trainer = train(Recording, OBLRPOConfig, tmp_path / "run", model=resumed(), beta=0.1, **EXACT)
    assert "ref" in trainer.model.peft_config
    assert not [name for name in trainable(trainer.model) if ".ref." in name]
    oracle = resumed()
    oracle.add_adapter("ref", oracle.peft_config["default"])
    assert trainable(oracle) == trainable(trainer.model)
    assert_advantages_of_the_oracle(trainer, oracle)
    assert_only_adapters_were_trained(trainer)
    assert logged(trainer, "kl")[0] == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("modules_to_save", [None, ["lm_head"]], ids=["adapters", "adapters and head"])
def test_a_run_resumed_with_an_adapter_equals_an_uninterrupted_one(tmp_path, modules_to_save):
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "cosine"}
    options["peft_config"] = lora_config(modules_to_save=modules_to_save)
    whole = train(OBLRPOTrainer, OBLRPOConfig, tmp_path / "whole", **options)
    checkpoint = str(tmp_path / "whole" / "checkpoint-2")
    resumed = train(OBLRPOTrainer, OBLRPOConfig, tmp_path / "resumed", **options, resume_from_checkpoint=checkpoint)
    for (name, a), (_, b) in zip(whole.model.named_parameters(), resumed.model.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    for name in ("learning_rate", "lr_multiplier", "loss", "score/norm/mean", "gradient_snr/rho", "baseline/mean"):
        assert logged(resumed, name) == logged(whole, name), name
    assert logged(whole, "lr_multiplier")[-1] != 1.0
    assert resumed._algorithm_state() == whole._algorithm_state()


def test_dora_trains_with_the_score_of_the_head(tmp_path):
    trainer = train(
        Recording, OBLRPOConfig, tmp_path, peft_config=lora_config(use_dora=True), score_scope="lm_head", max_steps=2
    )
    assert_only_adapters_were_trained(trainer)
    assert all(value > 0 for value in logged(trainer, "score/norm/mean"))
