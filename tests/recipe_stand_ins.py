"""Stand-ins for what the GPU recipes name on the hub: datasets of the same columns and splits, and a tiny Qwen3."""

import json

import torch
import yaml

from examples.smollm2.lists import write_arithmetic, write_prompts
from examples.tiny_qwen3.model import build_model, build_tokenizer

CHAT_TEMPLATE = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }} {% endfor %}"
SYSTEM_PROMPT = "system: Please reason step by step, and put your final answer within \\boxed{}. user: What is 1 + 2?"

# Rows as on the hub, by name in the recipe: configuration and row number i.
SCHEMAS = {
    "trl-lib/DeepMath-103K": (
        "default",
        lambda i: {
            "prompt": [{"role": "user", "content": f"What is {i} + 2?"}],
            "solution": rf"\frac{{{2 * i + 4}}}{{2}}",
        },
    ),
    "openai/gsm8k": (
        "main",
        lambda i: {"question": f"What is {i} + 2?", "answer": f"It is <<{i}+2={i + 2}>>{i + 2}.\n#### {i + 2}"},
    ),
}
# Local files, by name in the recipe.
FILES = {".cache/lists.jsonl": write_prompts, ".cache/arithmetic.jsonl": write_arithmetic}


def write_model(path):
    """A Qwen3 that was taught nothing, with a chat template; returns its directory."""
    torch.manual_seed(0)
    tokenizer = build_tokenizer([SYSTEM_PROMPT] * 8)
    tokenizer.chat_template = CHAT_TEMPLATE
    build_model(tokenizer).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


def write_datasets(path):
    """Local directories laid out like the hub's datasets; returns them by the hub's names."""
    directories = {}
    splits = {"train": range(16), "test": range(16, 20)}
    for name, (config, row) in SCHEMAS.items():
        directory = path / name.split("/")[1]
        directory.mkdir(parents=True)
        for split, numbers in splits.items():
            (directory / f"{split}.jsonl").write_text("".join(json.dumps(row(i)) + "\n" for i in numbers))
        files = [{"split": split, "path": f"{split}.jsonl"} for split in splits]
        card = yaml.safe_dump({"configs": [{"config_name": config, "data_files": files}]})
        (directory / "README.md").write_text(f"---\n{card}---\n")
        directories[name] = str(directory)
    for name, write in FILES.items():
        directories[name] = str(path / name)
        write(path / name)
    return directories


def shrink(recipe_path, model, datasets, output_dir):
    """Overrides of model, data, precision, sizes, length and the logging service; nothing of the algorithm."""
    recipe = read(recipe_path)
    smaller = {"train_size": 16, "test_size": 4, "vllm_max_model_length": 192}
    return {
        "model_name_or_path": model,
        "dataset_name": datasets[recipe["dataset_name"]],
        "output_dir": output_dir,
        "bf16": False,
        "dtype": "float32",
        "report_to": "none",
        "disable_tqdm": True,
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 2,
        "per_device_eval_batch_size": 4,
        "max_completion_length": 8,
        "max_steps": 2,
        **{key: value for key, value in smaller.items() if key in recipe},
    }


def read(recipe_path):
    return yaml.safe_load(recipe_path.read_text())


def write_recipe(path, base, **changes):
    """A copy of a recipe with some keys changed, or left out where the change is None; returns its name."""
    recipe = read(base) | changes
    path.write_text(yaml.safe_dump({key: value for key, value in recipe.items() if value is not None}))
    return str(path)


def flags(overrides):
    """Overrides as arguments of the command line."""
    return [token for key, value in overrides.items() for token in (f"--{key}", str(value))]
