"""Make the model that the tiny-Qwen3 recipes start from: a small Qwen3, taught a task by TRL's `SFTTrainer` from sloppy data.

No hub is needed: the tokenizer is built here too. As in a pretrained model, the right answers are known but not preferred
enough: a fixed part of the supervised answers is off by a little, so that sampled answers are right about as often as the
data, on any machine. What reinforcement learning has to do is to trust the right ones.

    python -m examples.tiny_qwen3
"""

import dataclasses
import json
import random
import re
import shutil
import string
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, disable_progress_bars
from transformers import PreTrainedTokenizerFast, set_seed
from trl import SFTConfig, SFTTrainer, TrlParser

from examples.tiny_qwen3.model import build_model, build_tokenizer
from oblr_trl.data.prompt_sets import DataArguments, load_prompts
from oblr_trl.data.recipe_files import option
from oblr_trl.data.tasks import decode_entry, make_task

TASK = "chain_sum"
# Three one-digit terms: skill grows steadily with training, where longer numbers are learnt all at once.
TASK_PARAMS = {"min_terms": 3, "max_terms": 3, "min_digits": 1, "max_digits": 1}
# Its own draw of problems. There are only 4000, so reinforcement learning meets them again; the recipes' held-out ones
# are new to both.
SFT_SEED = 2_000_000_000
RECORD = "start_model.json"


@dataclass
class StartModelArguments:
    """Settings; the same ones give the same weights on the same machine. Fields are documented by their `help`."""

    output_dir: str = option(
        ".cache/tiny-Qwen3-chain_sum", "Directory of the model, its tokenizer and the record of settings and accuracy."
    )
    task: str = option(TASK, "reasoning-gym task that it is taught.")
    task_params: dict | str | None = option(  # noqa: RUF009
        None, "Parameters of the task, a JSON object. Defaults to three one-digit terms."
    )
    letters_apart: bool = option(
        False, "Whether the tokenizer keeps letters apart, as it does digits: for tasks about spelling."
    )
    vocab_size: int = option(192, "Largest vocabulary of the tokenizer.")
    hidden_size: int = option(128, "Width of the model, a multiple of 64.")
    num_hidden_layers: int = option(4, "Depth of the model.")
    max_completion_length: int = option(8, "Tokens sampled at most where the accuracy is measured.")
    max_steps: int = option(700, "Number of supervised steps.")
    wrong_answers: float = option(
        0.3, "Fraction of supervised answers that are off: numbers by 1 to 9, others by one character."
    )
    hardest_wrong_answers: float | None = option(
        None,
        "That fraction for prompts whose first number ends in 9; it then grows evenly from `wrong_answers` for a 0, so that "
        "prompts differ in how often they are answered right.",
    )
    batch_size: int = option(64, "Problems per step.")
    learning_rate: float = option(
        1e-3, "Peak learning rate of AdamW; it decays to zero in the last fifth of the steps."
    )
    test_size: int = option(512, "Number of held-out problems, the recipes' own, that the accuracy is measured on.")
    seed: int = option(0, "Seed of the initial weights and of the order of the problems.")
    min_accuracy: float = option(0.3, "Lowest acceptable accuracy.")
    max_accuracy: float = option(0.6, "Highest acceptable accuracy.")

    def __post_init__(self):
        if self.task_params is None:
            self.task_params = TASK_PARAMS.copy() if self.task == TASK else {}
        self.task_params = DataArguments(task=self.task, task_params=self.task_params).task_params
        if self.hidden_size < 64 or self.hidden_size % 64:
            raise ValueError(
                f"`hidden_size` is {self.hidden_size}, but attention has one key head for every 64: set a multiple of 64."
            )


def supervised_set(
    prompts: Dataset, wrong_answers: float, seed: int, hardest_wrong_answers: float | None = None
) -> Dataset:
    """Prompts with answers as `completion`, a fraction of which is off: numbers by 1 to 9, others in one letter or digit."""
    generator = random.Random(seed)
    completions = []
    for prompt, solution in zip(prompts["prompt"], prompts["solution"], strict=True):
        fraction = wrong_answers
        if hardest_wrong_answers is not None:
            fraction += difficulty(prompt) * (hardest_wrong_answers - wrong_answers)
        completions.append(solution if generator.random() >= fraction else _wrong(solution, generator))
    return Dataset.from_dict({"prompt": prompts["prompt"], "completion": completions})


def difficulty(prompt: str) -> float:
    """Last digit of the first number in a prompt, in ninths; 0 without a number."""
    number = re.search(r"\d+", prompt)
    return int(number.group()[-1]) / 9 if number else 0.0


def _wrong(solution: str, generator: random.Random) -> str:
    if solution.lstrip("-").isdecimal():
        return str(int(solution) + generator.choice((-1, 1)) * generator.randint(1, 9))
    position = generator.choice([i for i, character in enumerate(solution) if character.isalnum()])
    alphabet = string.digits if solution[position].isdecimal() else string.ascii_lowercase
    character = generator.choice(alphabet.replace(solution[position], ""))
    return solution[:position] + character + solution[position + 1 :]


