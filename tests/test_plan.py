"""The planner against real models on the meta device, tensors in memory, saved activations and measured peaks."""

import json
import math
import re
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3ForCausalLM,
    TrainingArguments,
)
from trl.trainer.utils import add_fused_lm_head

from oblr_trl.planning import Adapter, Backend, Generation, ModelShape, Schedule, Scoring, Setup, plan_memory
from oblr_trl.planning.activations import block_bytes_per_token
from oblr_trl.planning.launch import read_backend
from oblr_trl.planning.memory import base_parameter_bytes, optimizer_bytes, plan_vllm
from oblr_trl.planning.optimizers import state_bytes
from oblr_trl.planning.scale import scale_document
from oblr_trl.planning.scoring import gather_bytes, operations_per_token, projection_bytes, scoped_shapes
from oblr_trl.planning.shapes import LINEAR_LAYERS, PUBLISHED_SHAPES
from oblr_trl.scores import ScorePass
from oblr_trl.scripts import plan

ROOT = Path(__file__).parent.parent
RECIPE = "recipes/Qwen3-4B-Base/oblrpo/config_math.yaml"
ZERO3 = "recipes/accelerate_configs/zero3.yaml"
QWEN3_4B, QWEN3_8B = PUBLISHED_SHAPES["Qwen/Qwen3-4B-Base"], PUBLISHED_SHAPES["Qwen/Qwen3-8B-Base"]
ALL_LINEAR = Adapter(16, LINEAR_LAYERS)
# How far the estimate of an activation peak may be from the measured one, either way.
ACTIVATION_FACTOR = 1.2


@pytest.fixture(autouse=True)
def in_repository(monkeypatch):
    monkeypatch.chdir(ROOT)


def small_shape(num_layers=2, **changes):
    numbers = {
        "hidden_size": 256,
        "intermediate_size": 640,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 32,
        "vocab_size": 512,
        "tied": True,
        "max_positions": 2048,
    }
    return ModelShape("qwen3", num_layers=num_layers, **(numbers | changes))


def real_model(shape, dtype=torch.float32, adapter=None, device="cpu"):
    config = Qwen3Config(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        tie_word_embeddings=shape.tied,
        max_position_embeddings=shape.max_positions,
    )
    with torch.device(device):
        model = Qwen3ForCausalLM(config).to(dtype).train()
        if adapter is not None:
            model = get_peft_model(model, LoraConfig(r=adapter.rank, target_modules=list(adapter.target_layers)))
    return model


def make_setup(shape=None, **changes):
    fields = {
        "shape": shape or small_shape(),
        "backend": Backend("none", 1, False),
        "schedule": Schedule(1, 2, 1, 1, 1, 2, False, True, False),
        "generation": Generation("server"),
        "prompt_length": 16,
        "completion_length": 32,
        "checkpointing": False,
        "optimizer": "adamw_torch",
        "gpu_memory": 80e9,
        "scoring": Scoring("all"),
        "masked_attention": False,
    }
    return Setup(**(fields | changes))


def items(setup):
    return {item.name: item.num_bytes for item in plan_memory(setup).items}


# Parameters


# Number of weights of the published safetensors files, as the hub states it; Llama-3-70B's index states 141107412992 bytes.
@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("Qwen/Qwen3-0.6B-Base", 596_049_920),
        ("Qwen/Qwen3-1.7B-Base", 1_720_574_976),
        ("Qwen/Qwen3-4B-Base", 4_022_468_096),
        ("Qwen/Qwen3-8B-Base", 8_190_735_360),
        ("Qwen/Qwen3-14B-Base", 14_768_307_200),
        ("Qwen/Qwen3-32B", 32_762_123_264),
        ("meta-llama/Meta-Llama-3-70B", 141_107_412_992 // 2),
    ],
)
def test_the_known_shapes_have_as_many_parameters_as_the_published_models(name, published):
    assert PUBLISHED_SHAPES[name].num_parameters() == published


@pytest.mark.parametrize("shape", [QWEN3_4B, QWEN3_8B], ids=["4B", "8B"])
def test_parameters_and_bytes_equal_those_of_the_real_model_on_the_meta_device(shape):
    model = real_model(shape, torch.bfloat16, device="meta")
    real = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert dict(shape.parameter_shapes()) == real
    assert shape.num_parameters() == model.num_parameters()
    num_bytes = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    # ZeRO-3 over 8 processes, weights and gradients bfloat16: an eighth of the model each.
    planned = items(make_setup(shape, backend=Backend("zero3", 8, True)))
    assert planned["parameters"] == planned["gradients"] == num_bytes // 8
    assert planned["optimizer states"] == 12 * model.num_parameters() // 8


