"""Estimates of rho beside the truth: bias, spread, coverage, and what a moving average does to them.

Errors are relative to the true rho of the same batch size. *Bias* is the error of the mean over batches, *typical* the median
of the absolute errors: an estimate without bias can still be far off every time.
"""

from collections.abc import Sequence
from statistics import mean
from typing import Any

import torch

from benchmarks.snr_estimates import ESTIMATORS, INTERVALS, BatchEstimate, smoothed_ratios
from benchmarks.snr_truth import Truth
from oblr_trl.gradient_snr import rho

# By batch size: one stream of batches per order of the prompts.
BatchStreams = dict[int, list[list[BatchEstimate]]]
TOLERANCE = 0.1
# "rho within 10 % of the true one at 64 prompts or more", with the default of the trainer.
LEAST_PROMPTS = 64
DEFAULT_DECAY = 0.9


def error_summary(ratios: Sequence[float], true: float) -> dict[str, float] | None:
    """Bias and spread of estimates of one true rho; `None` without estimates or without a positive true rho."""
    values = torch.tensor([ratio for ratio in ratios if ratio == ratio], dtype=torch.float64)
    if not values.numel() or not true > 0:
        return None
    errors = values / true - 1
    quantiles = values.quantile(torch.tensor([0.05, 0.5, 0.95], dtype=torch.float64))
    return {
        "num_estimates": values.numel(),
        "mean": values.mean().item(),
        "standard_deviation": values.std(correction=0).item(),
        "quantile_05": quantiles[0].item(),
        "median": quantiles[1].item(),
        "quantile_95": quantiles[2].item(),
        "bias": errors.mean().item(),
        "typical_error": errors.abs().median().item(),
        "rms_error": errors.square().mean().sqrt().item(),
        "within_tolerance": (errors.abs() <= TOLERANCE).double().mean().item(),
    }


def interval_coverage(batches: Sequence[BatchEstimate], name: str, true: float) -> dict[str, float]:
    """Fraction of the 95 % intervals that hold the true rho, that miss it on either side, and their mean width."""
    ends = torch.tensor([batch.intervals[name] for batch in batches], dtype=torch.float64)
    ends = ends[~ends.isnan().any(dim=1)]
    return {
        "coverage": ((ends[:, 0] <= true) & (true <= ends[:, 1])).double().mean().item(),
        "too_high": (ends[:, 0] > true).double().mean().item(),
        "too_low": (ends[:, 1] < true).double().mean().item(),
        "mean_width": (ends[:, 1] - ends[:, 0]).mean().item(),
    }


def ratio_of_means(batches: Sequence[BatchEstimate], num_prompts: int) -> float:
    """rho from the mean signal and the mean noise of many batches."""
    return rho(mean(b.moments.signal for b in batches), mean(b.moments.noise for b in batches), num_prompts)


def summarise_batches(
    streams: BatchStreams,
    truth: Truth,
    batch_sizes: Sequence[int],
    decays: Sequence[float],
    *,
    reference: int,
    num_seeds: int,
) -> list[dict[str, Any]]:
    """
    One entry per batch size.

    The prior of the baseline has more prompts to come from in a larger batch, so the noise of a prompt depends on N a
    little; the truth, measured in batches of `reference` prompts, is corrected by the ratio of the estimated noises.

    Args:
        streams (`dict`): Estimates by batch size; the first stream of each keeps the draws of the seeds apart.
        truth ([`Truth`]): The policy's truth.
        batch_sizes (`Sequence[int]`): What to summarise.
        decays (`Sequence[float]`): Decays of the moving averages.
        reference (`int`): Prompts per batch of the truth.
        num_seeds (`int`): Draws in the first stream.
    """
    noises = {size: mean(b.moments.noise for stream in lists for b in stream) for size, lists in streams.items()}
    return [
        _summarise_size(streams[size], truth, size, noises[size] / noises[reference], decays, num_seeds)
        for size in batch_sizes
    ]


def _summarise_size(
    streams: list[list[BatchEstimate]],
    truth: Truth,
    size: int,
    noise_factor: float,
    decays: Sequence[float],
    num_seeds: int,
) -> dict[str, Any]:
    true = truth.rho(size, noise_factor=noise_factor)
    batches = [batch for stream in streams for batch in stream]
    signals = torch.tensor([batch.moments.signal for batch in batches], dtype=torch.float64)
    per_seed = len(streams[0]) // num_seeds
    seeds = [ratio_of_means(streams[0][seed * per_seed :][:per_seed], size) for seed in range(num_seeds)]
    whole = ratio_of_means(batches, size)
    single = error_summary([rho(*batch.moments, size) for batch in batches], true.value)
    return {
        "num_prompts": size,
        "noise_factor": noise_factor,
        "true_rho": vars(true),
        "signal_over_truth": signals.mean().item() / truth.signal,
        "noise_over_truth": mean(b.moments.noise for b in batches) / (truth.noise.value * noise_factor),
        "signal_spread": signals.std(correction=0).item() / truth.signal,
        "negative_signal": (signals < 0).double().mean().item(),
        "ratio_of_means": {
            "rho": whole,
            "relative_error": whole / true.value - 1,
            "relative_error_by_seed": [rho / true.value - 1 for rho in seeds],
        },
        "single_batch": single,
        "coverage": {name: interval_coverage(batches, name, true.value) for name in INTERVALS},
        "smoothed": {
            name: {
                str(decay): error_summary(
                    [ratio for stream in streams for ratio in smoothed_ratios(stream, name, decay, size)], true.value
                )
                for decay in decays
            }
            for name in ESTIMATORS
        },
    }


def verdict(policies: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The worst policy and batch size of at least `LEAST_PROMPTS` prompts, by kind of estimate."""
    entries = [e for policy in policies for e in policy["batches"] if e["num_prompts"] >= LEAST_PROMPTS]

    def worst(summaries: list[dict[str, float] | None]) -> dict[str, float] | None:
        known = [summary for summary in summaries if summary is not None]
        if not known:
            return None
        return {
            "worst_bias": max((s["bias"] for s in known), key=abs),
            "worst_typical_error": max(s["typical_error"] for s in known),
            "least_within_tolerance": min(s["within_tolerance"] for s in known),
            "mean_within_tolerance": mean(s["within_tolerance"] for s in known),
        }

    result: dict[str, Any] = {
        "tolerance": TOLERANCE,
        "least_prompts": LEAST_PROMPTS,
        "default_decay": DEFAULT_DECAY,
        "ratio_of_means_worst": max((e["ratio_of_means"]["relative_error"] for e in entries), key=abs, default=None),
        "single_batch": worst([e["single_batch"] for e in entries]),
    }
    for name in ESTIMATORS:
        result[name] = worst([e["smoothed"][name].get(str(DEFAULT_DECAY)) for e in entries])
    return result
