"""The planner against real models on the meta device, tensors in memory, saved activations and measured peaks."""

import copy
import json
import re
import warnings
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config, Qwen3MoeConfig, TrainingArguments
from trl import GRPOConfig
from trl.trainer.utils import add_fused_lm_head

from oblr_trl import OBLRPOConfig
from oblr_trl.planning.activations import saved_block_bytes
from oblr_trl.planning.memory import parameter_sketch_length, plan_memory, projection_bytes
from oblr_trl.planning.models import PUBLISHED, read_config
from oblr_trl.planning.setup import Backend, Setup, read_backend
from oblr_trl.scores import ScorePass
from oblr_trl.scores.parameters import local_parameter_sketch
from oblr_trl.scores.scopes import resolve_scope
from oblr_trl.scripts import plan

ROOT = Path(__file__).parent.parent
RECIPE = "recipes/Qwen3-4B-Base/oblrpo/config_math.yaml"
COMMAND = ["--config", RECIPE, "--accelerate_config", "recipes/accelerate_configs/zero3.yaml"]
QWEN3_4B, QWEN3_8B = PUBLISHED["Qwen/Qwen3-4B-Base"], PUBLISHED["Qwen/Qwen3-8B-Base"]
ALL_LINEAR = LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")
QUERIES_VALUES = LoraConfig(r=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
# How far the estimate of an activation peak may be from the measured one, either way.
ACTIVATION_FACTOR = 1.2


@pytest.fixture(autouse=True)
def in_repository(monkeypatch):
    monkeypatch.chdir(ROOT)


def small_config(config_class=Qwen3Config, **changes):
    numbers = {
        "hidden_size": 256,
        "intermediate_size": 640,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 512,
        "tie_word_embeddings": True,
    }
    if config_class is Qwen3Config:
        numbers["head_dim"] = 32
    return config_class(**(numbers | changes))


def real_model(config, dtype=torch.float32, adapter=None):
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).train()
    return model if adapter is None else get_peft_model(model, copy.deepcopy(adapter))


def make_setup(config=None, backend=None, adapter=None, *, config_class=OBLRPOConfig, **changes):
    """A setup of two completions of 32 tokens, vLLM being elsewhere; `changes` are of `Setup` and of the recipe."""
    fields = {"prompt_length": 16, "gpu_memory": 80e9, "parameter_bytes": 4, "masked": False}
    fields |= {name: changes.pop(name) for name in set(fields) & set(changes)}
    recipe = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "num_generations": 2,
        "max_completion_length": 32,
        "gradient_checkpointing": False,
        "optim": "adamw_torch",
        "bf16": False,
        "use_cpu": True,
        "use_vllm": True,
        "vllm_mode": "server",
    }
    recipe |= {"lr_adaptation": "none"} if config_class is OBLRPOConfig else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of one prompt per step
        args = config_class(**(recipe | changes))
    backend = backend or Backend("one process", 1, False)
    return Setup(args=args, backend=backend, config=config or small_config(), peft_config=adapter, **fields)


def items(setup):
    return {item.name: item.num_bytes for item in plan_memory(setup)}


# Number of weights of the published safetensors files, as the hub states it.
@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("Qwen/Qwen3-0.6B-Base", 596_049_920),
        ("Qwen/Qwen3-1.7B-Base", 1_720_574_976),
        ("Qwen/Qwen3-4B-Base", 4_022_468_096),
        ("Qwen/Qwen3-8B-Base", 8_190_735_360),
        ("Qwen/Qwen3-32B", 32_762_123_264),
    ],
)
def test_the_known_models_have_as_many_parameters_as_the_published_ones(name, published):
    assert make_setup(PUBLISHED[name]).num_base == published


# A (r x d_in) and B (d_out x r) of each target, in 36 blocks: 4B has d = 2560, q = 4096, k = v = 1024; 8B has d = q = 4096,
# k = v = 1024 and an MLP of 12288.
@pytest.mark.parametrize(
    ("config", "adapter", "trained"),
    [
        (QWEN3_4B, QUERIES_VALUES, 36 * 16 * ((2560 + 4096) + (2560 + 1024))),
        (QWEN3_8B, ALL_LINEAR, 36 * 16 * (2 * (4096 + 4096) + 2 * (4096 + 1024) + 3 * (4096 + 12288))),
    ],
    ids=["4B-qv", "8B-all"],
)
def test_an_adapter_is_counted_and_the_base_model_without_it(config, adapter, trained):
    setup = make_setup(config, adapter=adapter)
    assert setup.num_trained == trained
    assert setup.num_base == make_setup(config).num_base