@pytest.mark.parametrize(
    ("shape", "adapter"),
    [(QWEN3_4B, Adapter(16, ("q_proj", "v_proj"))), (QWEN3_8B, Adapter(32, LINEAR_LAYERS))],
    ids=["4B-qv", "8B-all"],
)
def test_adapters_equal_those_of_peft_on_the_meta_device(shape, adapter):
    model = real_model(shape, adapter=adapter, device="meta")
    trainable, total = model.get_nb_trainable_parameters()
    assert adapter.num_parameters(shape) == trainable
    assert adapter.num_parameters(shape) + shape.num_parameters() == total


@pytest.mark.parametrize(
    "config",
    [
        Qwen2Config(vocab_size=96, hidden_size=64, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4),
        LlamaConfig(
            vocab_size=96,
            hidden_size=64,
            intermediate_size=160,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            attention_bias=True,
        ),
    ],
    ids=["qwen2", "llama with biases"],
)
def test_other_decoders_are_counted_by_name(config):
    model = AutoModelForCausalLM.from_config(config)
    real = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert dict(ModelShape.from_config(config.to_dict()).parameter_shapes()) == real


def test_a_model_that_is_not_covered_is_refused():
    with pytest.raises(ValueError, match=r"qwen3, qwen2, llama.*'qwen3_moe'"):
        ModelShape.from_config({"model_type": "qwen3_moe"})


# Gradients and optimizer states


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("adapter", [None, ALL_LINEAR], ids=["full", "lora"])
@pytest.mark.parametrize(("optimizer", "momentum"), [("adamw_torch", False), ("sgd", False), ("sgd", True)])
def test_parameters_gradients_and_states_equal_tensors_in_memory(dtype, adapter, optimizer, momentum):
    shape = small_shape(num_layers=1)
    model = real_model(shape, dtype, adapter)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if optimizer == "sgd":
        real = torch.optim.SGD(trainable, momentum=0.9 if momentum else 0.0)
    else:
        real = torch.optim.AdamW(trainable)
    for parameter in trainable:
        parameter.grad = torch.ones_like(parameter)
    real.step()
    states = [
        value for state in real.state.values() for value in state.values() if torch.is_tensor(value) and value.ndim
    ]

    def num_bytes(tensors):
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    setup = make_setup(shape, adapter=adapter, optimizer=optimizer, momentum=momentum, parameter_bytes=dtype.itemsize)
    assert items(setup)["parameters"] == num_bytes(model.parameters())
    assert items(setup)["gradients"] == num_bytes(parameter.grad for parameter in trainable)
    assert optimizer_bytes(setup) == num_bytes(states)


