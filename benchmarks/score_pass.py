"""What a scoring pass costs beside training, as ratios of interleaved measurements in one process.

    python -m benchmarks.score_pass

The model is a randomly initialised Qwen3 (float32 on CPU, bfloat16 on a GPU), the batch has no padding, and the last three
quarters of every sequence are the completion. Every pass is timed once per round, in an order that rotates; a ratio is taken
within a round and its median over the rounds is printed with the quartiles, so that a slow spell of the machine cancels.
"""

import itertools
import time
from dataclasses import dataclass, field
from statistics import median, quantiles
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import Qwen3Config, Qwen3ForCausalLM
from trl import TrlParser
from trl.trainer.utils import add_fused_lm_head

from benchmarks.record import machine, write_record
from oblr_trl.scores import ScoreOutput, ScorePass
from oblr_trl.scores.taps import frozen_parameters

PASSES = {
    "train": "training: forward + backward of TRL's loss, all weight gradients",
    "no_taps": "TRL's scoring forward + backward of activations alone",
    "no_taps_own_head": "the same with our output projection, still without layer sketches",
    "all": "scope all, sketches",
    "last_k": "scope last_k = 1, sketches",
    "lm_head": "scope lm_head, sketches",
    "exact": "scope all, exact norms",
    "per_sequence": "one forward + backward per sequence, exact norms",
}
# Numerator, denominator, and the ratio that the project aims to stay below on a CPU.
RATIOS: dict[str, tuple[str, str, float | None]] = {
    "sketching adds": ("all", "no_taps", 1.20),
    "sketching adds to our own head": ("all", "no_taps_own_head", None),
    "no taps / training": ("no_taps", "train", None),
    "all / training": ("all", "train", None),
    "last_k / training": ("last_k", "train", 0.60),
    "lm_head / training": ("lm_head", "train", 0.40),
    "exact / training": ("exact", "train", None),
    "per sequence / training": ("per_sequence", "train", None),
}


@dataclass
class ScorePassArguments:
    """
    Settings of the benchmark.

    Args:
        hidden_size (`int`, *optional*, defaults to `512`): Hidden features d; the MLP has 3 d.
        num_layers (`int`, *optional*, defaults to `8`): Decoder blocks.
        vocab_sizes (`list[int]`, *optional*, defaults to `[8192]`): Vocabularies, one table each.
        batch_size (`int`, *optional*, defaults to `8`): Sequences.
        sequence_lengths (`list[int]`, *optional*, defaults to `[256, 512]`): Tokens per sequence, one table each.
        sketch_dim (`int`, *optional*, defaults to `4096`): Length of a sketch.
        rounds (`int`, *optional*, defaults to `7`): Measurements of every pass; one more warms up.
        seed (`int`, *optional*, defaults to `0`): Seed of weights, tokens and projections.
        output (`str`, *optional*, defaults to `"benchmarks/results/score_pass.json"`): Where the numbers go.
    """

    hidden_size: int = field(default=512, metadata={"help": "Hidden features d; the MLP has 3 d."})
    num_layers: int = field(default=8, metadata={"help": "Decoder blocks."})
    vocab_sizes: list[int] = field(default_factory=lambda: [8192], metadata={"help": "Vocabularies."})
    batch_size: int = field(default=8, metadata={"help": "Sequences."})
    sequence_lengths: list[int] = field(default_factory=lambda: [256, 512], metadata={"help": "Tokens per sequence."})
    sketch_dim: int = field(default=4096, metadata={"help": "Length of a sketch."})
    rounds: int = field(default=7, metadata={"help": "Measurements of every pass."})
    seed: int = field(default=0, metadata={"help": "Seed of weights, tokens and projections."})
    output: str = field(default="benchmarks/results/score_pass.json", metadata={"help": "Where the numbers go."})