@pytest.mark.parametrize(
    "config",
    [small_config(Qwen2Config), small_config(LlamaConfig, attention_bias=True)],
    ids=["qwen2", "llama with biases"],
)
def test_other_decoders_are_planned_too(config):
    planned = items(make_setup(config, use_vllm=False))
    assert planned["parameters"] == 4 * AutoModelForCausalLM.from_config(config).num_parameters()
    # Of 2 x 48 tokens keys and values of 2 heads of 64 features in 2 blocks, in float32.
    assert planned["KV cache"] == 2 * 48 * (2 * 2 * 2 * 64) * 4
    # At least the residual stream in 2 blocks.
    assert planned["activations of training"] > 2 * 48 * 2 * 256 * 4


def test_a_model_that_is_not_covered_is_refused(tmp_path):
    Qwen3MoeConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"qwen3, qwen2, llama.*'qwen3_moe'"):
        read_config(str(tmp_path))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("adapter", [None, ALL_LINEAR], ids=["full", "lora"])
@pytest.mark.parametrize(
    ("optimizer", "optim_args"), [("adamw_torch", None), ("sgd", None), ("sgd", "momentum=0.9")], ids=str
)
def test_parameters_gradients_and_states_equal_tensors_in_memory(dtype, adapter, optimizer, optim_args):
    config = small_config(num_hidden_layers=1)
    model = real_model(config, dtype, adapter)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    sgd = torch.optim.SGD(trainable, momentum=0.9 if optim_args else 0.0)
    real = sgd if optimizer == "sgd" else torch.optim.AdamW(trainable)
    for parameter in trainable:
        parameter.grad = torch.ones_like(parameter)
    real.step()
    values = [value for state in real.state.values() for value in state.values()]
    states = [value for value in values if torch.is_tensor(value) and value.ndim]

    def num_bytes(tensors):
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    setup = make_setup(config, adapter=adapter, optim=optimizer, optim_args=optim_args, parameter_bytes=dtype.itemsize)
    assert items(setup)["parameters"] == num_bytes(model.parameters())
    assert items(setup)["gradients"] == num_bytes(parameter.grad for parameter in trainable)
    assert items(setup).get("optimizer states", 0) == num_bytes(states)


