"""Local files with the schemas of the hub's benchmarks, an untrained tiny model, and `evaluate` as a function."""

import json
from pathlib import Path
from unittest.mock import patch

import torch

from examples.tiny_qwen3.model import build_model, build_tokenizer
from oblr_trl.scripts.evaluate import main, parse

ROOT = Path(__file__).parents[2]
MATH = str(ROOT / "recipes" / "evaluation" / "math.yaml")
GSM8K = str(ROOT / "recipes" / "evaluation" / "gsm8k.yaml")
# Columns of prompt and answer, and the answers, as on the hub.
SCHEMAS = {
    "math500": (
        "problem",
        "answer",
        [r"\frac{1}{2}", r"2\sqrt{3}", "[0,1)", r"\left( 3, \frac{\pi}{2} \right)", r"\text{Evelyn}", "p - q"],
    ),
    "amc23": ("question", "answer", [10.0, 11.0, 12.0]),
    "aime25": ("problem", "answer", ["70", "71", "72"]),
    "olympiadbench": (
        "question",
        "final_answer",
        [["2"], ["$\\frac{1}{2}$"], ["1,3"], ["$1$", "$3$"], ["$(-\\infty,-3) \\cup(3, \\infty)$"]],
    ),
}


def evaluate(*tokens, recipe=GSM8K):
    return main(parse(["--config", recipe, "--disable_tqdm", "true", *map(str, tokens)]))


def local(**files):
    """Command line that puts local files in place of datasets."""
    return ["--files", json.dumps(files)]


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def read_jsonl(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def evaluate_texts(texts, *tokens, recipe=GSM8K):
    """`evaluate` of a model that gives these texts: by benchmark, the completions of each problem."""

    def answers(problems, num_completions):
        completions = [texts[problem["benchmark"]][problem["index"]] for problem in problems]
        unused = {"num_tokens": [1] * num_completions, "truncated": [False] * num_completions}
        return [{"completions": row, **unused} for row in completions]

    with patch("oblr_trl.scripts.evaluate.model_answers", lambda *_: answers):
        return evaluate("--model_name_or_path", ROOT, *tokens, recipe=recipe)


def gsm8k_rows(num_problems):
    """The answer in prose with calculator annotations, then `#### ` and the answer with a thousands separator."""
    return [
        {
            "question": f"Ann has {i} bags of {i} marbles. How many marbles?",
            "answer": f"She has {i}*{i}=<<{i}*{i}={i * i}>>{i * i} marbles.\n#### {i * i:,}",
        }
        for i in range(num_problems)
    ]


def benchmark_rows(name):
    prompt, answer, answers = SCHEMAS[name]
    return [{"id": i, "solution": "...", prompt: f"Problem {i}", answer: value} for i, value in enumerate(answers)]


def write_benchmarks(directory):
    """All five benchmarks of `math.yaml` as local files, by name."""
    rows = {"gsm8k": gsm8k_rows(6)} | {name: benchmark_rows(name) for name in SCHEMAS}
    return {name: write_jsonl(directory / f"{name}.jsonl", entries) for name, entries in rows.items()}


def make_model(directory):
    torch.manual_seed(0)
    tokenizer = build_tokenizer(["Ann has 1 bags of 2 marbles. How many marbles? Please reason step by step"] * 8)
    build_model(tokenizer).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return str(directory)
