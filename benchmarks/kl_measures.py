"""How far does a step move the policy? The trust region's estimate from sketches, against forward passes under both weights.

    python -m benchmarks.kl_measures

Trains with the trust region and keeps the weights and completions of the step before. On every batch it then computes the exact
log-ratios in float32 (of all completions, of 8 of them, and of the batch that the step was made from) and in bfloat16. At last it compares
the rates that are found with weights in float32 and in bfloat16 under DeepSpeed, which keeps a float32 copy.
"""

import tempfile
import time
from dataclasses import dataclass, field, replace
from statistics import mean, median, stdev
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from trl import TrlParser

from benchmarks import learning_runs
from benchmarks.completion_pool import sequence_logps
from benchmarks.policies import policy_directory
from benchmarks.pretrained_runs import PretrainedSpec, prepared_trainer
from benchmarks.record import machine, write_record
from benchmarks.sections.kl_measures import markdown
from benchmarks.trust_region import PRECISIONS, TrustRegionArguments
from benchmarks.zero_precision import found_rates
from examples.smollm2.__main__ import DIRECTORY
from oblr_trl import metrics
from oblr_trl.scores.parameters import local_parameter_sketch

NUM_COMPLETIONS = 8
# The first steps search for the rate: they move too little to be measured in any other way.
NUM_SEARCH_STEPS, _NUM_SEARCH_STEPS_PRETRAINED = 10, 4
_UNDER_ZERO = "9 M parameters, float32"
PRETRAINED = "SmolLM2, AdamW, 16 x 1"


@dataclass
class KLMeasuresArguments:
    """Settings; fields are documented by their `help`."""

    settings: list[str] = field(
        default_factory=lambda: [
            "AdamW, 16 x 4",
            "AdamW, 4 x 8",
            "SGD, 16 x 4",
            "LoRA r = 8, AdamW",
            *PRECISIONS,
            PRETRAINED,
        ],
        metadata={"help": "Settings of `benchmarks.trust_region`."},
    )
    num_steps: int = field(default=40, metadata={"help": "Optimizer steps."})
    num_steps_pretrained: int = field(
        default=9, metadata={"help": f"The same of `{PRETRAINED}`, where it is among the settings."}
    )
    zero_seeds: int = field(default=3, metadata={"help": "Runs in every precision under ZeRO-2; 0 leaves them out."})
    output: str = field(default="benchmarks/results/kl_measures.json", metadata={"help": "Where the numbers go."})


def with_forward_passes(trainer: Any, reference: Any, rows: list[dict[str, float]], num_search_steps: int) -> None:
    """Let a trainer append to `rows` what every way of measuring says of the step before; `reference` is a model of the same kind in
    float32 that no trainer has wrapped."""
    generate = trainer._generate_and_score_completions
    last: dict[str, Any] = {}
    seconds = [0.0]  # of forward passes

    def logps(
        output: dict[str, Tensor], state: dict[str, Tensor], dtype: torch.dtype, count: int | None = None
    ) -> Tensor:
        reference.load_state_dict(state)
        inputs = [torch.cat([output[f"prompt_{key}"], output[f"completion_{key}"]], dim=1) for key in ("ids", "mask")]
        start = time.process_time()
        with torch.no_grad(), torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
            values = sequence_logps(reference, *(part[:count] for part in [*inputs, output["completion_mask"]]))
        seconds[0] += time.process_time() - start
        return values.double()

    def kl(output: dict[str, Tensor], dtype: torch.dtype = torch.float32, count: int | None = None) -> float:
        states = (trainer.model.state_dict(), last["state"])
        new, old = (logps(output, state, dtype, count) for state in states)
        return 0.5 * (new - old).square().mean().item()

    def measured(inputs: Any) -> dict[str, Any]:
        output = generate(inputs)
        if last and trainer.state.global_step >= num_search_steps:
            start = time.process_time()
            local_parameter_sketch(trainer._score_pass)
            sketch_seconds = time.process_time() - start
            seconds[0] = 0.0
            few = kl(output, count=NUM_COMPLETIONS)
            few_seconds = seconds[0]
            rows.append(
                {
                    "sketches": trainer._metrics["train"][metrics.KL][-1],
                    "float32": kl(output),
                    "float32, few": few,
                    "bfloat16": kl(output, torch.bfloat16),
                    "own batch": kl(last["output"]),
                    "seconds of sketches": sketch_seconds,
                    "seconds of few": few_seconds,
                }
            )
        last.update(output=output, state={name: t.clone() for name, t in trainer.model.state_dict().items()})
        return output

    trainer._generate_and_score_completions = measured