def test_backends_divide_what_they_shard():
    # P parameters over 4 processes in bfloat16: ZeRO keeps 12 bytes a parameter of optimizer.
    P = 4_022_468_096
    expected = {
        "DDP": (4 * P, 4 * P, 8 * P),
        "ZeRO-1": (2 * P, 2 * P, 12 * P // 4),
        "ZeRO-2": (2 * P, 2 * P // 4, 12 * P // 4),
        "ZeRO-3": (2 * P // 4, 2 * P // 4, 12 * P // 4),
    }
    for kind, numbers in expected.items():
        planned = items(make_setup(QWEN3_4B, Backend(kind, 4, True)))
        assert (planned["parameters"], planned["gradients"], planned["optimizer states"]) == numbers
    offloaded = items(make_setup(QWEN3_4B, Backend("ZeRO-3", 4, True, True, True)))
    assert not {"parameters", "gradients", "optimizer states"} & set(offloaded)


def saved_bytes_per_token(num_layers, dtype, autocast, adapter, masked, scoring):
    """Bytes of the tensors that autograd saves in addition to weights and their copies, over the number of tokens."""
    model = real_model(small_config(num_hidden_layers=num_layers), dtype, adapter)
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
@pytest.mark.parametrize("adapter", [None, ALL_LINEAR, QUERIES_VALUES], ids=["full", "all", "qv"])
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
    backend = Backend("one process", 1, autocast)
    setup = make_setup(backend=backend, adapter=adapter, parameter_bytes=dtype.itemsize, masked=masked)
    assert saved_block_bytes(setup, scoring=scoring) == pytest.approx(48 * (three - two))


def test_the_scoring_pass_is_planned_with_a_batch_of_its_own():
    own, twice = items(make_setup(QWEN3_4B)), items(make_setup(QWEN3_4B, per_device_score_batch_size=4))
    assert make_setup(QWEN3_4B).args.per_device_train_batch_size == 2
    assert twice["activations of scoring"] == 2 * own["activations of scoring"]
    assert twice["head or block in scoring"] > own["head or block in scoring"]
    others = own.keys() - {"activations of scoring", "head or block in scoring"}
    assert {name: own[name] for name in others} == {name: twice[name] for name in others}


def test_estimated_peaks_are_near_those_measured_on_the_cpu():
    record = json.loads((ROOT / "benchmarks/results/score_memory.json").read_text())
    settings = record["settings"]
    d, heads = settings["hidden_size"], settings["hidden_size"] // 64
    config = small_config(
        vocab_size=settings["vocab_size"],
        hidden_size=d,
        intermediate_size=3 * d,
        num_hidden_layers=settings["num_layers"],
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        head_dim=64,
    )
    passes = {
        "train_floor": {"config_class": GRPOConfig},
        "all": {"score_scope": "all"},
        "last_k": {"score_scope": "last_k", "score_last_k": 1},
        "lm_head": {"score_scope": "lm_head"},
    }
    for case in record["cases"]:
        for name, scored in passes.items():
            setup = make_setup(
                config,
                adapter=LoraConfig(r=settings["lora_r"], target_modules="all-linear") if case["lora"] else None,
                per_device_train_batch_size=case["batch_size"],
                prompt_length=case["sequence_length"] // 4,
                max_completion_length=case["sequence_length"] * 3 // 4,
                gradient_checkpointing=case["checkpointing"],
                **scored,
            )
            phase = "train" if name == "train_floor" else "score"
            # There before the measured pass: parameters, and for `train_floor` gradients.
            outside = ("parameters", "gradients", "optimizer states")
            held = [item for item in plan_memory(setup) if phase in item.phases and item.name not in outside]
            estimate, measured = sum(item.num_bytes for item in held), case["passes"][name]["increment"]
            assert measured / ACTIVATION_FACTOR < estimate < measured * ACTIVATION_FACTOR, (case["lora"], name)


def test_checkpointing_keeps_the_inputs_of_blocks_alone():
    # 2 sequences of 48 tokens, 2 blocks, 256 features of 4 bytes.
    assert items(make_setup(gradient_checkpointing=True))["activations of training"] == 2 * 48 * 2 * 256 * 4


@pytest.mark.parametrize("adapter", [None, ALL_LINEAR], ids=["full", "lora"])
@pytest.mark.parametrize(("scope", "last_k"), [("all", None), ("last_k", 1), ("lm_head", None)])
@pytest.mark.parametrize("tied", [True, False])
def test_projections_take_as_many_bytes_as_the_real_ones(scope, last_k, adapter, tied):
    config = small_config(tie_word_embeddings=tied)
    score_pass = ScorePass(real_model(config, adapter=adapter), scope=scope, last_k=last_k, sketch_dim=1024)
    input_ids = torch.randint(0, 512, (2, 16))
    inputs = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
    score_pass(inputs, input_ids[:, -8:], torch.ones(2, 8))
    scored = resolve_scope(make_setup(config, adapter=adapter).model, scope, last_k)
    # An embedding of its own, below the first block that is scored, is counted: V + d signs.
    unused = 512 + 256 if scope == "last_k" and adapter is None and not tied else 0
    drawn = sum(tensor.nbytes for tensor in score_pass._projections._drawn.values())
    assert projection_bytes(scored, 1024) == drawn + unused


@pytest.mark.parametrize("adapter", [None, ALL_LINEAR], ids=["full", "lora"])
@pytest.mark.parametrize("sketch_dim", [1024, 10**8])
def test_the_sketch_of_the_parameters_is_as_long_as_the_real_one(adapter, sketch_dim):
    config = small_config(vocab_size=1024)
    sketch = local_parameter_sketch(ScorePass(real_model(config, adapter=adapter), sketch_dim=sketch_dim))
    setup = make_setup(
        config,
        adapter=adapter,
        lr_adaptation="trust_region",
        score_sketch_dim=sketch_dim,
        gradient_accumulation_steps=2,
    )
    scored = resolve_scope(setup.model, "all", None)
    assert parameter_sketch_length(scored, sketch_dim) == sketch.numel()
    assert items(setup)["sketch of the parameters"] == sketch.nbytes
    if adapter is not None:  # matrices of 16 rows or columns are formed, so that the sketch is as long as the adapter
        assert sketch.numel() == setup.num_trained


def test_a_recipe_that_fits(capsys):
    assert plan.main(COMMAND) == 0
    text = capsys.readouterr().out
    assert "4,022,468,096 parameters" in text
    # bfloat16 over 8 GPUs; 0.45 of 80 GB.
    for name, gigabytes in (("parameters", 2 * 4.022468096 / 8), ("vLLM's share", 36)):
        assert re.search(rf"^{name}( +{gigabytes:.3f}){{3}}$", text, flags=re.MULTILINE)
    assert text.splitlines()[-1] == "fits, 10% of the memory being left free"


def test_a_vllm_that_sleeps_is_held_by_generation_alone():
    asleep = plan_memory(make_setup(QWEN3_4B, vllm_mode="colocate", vllm_enable_sleep_mode=True))
    assert next(item for item in asleep if item.name == "vLLM's share").phases == ("generate",)


def test_a_recipe_that_does_not_fit_names_the_biggest_item_and_the_remedy(capsys):
    assert plan.main([*COMMAND, "--gpu_memory", "24", "--use_vllm", "false"]) == 1
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("WARNING")]
    assert "does not fit" in line
    assert "in phase `generate`" in line
    assert "The biggest item is KV cache" in line
    assert "use_vllm: true" in line


def test_keys_of_the_recipe_and_the_launch_can_be_given(capsys):
    before = TrainingArguments.__dict__["world_size"]
    flags = ["--num_gpus", "4", "--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "16"]
    assert plan.main([*COMMAND, *flags, "--prompt_length", "100"]) == 0
    text = capsys.readouterr().out
    assert re.search(r"completions per step +128\n", text)
    assert "sequences of 100 + 4096 tokens" in text
    assert TrainingArguments.__dict__["world_size"] is before  # counted as on other machines, without a trace


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (
            ["--per_device_train_batch", "2"],
            ["plan: Unknown key `per_device_train_batch`", "per_device_train_batch_size"],
        ),
        (
            ["--per_device_train_batch_size", "1", "--gradient_accumulation_steps", "1"],
            [
                "plan: OBLR-PO cannot honour lr_adaptation='trust_region': an optimizer step has 1 prompt x 8 completions"
            ],
        ),
        (["--model_name_or_path", ".cache/none"], ["no such directory", "python -m examples.tiny_qwen3"]),
        (["--model_name_or_path", "Qwen/Qwen3-5B-Base"], ["the hub gives no such model"]),
        (["--accelerate_config", "none.yaml"], ["`--accelerate_config` names 'none.yaml', but there is no such file"]),
        (["--load_in_4bit", "true"], ["does not cover quantized weights: plan without load_in_4bit"]),
        (["--model_init_kwargs", '{"dtype": "half"}'], ["`dtype` is 'half', which TRL does not load", "float16"]),
    ],
    ids=["misspelt key", "one prompt under the SNR", "no start model", "no hub", "no launch file", "4 bits", "dtype"],
)
def test_what_cannot_be_planned_fails_in_one_line(capsys, flags, parts):
    with pytest.raises(SystemExit, match="2"):
        plan.main([*COMMAND, *flags])
    (line,) = capsys.readouterr().err.splitlines()
    assert all(part in line for part in parts), line


def test_too_few_prompts_per_step_are_warned_of_as_in_training():
    flags = ["--per_device_train_batch_size", "1", "--gradient_accumulation_steps", "15", "--lr_adaptation", "snr"]
    with pytest.warns(UserWarning, match="rho will be mostly noise: an optimizer step has 15 prompts"):
        plan.main([*COMMAND, *flags])


def test_a_local_config_is_read(tmp_path):
    Qwen3Config(num_hidden_layers=3, tie_word_embeddings=True).save_pretrained(tmp_path)
    assert read_config(str(tmp_path)).num_hidden_layers == 3


@pytest.mark.parametrize(
    "recipe", sorted(ROOT.glob("recipes/Qwen3-*/*/*.yaml")), ids=lambda path: str(path.relative_to(ROOT))
)
def test_every_recipe_fits_the_hardware_of_its_header(recipe, capsys):
    header = recipe.read_text().split("\n\n")[0]
    gpu_memory = re.search(r"Hardware: .*? of (\d+) GB", header)[1]
    launch_file = re.search(r"recipes/accelerate_configs/\S+", header)[0]
    processes = re.search(r"--num_processes (\d+)", header)
    arguments = ["--config", str(recipe), "--accelerate_config", launch_file, "--gpu_memory", gpu_memory]
    arguments += ["--num_gpus", processes[1]] if processes else []
    assert plan.main(arguments) == 0, capsys.readouterr().out
    completions = re.search(r"Completions per step: .*= (\d+) = (\d+) prompts", header)
    text = capsys.readouterr().out
    assert re.search(rf"completions per step +{completions[1]}\n", text)
    assert re.search(rf"prompts per step +{completions[2]}\n", text)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("single_gpu", Backend("one process", 1, True)),
        ("ddp", Backend("DDP", 8, True)),
        ("zero2", Backend("ZeRO-2", 8, True)),
        ("zero3", Backend("ZeRO-3", 8, True)),
        ("zero3_offload", Backend("ZeRO-3", 8, True, True, True)),
        ("multi_node_zero3", Backend("ZeRO-3", 16, True)),
    ],
)
def test_the_launch_files_are_read(name, expected):
    assert read_backend(f"recipes/accelerate_configs/{name}.yaml") == expected