@torch.no_grad()
def sampled_accuracy(
    model: Any, tokenizer: PreTrainedTokenizerFast, problems: Dataset, args: StartModelArguments
) -> float:
    """Fraction of problems that one completion, sampled at temperature 1, answers correctly."""
    assert not isinstance(args.task_params, str)
    task = make_task(args.task, args.task_params, size=1, seed=0)
    model.eval()
    batch = tokenizer(list(problems["prompt"]), return_tensors="pt", padding=True, return_token_type_ids=False)
    ids = model.generate(
        **batch, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=args.max_completion_length
    )
    answers = tokenizer.batch_decode(ids[:, batch["input_ids"].size(1) :], skip_special_tokens=True)
    entries = [decode_entry(entry) for entry in problems["entry"]]
    return sum(task.score_answer(*pair) >= 1 for pair in zip(answers, entries, strict=True)) / len(entries)


def train_model(args: StartModelArguments, output_dir: Path) -> dict[str, Any]:
    """Train the start model, save it with its tokenizer in `output_dir`, and return held-out accuracy and size."""
    prompts = load_prompts(
        DataArguments(
            task=args.task,
            task_params=args.task_params,
            train_size=args.max_steps * args.batch_size,
            train_seed=SFT_SEED,
            test_size=args.test_size,
        )
    )
    tokenizer = build_tokenizer(
        prompts["train"]["prompt"][:1024], vocab_size=args.vocab_size, letters_apart=args.letters_apart
    )
    set_seed(args.seed)
    # One thread: faster for a model of this size, and the weights do not depend on the machine's number of cores.
    torch.set_num_threads(1)
    sft_args = SFTConfig(
        output_dir=str(output_dir.parent / "sft"),
        max_steps=args.max_steps,
        per_device_train_batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        lr_scheduler_type="warmup_stable_decay",
        lr_scheduler_kwargs={"num_decay_steps": max(args.max_steps // 5, 1)},
        warmup_steps=20,
        weight_decay=0.0,
        seed=args.seed,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        save_strategy="no",
        logging_steps=100,
        report_to="none",
        disable_tqdm=True,
    )
    trainer = SFTTrainer(
        model=build_model(tokenizer, hidden_size=args.hidden_size, num_hidden_layers=args.num_hidden_layers),
        args=sft_args,
        train_dataset=supervised_set(prompts["train"], args.wrong_answers, args.seed, args.hardest_wrong_answers),
        processing_class=tokenizer,
    )
    trainer.train()
    model: Any = trainer.model
    accuracy = sampled_accuracy(model, tokenizer, prompts["test"], args)
    model.save_pretrained(output_dir)
    tokenizer.save_pretrained(output_dir)
    return {"accuracy": accuracy, "num_parameters": model.num_parameters()}


def make_start_model(args: StartModelArguments) -> dict[str, Any]:
    """
    Make the start model, unless `output_dir` holds one of the same settings already, and return its record: settings, held-out
    `accuracy`, `num_parameters`, training time in `seconds`.

    It is trained in a temporary directory next to `output_dir` and moved there when it is complete, so that an interrupted
    run leaves nothing that looks like a model.
    """
    target = Path(args.output_dir)
    settings = {name: value for name, value in dataclasses.asdict(args).items() if name != "output_dir"}
    if (target / RECORD).is_file():
        record: dict[str, Any] = json.loads((target / RECORD).read_text())
        if record["settings"] == settings:
            return record
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f"{target.name}-") as temporary:
        made = Path(temporary) / "model"
        start = time.perf_counter()
        record = {"settings": settings, **train_model(args, made), "seconds": time.perf_counter() - start}
        if not args.min_accuracy <= record["accuracy"] <= args.max_accuracy:
            raise ValueError(
                f"The start model answers {record['accuracy']:.3f} of the held-out problems, outside of "
                f"[{args.min_accuracy}, {args.max_accuracy}]: change `max_steps` (more steps, more skill), "
                "`wrong_answers` or `seed`."
            )
        (made / RECORD).write_text(json.dumps(record, indent=2))
        if target.exists():
            shutil.rmtree(target)
        shutil.move(made, target)
    return record


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Parse the command line, make the model and say what it can do."""
    disable_progress_bars()
    dataclass_types: list[Any] = [StartModelArguments]
    (args,) = TrlParser(dataclass_types, allow_abbrev=False).parse_args_and_config(argv)
    record = make_start_model(args)
    sys.stdout.write(
        f"Start model {args.output_dir}: {record['num_parameters']:,} parameters, {record['accuracy']:.3f} of "
        f"{record['settings']['test_size']} held-out problems right, trained in {record['seconds']:.0f} s.\n"
    )
    return record
