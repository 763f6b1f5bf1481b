"""Prompts that ask for a list of a given length, a small task of following instructions with graded rewards."""

import itertools
import json
import random
from pathlib import Path

_THINGS = [
    "animals",
    "birds",
    "fish",
    "insects",
    "flowers",
    "trees",
    "fruits",
    "vegetables",
    "spices",
    "drinks",
    "desserts",
    "tools",
    "instruments",
    "colors",
    "shapes",
    "sports",
    "games",
    "hobbies",
    "jobs",
    "countries",
    "cities",
    "rivers",
    "mountains",
    "planets",
    "metals",
    "gemstones",
    "clothes",
    "shoes",
    "rooms",
    "vehicles",
    "ships",
    "weapons",
    "books",
    "films",
    "songs",
    "dances",
    "languages",
    "festivals",
    "feelings",
    "virtues",
]
_NUMBERS = range(3, 13)


def write_prompts(path: Path) -> None:
    """All prompts in a fixed random order, as lines of JSON with the columns `prompt` and `num_items`."""
    pairs = list(itertools.product(_THINGS, _NUMBERS))
    random.Random(0).shuffle(pairs)
    text = "Name {} {}. Write them on one line, separated by commas, and nothing else."
    rows = [{"prompt": text.format(number, things), "num_items": number} for things, number in pairs]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_arithmetic(path: Path) -> None:
    """Sums and differences of small numbers and products up to 12 x 12, in a fixed random order, with the column `solution`."""
    problems = [(f"{a} + {b}", a + b) for a in range(1, 13) for b in range(1, 13)]
    problems += [(f"{a} - {b}", a - b) for a in range(1, 19) for b in range(1, a + 1)]
    problems += [(f"{a} x {b}", a * b) for a in range(1, 13) for b in range(1, 13)]
    random.Random(0).shuffle(problems)
    rows = [
        {"prompt": f"What is {text}? Answer with the number only.", "solution": str(value)} for text, value in problems
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