@pytest.mark.parametrize(
    ("text", "remedy"),
    [
        ("distributed_type: FSDP\n", "FSDP 2 shards as much as ZeRO-3: plan it with zero3.yaml"),
        (
            "distributed_type: DEEPSPEED\ndeepspeed_config: {deepspeed_config_file: ds.json}\n",
            "instead of a deepspeed_config_file",
        ),
        ("distributed_type: XLA\n", "the planner knows NO, MULTI_GPU, and DEEPSPEED"),
    ],
)
def test_a_backend_that_is_not_covered_is_refused(tmp_path, text, remedy):
    (tmp_path / "launch.yaml").write_text(text)
    with pytest.raises(ValueError, match=re.escape(remedy)):
        read_backend(str(tmp_path / "launch.yaml"))


# 1024 completions a step of 512 + 4096 tokens. Weights of the 36 blocks of 4B: q and o 2 x 2560 x 4096, k and v 2 x 2560 x 1024,
# MLP 3 x 2560 x 9728; the head, 151936 x 2560, reads only the last token of a prompt.
@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--num_generations", "8"], {"prompt tokens prefilled per step": 128, "  with num_generations: 1": 1024}),
        (["--num_generations", "1"], {"prompt tokens prefilled per step": 1024}),
        # transformers reads the prompt of each completion
        (["--num_generations", "8", "--use_vllm", "false"], {"prompt tokens prefilled per step": 1024}),
    ],
)
def test_prompts_are_prefilled_once_with_vllm_and_once_for_each_completion_without(flags, expected, capsys):
    blocks = 36 * 2560 * (2 * 4096 + 2 * 1024 + 3 * 9728)
    plan.main([*COMMAND, "--gpu_memory", "400", "--prompt_length", "512", *flags])

    lines = re.findall(
        r"^(.+?) +(\d+)  (\S+) FLOPs, (\S+)% of generation's$", capsys.readouterr().out, flags=re.MULTILINE
    )

    assert [name for name, *_ in lines] == list(expected)
    for name, tokens, flops, share in lines:
        prefill = expected[name] * 512 * blocks
        assert int(tokens) == expected[name] * 512
        assert float(flops) == pytest.approx(2 * prefill, rel=0.05)
        decode = 1024 * 4096 * (blocks + 151936 * 2560)
        assert float(share) == pytest.approx(100 * prefill / (prefill + decode), abs=0.05)