def build_model(args: ScorePassArguments, vocab_size: int, device: torch.device) -> Qwen3ForCausalLM:
    """A randomly initialised Qwen3 with heads of 64 and tied embeddings."""
    torch.manual_seed(args.seed)
    num_heads = max(args.hidden_size // 64, 1)
    config = Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=args.hidden_size,
        intermediate_size=3 * args.hidden_size,
        num_hidden_layers=args.num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=max(num_heads // 2, 1),
        head_dim=64,
        tie_word_embeddings=True,
    )
    model = Qwen3ForCausalLM(config).to(device)
    return (model.bfloat16() if device.type == "cuda" else model).train()


class Passes:
    """
    The passes of [`PASSES`] over one batch, as methods of their names.

    Args:
        model ([`~transformers.Qwen3ForCausalLM`]): The policy.
        args ([`ScorePassArguments`]): Settings.
        input_ids (`torch.Tensor` of shape `(B, L)`): Tokens of prompts and completions.
    """

    def __init__(self, model: Qwen3ForCausalLM, args: ScorePassArguments, input_ids: Tensor) -> None:
        self.model = model
        self.num_tokens = input_ids.size(1) * 3 // 4
        self.targets = input_ids[:, -self.num_tokens :]
        self.token_weights = torch.ones(self.targets.shape, device=input_ids.device)
        self.inputs = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
        self.labels = input_ids.clone()
        self.labels[:, : -self.num_tokens] = -100
        common: dict[str, Any] = {"sketch_dim": args.sketch_dim, "seed": args.seed}
        self._score_passes = {
            "no_taps_own_head": ScorePass(model, **common),
            "all": ScorePass(model, **common),
            "last_k": ScorePass(model, scope="last_k", last_k=1, **common),
            "lm_head": ScorePass(model, scope="lm_head", **common),
            "exact": ScorePass(model, methods=("exact",), **common),
        }
        self._plain_forward = model.forward

    def run(self, name: str) -> float:
        """Seconds that one run of the pass takes; gradients are dropped outside of the measurement."""
        _synchronize(self.targets.device)
        start = time.perf_counter()
        if name == "no_taps_own_head":
            self.no_taps_own_head()
        elif name in self._score_passes:
            self.score(name)
        else:
            {"train": self.train, "no_taps": self.no_taps, "per_sequence": self.per_sequence}[name]()
        _synchronize(self.targets.device)
        seconds = time.perf_counter() - start
        self.model.zero_grad(set_to_none=True)
        return seconds

    def fused_objective(self, rows: slice, outputs: tuple[str, ...]) -> Tensor:
        """Summed log-probability of completions by TRL's fused output projection."""
        add_fused_lm_head(self.model, outputs=outputs)
        try:
            inputs = {name: values[rows] for name, values in self.inputs.items()}
            log_probs = self.model(**inputs, labels=self.labels[rows], fused_lm_head=True).log_probs
        finally:
            self.model.forward = self._plain_forward
        return (log_probs[:, -self.num_tokens :] * self.token_weights[rows]).sum()

    def train(self) -> None:
        """What a training step spends before the optimizer; TRL's trainer always asks for the entropy too."""
        self.fused_objective(slice(None), ("log_probs", "entropy")).backward()

    def no_taps(self) -> None:
        """The arithmetic that a scoring pass cannot avoid, by TRL's means: no entropy, no weight gradient."""
        embedded: list[Tensor] = []

        def on_embedding(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
            embedded.append(output.detach().requires_grad_())
            return embedded[0]

        handle = self.model.get_input_embeddings().register_forward_hook(on_embedding)
        try:
            with frozen_parameters(self.model):
                torch.autograd.grad(self.fused_objective(slice(None), ("log_probs",)), embedded)
        finally:
            handle.remove()

    def score(self, name: str) -> ScoreOutput:
        """The package's pass."""
        return self._score_passes[name](self.inputs, self.targets, self.token_weights)

    def no_taps_own_head(self) -> None:
        """A pass over a single norm at the very bottom goes all the way down and sketches next to nothing."""
        lowest = self.model.get_submodule("model.layers.0.input_layernorm").weight
        others = [parameter for parameter in self.model.parameters() if parameter is not lowest]
        for parameter in others:
            parameter.requires_grad_(False)
        try:
            self.score("no_taps_own_head")
        finally:
            for parameter in others:
                parameter.requires_grad_(True)

    def per_sequence(self) -> list[Tensor]:
        """Squared norms the obvious way, one sequence at a time."""
        norms = []
        for i in range(self.targets.size(0)):
            objective = self.fused_objective(slice(i, i + 1), ("log_probs",))
            gradients = torch.autograd.grad(objective, list(self.model.parameters()))
            norms.append(torch.stack([gradient.float().square().sum() for gradient in gradients]).sum())
        return norms


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(args: ScorePassArguments, vocab_size: int, sequence_length: int, progress: tqdm) -> dict[str, list[float]]:
    """Seconds of every pass in every round. The order rotates, so that no pass always follows the same one."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = build_model(args, vocab_size, device)
    generator = torch.Generator().manual_seed(args.seed)
    input_ids = torch.randint(0, vocab_size, (args.batch_size, sequence_length), generator=generator).to(device)
    passes = Passes(model, args, input_ids)
    names = list(PASSES)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for round_ in range(args.rounds + 1):
        shift = round_ % len(names)
        for name in names[shift:] + names[:shift]:
            elapsed = passes.run(name)
            if round_ > 0:  # the first one draws projections and warms caches
                seconds[name].append(elapsed)
            progress.update()
    return seconds


def ratios(seconds: dict[str, list[float]]) -> dict[str, dict[str, float | None]]:
    """Median, quartiles and target of every ratio of [`RATIOS`], each taken within its round."""
    results: dict[str, dict[str, float | None]] = {}
    for label, (numerator, denominator, target) in RATIOS.items():
        by_round = [a / b for a, b in zip(seconds[numerator], seconds[denominator], strict=True)]
        lower, _, upper = quantiles(by_round, n=4, method="inclusive") if len(by_round) > 1 else by_round * 3
        results[label] = {"median": median(by_round), "lower": lower, "upper": upper, "target": target}
    return results


def print_tables(cases: list[dict[str, Any]], started: dict[str, Any]) -> None:
    """Print medians of times and of ratios for every case."""
    print(
        f"{started['gpu'] or started['cpu']}, {started['num_threads']} threads, load {started['load_average']} at start"
    )
    print("ratios: median over rounds [quartiles]\n")
    for case in cases:
        print(f"{case['batch_size']} x {case['sequence_length']} tokens, vocabulary {case['vocab_size']}")
        for name, description in PASSES.items():
            print(f"  {description:<68}{median(case['seconds'][name]):>8.3f} s")
        for label, ratio in case["ratios"].items():
            numbers = f"{ratio['median']:>7.2f} [{ratio['lower']:.2f}, {ratio['upper']:.2f}]"
            target = ratio["target"]
            verdict = (
                "" if target is None else f"  target {target:.2f}: {'met' if ratio['median'] <= target else 'MISSED'}"
            )
            print(f"  {label:<38}{numbers}{verdict}")
        print()
    print(
        "Targets are for a CPU. Small batches suit a CPU's cache, so `per sequence` looks better here than on a GPU; there, "
        "0.67 of\ntraining (no weight gradients) is the arithmetic limit of scope all."
    )


def make_parser() -> TrlParser:
    """Parser of the command line; a misspelt key fails."""
    return TrlParser([ScorePassArguments])


def main(args: ScorePassArguments) -> None:
    """Measure, print and write."""
    started = machine()
    num_cases = len(args.vocab_sizes) * len(args.sequence_lengths)
    cases: list[dict[str, Any]] = []
    with tqdm(total=num_cases * (args.rounds + 1) * len(PASSES), desc="passes timed") as progress:
        for vocab_size, sequence_length in itertools.product(args.vocab_sizes, args.sequence_lengths):
            seconds = measure(args, vocab_size, sequence_length, progress)
            cases.append(
                {
                    "batch_size": args.batch_size,
                    "sequence_length": sequence_length,
                    "vocab_size": vocab_size,
                    "ratios": ratios(seconds),
                    "seconds": seconds,
                }
            )
    print_tables(cases, started)
    write_record(args.output, args, started, {"passes": PASSES, "cases": cases})


if __name__ == "__main__":
    (arguments,) = make_parser().parse_args_and_config()
    main(arguments)