def test_backends_divide_what_they_shard():
    # P parameters over 4 processes in bfloat16: ZeRO keeps 12 bytes a parameter of optimizer, FSDP 2 float32 weights and 8.
    shape, P = QWEN3_4B, QWEN3_4B.num_parameters()
    expected = {
        "ddp": (4 * P, 4 * P, 8 * P),
        "zero1": (2 * P, 2 * P, 12 * P // 4),
        "zero2": (2 * P, 2 * P // 4, 12 * P // 4),
        "zero3": (2 * P // 4, 2 * P // 4, 12 * P // 4),
        "fsdp2": (4 * P // 4, 4 * P // 4, 8 * P // 4),
    }
    for kind, numbers in expected.items():
        planned = items(make_setup(shape, backend=Backend(kind, 4, True)))
        assert (planned["parameters"], planned["gradients"], planned["optimizer states"]) == numbers
    offloaded = items(make_setup(shape, backend=Backend("zero3", 4, True, True, True)))
    assert not {"parameters", "gradients", "optimizer states"} & set(offloaded)


def test_eight_bit_states_and_quantized_weights():
    # 2 x (65536 + 4 x 256 scales) for the matrix, 2 x 4 x 64 for the small vector, 2 x 4 x 8192 for the embedding.
    shapes = [("q_proj.weight", (256, 256)), ("norm.weight", (64,)), ("model.embed_tokens.weight", (128, 64))]
    assert state_bytes(shapes, "adamw_8bit", parameter_bytes=4) == 2 * (65536 + 1024) + 512 + 65536
    assert state_bytes(shapes, "adafactor", parameter_bytes=4) == 4 * (512 + 64 + 192)
    # 4 bits and a float32 scale per 64 weights in the blocks' linear layers, 2 bytes elsewhere.
    shape = small_shape()
    linear = shape.num_linear_parameters()
    setup = make_setup(shape, adapter=ALL_LINEAR, weight_bits=4, parameter_bytes=2)
    assert base_parameter_bytes(setup) == linear // 2 + linear // 16 + 2 * (shape.num_parameters() - linear)


# Activations


def saved_bytes_per_token(num_layers, dtype, autocast, adapter, masked, scoring):
    """Bytes of the tensors that autograd saves beside weights and their copies, over the number of tokens."""
    model = real_model(small_shape(num_layers), dtype, adapter)
    input_ids = torch.randint(0, 512, (2, 48))
    mask = torch.ones_like(input_ids)
    mask[0, : 3 if masked else 0] = 0
    matrices = [parameter for parameter in model.parameters() if parameter.ndim == 2]
    shapes = {tuple(matrix.shape) for matrix in matrices} | {tuple(matrix.shape)[::-1] for matrix in matrices}
    parameters = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    saved = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in parameters and tuple(tensor.shape) not in shapes:
            saved[storage._cdata] = storage
        return tensor

    inputs = {"input_ids": input_ids, "attention_mask": mask}
    add_fused_lm_head(model.get_base_model() if adapter else model)
    autocasting = torch.autocast("cpu", torch.bfloat16, enabled=autocast)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), autocasting:
        if scoring:
            ScorePass(model)(inputs, input_ids[:, -32:], torch.ones(2, 32))
        else:
            model(**inputs, labels=input_ids, fused_lm_head=True, use_cache=False)
    return sum(storage.nbytes() for storage in saved.values()) / input_ids.numel()


@pytest.mark.parametrize("scoring", [False, True], ids=["training", "scoring"])
@pytest.mark.parametrize("adapter", [None, ALL_LINEAR, Adapter(16, ("q_proj", "v_proj"))], ids=["full", "all", "qv"])
@pytest.mark.parametrize(
    ("dtype", "autocast", "masked"),
    [
        (torch.bfloat16, False, True),
        (torch.float32, False, False),
        (torch.float32, True, False),
        (torch.bfloat16, True, False),
    ],
    ids=["bfloat16 masked", "float32", "float32 autocast", "bfloat16 autocast"],
)
def test_a_block_keeps_exactly_what_autograd_saves_of_it(dtype, autocast, masked, adapter, scoring):
    two, three = (saved_bytes_per_token(n, dtype, autocast, adapter, masked, scoring) for n in (2, 3))
    setup = make_setup(
        backend=Backend("none", 1, autocast),
        adapter=adapter,
        parameter_bytes=dtype.itemsize,
        masked_attention=masked,
    )
    assert block_bytes_per_token(setup, scoring=scoring) == pytest.approx(three - two, abs=1e-6)


def test_estimated_peaks_are_near_those_measured_on_the_cpu():
    record = json.loads((ROOT / "benchmarks/results/score_memory.json").read_text())
    settings = record["settings"]
    d, heads = settings["hidden_size"], settings["hidden_size"] // 64
    shape = ModelShape(
        "qwen3", d, 3 * d, settings["num_layers"], heads, heads // 2, 64, settings["vocab_size"], True, 32768
    )
    scopes = {"all": Scoring("all"), "last_k": Scoring("last_k", 1), "lm_head": Scoring("lm_head")}
    for case in record["cases"]:
        for name in ("train_floor", *scopes):
            setup = make_setup(
                shape,
                schedule=Schedule(1, case["batch_size"], 1, 1, 1, 2, False, True, False),
                prompt_length=case["sequence_length"] // 4,
                completion_length=case["sequence_length"] * 3 // 4,
                checkpointing=case["checkpointing"],
                adapter=Adapter(settings["lora_r"], LINEAR_LAYERS) if case["lora"] else None,
                scoring=scopes.get(name),
            )
            phase = "score" if name in scopes else "train"
            # There before the measured pass: parameters, and for `train_floor` gradients.
            outside = ("parameters", "gradients", "optimizer states")
            estimate = sum(
                item.num_bytes
                for item in plan_memory(setup).items
                if phase in item.phases and item.name not in outside
            )
            measured = case["passes"][name]["increment"]
            assert measured / ACTIVATION_FACTOR < estimate < measured * ACTIVATION_FACTOR, (case["lora"], name)


def test_checkpointing_keeps_the_inputs_of_blocks_alone():
    # 2 sequences of 48 tokens, 2 blocks, 256 features of 4 bytes.
    assert items(make_setup(checkpointing=True))["activations of training"] == 2 * 48 * 2 * 256 * 4


# Scoring


@pytest.mark.parametrize("adapter", [None, ALL_LINEAR], ids=["full", "lora"])
@pytest.mark.parametrize(("scope", "last_k"), [("all", None), ("last_k", 1), ("lm_head", None)])
@pytest.mark.parametrize("tied", [True, False])
def test_projections_take_as_many_bytes_as_the_real_ones(scope, last_k, adapter, tied):
    shape = small_shape(tied=tied)
    score_pass = ScorePass(real_model(shape, adapter=adapter), scope=scope, last_k=last_k, sketch_dim=1024)
    input_ids = torch.randint(0, 512, (2, 16))
    inputs = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
    score_pass(inputs, input_ids[:, -8:], torch.ones(2, 8))
    setup = make_setup(shape, adapter=adapter, scoring=Scoring(scope, last_k, 1024))
    assert projection_bytes(scoped_shapes(setup), 1024) == score_pass._projections.num_bytes()


def test_what_a_process_receives_in_the_gather():
    # 1024 completions x 4096 numbers x 4 bytes = 16 MiB, of which a quarter is its own.
    assert gather_bytes(1024, 4096, 4) == 12 * 2**20


def test_the_operations_of_a_pass():
    # Without attention's own term (T = 0), head and sketches being small: forward 1, training 3, scoring 2 of 2 n.
    shape = small_shape(vocab_size=1)
    n = shape.num_linear_parameters()
    operations = operations_per_token(shape, length=0, sketch_dim=1, last_k=1, checkpointing=False)
    assert operations.train / (2 * n) == pytest.approx(3, rel=1e-2)
    assert operations.score_all / (2 * n) == pytest.approx(2, rel=2e-2)
    assert operations.score_last_k / (2 * n) == pytest.approx(1.5, rel=2e-2)
    checkpointed = operations_per_token(shape, length=0, sketch_dim=1, last_k=1, checkpointing=True)
    assert checkpointed.train - operations.train == 2 * n


# Rollouts and vLLM


def test_counts_of_a_schedule():
    # 2 sequences x 4 processes x 8 micro-batches = 64 completions a batch = 16 prompts of 4; steps of 2 micro-batches = 16.
    schedule = Schedule(4, 2, 2, 8, 1, 4, needs_old_logps=True, needs_scores=True, scores_ride=False)
    assert (schedule.completions_per_batch, schedule.prompts_per_batch) == (64, 16)
    assert (schedule.completions_per_step, schedule.prompts_per_step) == (16, 4)
    assert (schedule.steps_per_batch, schedule.old_logps_passes, schedule.scoring_passes) == (4, 8, 8)


def test_the_kv_cache_of_a_colocated_vllm():
    # 0.5 x 80 GB less 2 x 4.02e9 of weights; 36 layers x 2 x 8 heads x 128 x 2 bytes a token; 48 tokens a sequence.
    vllm = plan_vllm(make_setup(QWEN3_4B, generation=Generation("colocate", vllm_share=0.5)))
    assert vllm.kv_bytes_per_token == 36 * 2 * 8 * 128 * 2 == 147_456
    assert vllm.kv_cache == 40_000_000_000 - 2 * 4_022_468_096
    assert vllm.sequences == vllm.kv_cache // (147_456 * 48)
    asleep = plan_memory(make_setup(QWEN3_4B, generation=Generation("colocate", vllm_share=0.5, sleeps=True)))
    share = next(item for item in asleep.items if item.name.startswith("vLLM"))
    assert share.phases == ("generate",)


# The command


def test_a_recipe_that_fits(capsys, tmp_path):
    output = tmp_path / "plan.json"
    arguments = ["--config", RECIPE, "--accelerate_config", ZERO3, "--strict", "--json", str(output)]
    assert plan.main(arguments) == 0
    text = capsys.readouterr().out
    assert "4,022,468,096 parameters" in text
    assert "fits:" in text
    record = json.loads(output.read_text())
    assert record["completions_per_step"] == 1024
    assert record["prompts_per_step"] == 128
    assert record["num_gpus"] == 8
    assert {item["name"]: item["bytes"] for item in record["items"]}["parameters"] == 2 * 4_022_468_096 // 8


def test_a_recipe_that_does_not_fit_names_the_biggest_item_and_the_remedy(capsys):
    arguments = ["--config", RECIPE, "--accelerate_config", ZERO3, "--gpu_memory", "24", "--use_vllm", "false"]
    assert plan.main(arguments) == 0
    assert plan.main([*arguments, "--strict"]) == 1
    assert "WARNING: does not fit" in (text := capsys.readouterr().out)
    assert "The biggest item is KV cache" in text
    assert "use_vllm: true" in text


def test_keys_of_the_recipe_and_the_number_of_gpus_can_be_given(capsys):
    flags = ["--num_gpus", "4", "--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "16"]
    plan.main(["--config", RECIPE, "--accelerate_config", ZERO3, *flags])
    assert "completions per optimizer step                   128" in capsys.readouterr().out


def test_a_misspelt_key_fails_in_one_line(capsys):
    with pytest.raises(SystemExit, match="2"):
        plan.main(["--config", RECIPE, "--per_device_train_batch", "2"])
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("plan: Unknown key `per_device_train_batch`")
    assert "per_device_train_batch_size" in line


def test_a_tiny_recipe_without_its_start_model_says_how_to_make_it(capsys, tmp_path, monkeypatch):
    recipe = ROOT / "recipes/tiny-Qwen3/oblrpo/config_chain_sum.yaml"
    monkeypatch.chdir(tmp_path)  # where no .cache is
    with pytest.raises(SystemExit, match="2"):
        plan.main(["--config", str(recipe)])
    (line,) = capsys.readouterr().err.splitlines()
    assert "There is no '.cache/tiny-Qwen3-chain_sum/config.json'" in line
    assert "python -m oblr_trl.scripts.start_model" in line


def test_the_prompt_length_that_is_assumed_is_no_reason_to_refuse_a_short_model(capsys, tmp_path):
    Qwen3Config(max_position_embeddings=256).save_pretrained(tmp_path)  # as the start model of the tiny recipes
    arguments = ["--config", "recipes/tiny-Qwen3/oblrpo/config_chain_sum.yaml", "--model_config"]
    arguments += [str(tmp_path / "config.json"), "--gpu_memory", "1000", "--strict"]
    assert plan.main(arguments) == 0
    assert "sequences are counted at full length, 250 + 6 tokens" in capsys.readouterr().out
    # A length that was asked for is, and so are completions that leave no room for a prompt.
    assert plan.main([*arguments, "--prompt_length", "251"]) == 1
    assert plan.main([*arguments, "--max_completion_length", "256"]) == 1


# 8 GPUs x 1 sequence x `accumulation` micro-batches of 8 completions to a prompt: `accumulation` prompts per step.
@pytest.mark.parametrize(
    ("accumulation", "flags", "warned", "strict"),
    [
        (16, [], None, 0),
        (15, [], "WARNING: rho will be mostly noise: an optimizer step has 15 prompts", 0),
        (15, ["--lr_adaptation", "none"], None, 0),
        (2, ["--lr_adaptation", "none"], None, 0),
        (1, ["--lr_adaptation", "none"], "WARNING: The baseline has no prior: a generation batch has 1 prompt", 1),
        (1, ["--lr_adaptation", "none", "--baseline_prior_strength", "0"], None, 0),
        (1, ["--lr_adaptation", "none", "--baseline", "leave_one_out"], None, 0),
    ],
)
def test_prompts_per_step_are_held_against_what_needs_them(capsys, tmp_path, accumulation, flags, warned, strict):
    record = tmp_path / "plan.json"
    batch = ["--per_device_train_batch_size", "1", "--gradient_accumulation_steps", str(accumulation)]
    arguments = ["--config", RECIPE, "--accelerate_config", ZERO3, *batch, *flags, "--json", str(record)]
    assert plan.main(arguments) == 0
    assert plan.main([*arguments, "--strict"]) == strict
    output = capsys.readouterr()
    found = [line for line in output.out.splitlines() if line.startswith("WARNING")]
    assert [line.startswith(warned or "") for line in found] == ([True, True] if warned else [])  # of two runs
    assert [f"WARNING: {line}" for line in json.loads(record.read_text())["warnings"]] == found[:1]
    assert "Warning" not in output.err


def test_a_step_of_one_prompt_is_refused_where_the_snr_needs_more(capsys):
    batch = ["--per_device_train_batch_size", "1", "--gradient_accumulation_steps", "1"]
    with pytest.raises(SystemExit, match="2"):
        plan.main(["--config", RECIPE, "--accelerate_config", ZERO3, *batch])
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(
        "plan: OBLR-PO cannot honour lr_adaptation='snr': an optimizer step has 1 prompt x 8 completions"
    )


def test_counting_as_on_other_machines_leaves_no_trace():
    before = TrainingArguments.__dict__["world_size"]
    plan.main(["--config", RECIPE, "--num_gpus", "8"])
    assert TrainingArguments.__dict__["world_size"] is before


def test_an_unknown_model_without_a_hub_is_refused():
    with pytest.raises(ValueError, match="give --model_config"):
        plan.read_shape("Qwen/Qwen3-5B-Base")
    with pytest.raises(ValueError, match="make the model first"):
        plan.read_shape("./no-such-model")


def test_a_local_config_is_read(tmp_path):
    Qwen3Config(num_hidden_layers=3, tie_word_embeddings=True).save_pretrained(tmp_path)
    shape, source = plan.read_shape(str(tmp_path))
    assert shape.num_layers == 3
    assert source == str(tmp_path / "config.json")
    assert plan.read_shape("Qwen/Qwen3-4B-Base", str(tmp_path / "config.json"))[0] == shape


@pytest.mark.parametrize(
    "recipe", sorted(ROOT.glob("recipes/Qwen3-*/*/*.yaml")), ids=lambda path: str(path.relative_to(ROOT))
)
def test_every_recipe_fits_the_hardware_of_its_header(recipe, capsys):
    header = recipe.read_text().split("\n\n")[0]
    gpu_memory = re.search(r"Hardware: .*? of (\d+) GB", header)[1]
    launch_file = re.search(r"recipes/accelerate_configs/\S+", header)[0]
    processes = re.search(r"--num_processes (\d+)", header)
    arguments = ["--config", str(recipe), "--accelerate_config", launch_file, "--gpu_memory", gpu_memory, "--strict"]
    arguments += ["--num_gpus", processes[1]] if processes else []
    assert plan.main(arguments) == 0, capsys.readouterr().out
    completions = re.search(r"Completions per step: .*= (\d+) = (\d+) prompts", header)
    text = capsys.readouterr().out
    assert re.search(rf"completions per optimizer step +{completions[1]}\n", text)
    assert re.search(rf"prompts per optimizer step +{completions[2]}\n", text)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("single_gpu", Backend("none", 1, True)),
        ("ddp", Backend("ddp", 8, True)),
        ("zero2", Backend("zero2", 8, True)),
        ("zero3", Backend("zero3", 8, True)),
        ("zero3_offload", Backend("zero3", 8, True, True, True)),
        ("fsdp2", Backend("fsdp2", 8, True)),
        ("multi_node_zero3", Backend("zero3", 16, True)),
    ],
)
def test_the_launch_files_are_read(name, expected):
    assert read_backend(f"recipes/accelerate_configs/{name}.yaml", num_gpus=None, bf16=False) == expected


def test_fsdp_1_is_refused(tmp_path):
    file = tmp_path / "fsdp1.yaml"
    file.write_text("distributed_type: FSDP\nfsdp_config: {fsdp_version: 1}\n")
    with pytest.raises(ValueError, match="fsdp_version: 2"):
        read_backend(str(file), num_gpus=None, bf16=True)


def test_the_scale_document_is_up_to_date():
    command = "python -m oblr_trl.scripts.plan --scale > docs/scale.md"
    assert (ROOT / "docs/scale.md").read_text() == scale_document(), f"run: {command}"


def test_the_scale_document_tells_what_was_not_measured(tmp_path):
    assert scale_document(tmp_path).count("not measured") > math.prod((2, 2, 4))