def measure(setting: str, num_steps: int) -> dict[str, Any]:
    """Means over the steps of one run, and ratios to the exact KL."""
    spec = TrustRegionArguments(num_steps=num_steps).spec(setting, "trust_region", 1e-4, 0)
    rows: list[dict[str, float]] = []
    learning_runs.prepare_process()
    with tempfile.TemporaryDirectory() as folder:
        trainer, callback = learning_runs.prepared_trainer(spec, folder)
        with_forward_passes(trainer, learning_runs.load_model(spec, torch.float32).eval(), rows, NUM_SEARCH_STEPS)
        trainer.train()
    return summarise(rows, callback.learning_rates[NUM_SEARCH_STEPS:], callback.cpu_seconds[-1] / spec.num_steps)


def measure_pretrained(num_steps: int) -> dict[str, Any]:
    """The same of SmolLM2 on sums, whose rate is found in fewer steps."""
    spec = PretrainedSpec(
        "arithmetic", "ours", 16, 1, seed=0, num_steps=num_steps, eval_steps=num_steps + 1, test_size=8
    )
    rows: list[dict[str, float]] = []
    learning_runs.prepare_process()
    with tempfile.TemporaryDirectory() as folder:
        trainer, _ = prepared_trainer(spec, folder)
        reference = AutoModelForCausalLM.from_pretrained(DIRECTORY, dtype=torch.float32).eval()
        with_forward_passes(trainer, reference, rows, _NUM_SEARCH_STEPS_PRETRAINED)
        trainer.train()
    rates = [row["learning_rate"] for row in trainer.state.log_history if "reward" in row]
    return summarise(rows, rates[_NUM_SEARCH_STEPS_PRETRAINED:])


def summarise(rows: list[dict[str, float]], rates: list[float], step: float | None = None) -> dict[str, Any]:
    """Means over the steps, ratios to the exact KL, and to the seconds of a step where they are given."""
    measured = {name: [row[name] for row in rows] for name in rows[0]}
    exact = mean(measured["float32"])
    result: dict[str, Any] = {name: mean(values) for name, values in measured.items() if "seconds" not in name}
    for name in ("sketches", "float32, few"):
        errors = [value / exact for value in map(float.__sub__, measured[name], measured["float32"])]
        result[f"{name}: spread"] = stdev(errors)
    for name in ("sketches", "few"):
        result[f"share of step, {name}"] = None if step is None else mean(measured[f"seconds of {name}"]) / step
    return result | {"found rate": median(rates)}


def main(args: KLMeasuresArguments) -> None:
    """Measure, print and write."""
    started, results = machine(), {}
    for setting in args.settings:
        if setting == PRETRAINED:
            results[setting] = measure_pretrained(args.num_steps_pretrained)
            continue
        policy_directory(TrustRegionArguments().spec(setting, "constant", 1.0, 0).policy)
        results[setting] = measure(setting, args.num_steps)
    record: dict[str, Any] = {"results": results}
    if args.zero_seeds:
        spec = TrustRegionArguments(num_steps=args.num_steps).spec(_UNDER_ZERO, "trust_region", 1e-4, 0)
        record["zero"] = found_rates(replace(spec, eval_steps=args.num_steps + 1), NUM_SEARCH_STEPS, args.zero_seeds)
    print(markdown(record))
    write_record(args.output, args, started, record)


if __name__ == "__main__":
    (arguments,) = TrlParser([KLMeasuresArguments]).parse_args_and_config()
    main(arguments)
