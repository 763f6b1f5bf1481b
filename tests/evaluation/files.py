"""Local files with the schemas of the hub's benchmarks, recorded completions, and a tiny model that was taught nothing."""

import json
from pathlib import Path

import torch

from examples.tiny_qwen3.model import build_model, build_tokenizer

ROOT = Path(__file__).parents[2]
MATH = str(ROOT / "recipes" / "evaluation" / "math.yaml")
GSM8K = str(ROOT / "recipes" / "evaluation" / "gsm8k.yaml")


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def gsm8k_rows(num_problems):
    """The answer in prose with calculator annotations, then `#### ` and the answer with a thousands separator."""
    return [
        {
            "question": f"Ann has {i} bags of {i} marbles. How many marbles?",
            "answer": f"She has {i}*{i}=<<{i}*{i}={i * i}>>{i * i} marbles.\n#### {i * i:,}",
        }
        for i in range(num_problems)
    ]


def math500_rows():
    answers = [r"\frac{1}{2}", r"2\sqrt{3}", r"[0,1)", r"\left( 3, \frac{\pi}{2} \right)", r"\text{Evelyn}", "p - q"]
    return [
        {"problem": f"Problem {i}", "solution": "...", "answer": answer, "subject": "Algebra", "level": 1}
        for i, answer in enumerate(answers)
    ]


def amc23_rows():
    return [{"id": i, "question": f"Problem {i}", "answer": float(10 + i), "url": "x"} for i in range(3)]


def aime25_rows():
    return [{"id": str(i), "problem": f"Problem {i}", "answer": str(70 + i)} for i in range(3)]


def olympiadbench_rows():
    finals = [["2"], ["$\\frac{1}{2}$"], ["1,3"], ["$1$", "$3$"], ["$(-\\infty,-3) \\cup(3, \\infty)$"]]
    return [
        {
            "id": i,
            "question": f"Problem {i}",
            "final_answer": final,
            "is_multiple_answer": len(final) > 1,
            "unit": None,
        }
        for i, final in enumerate(finals)
    ]


def write_benchmarks(directory):
    """All five benchmarks of `math.yaml` as local files, by name."""
    rows = {
        "gsm8k": gsm8k_rows(6),
        "math500": math500_rows(),
        "amc23": amc23_rows(),
        "aime25": aime25_rows(),
        "olympiadbench": olympiadbench_rows(),
    }
    return {name: write_jsonl(directory / f"{name}.jsonl", entries) for name, entries in rows.items()}


def write_scripted_completions(path, num_problems=200, num_completions=4):
    """Of problem i the first i mod 5 of 4 completions are right."""
    return write_jsonl(
        path,
        [
            {
                "benchmark": "gsm8k",
                "index": i,
                "completions": [
                    f"So it is \\boxed{{{i * i if j < i % 5 else i * i + 1}}}." for j in range(num_completions)
                ],
            }
            for i in range(num_problems)
        ],
    )


def make_model(directory):
    torch.manual_seed(0)
    tokenizer = build_tokenizer(["Ann has 1 bags of 2 marbles. How many marbles? Please reason step by step"] * 8)
    build_model(tokenizer).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return str(directory)
