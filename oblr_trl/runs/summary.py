"""From the logs of one method's seeds to the numbers of a table and the curves of a picture: means, spreads, bands."""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from oblr_trl import metrics
from oblr_trl.runs.logs import RunLog

# The final reward is averaged over this many steps, because the reward of a single batch is mostly noise.
FINAL_STEPS = 10
# With fewer seeds a resampled interval is narrower than the spread that it should show, so the band is their range.
MIN_SEEDS_FOR_BOOTSTRAP = 5
NUM_BOOTSTRAP_SAMPLES = 1000


@dataclass(frozen=True)
class Statistic:
    """
    One quantity over the seeds of a method.

    Args:
        values (`tuple[float | None, ...]`):
            The quantity of each seed, `None` where its log does not hold it.
    """

    values: tuple[float | None, ...]

    @property
    def known(self) -> list[float]:
        """The values of the seeds that logged the quantity."""
        return [value for value in self.values if value is not None]

    @property
    def mean(self) -> float | None:
        """Mean of the known values, `None` if there is none."""
        return mean(self.known)

    @property
    def std(self) -> float | None:
        """Sample standard deviation (n - 1) of the known values, `None` for fewer than two."""
        return float(np.std(self.known, ddof=1)) if len(self.known) > 1 else None


@dataclass(frozen=True)
class Curve:
    """Mean over seeds by optimizer step, and the lower and upper edge of its band (see [`band_name`])."""

    steps: list[int]
    mean: list[float]
    low: list[float]
    high: list[float]


def choose_evaluation_metric(methods: Mapping[str, Sequence[RunLog]]) -> str | None:
    """
    The metric by which all methods are compared on held-out prompts: `eval_accuracy` if every evaluated run logged it, else
    `eval_reward` if every one logged that, else whichever of the two any run logged. `None`: no run was evaluated.
    """
    candidates = metrics.EVALUATIONS
    logged = [{metric for metric in candidates if run.series(metric)} for runs in methods.values() for run in runs]
    evaluated = [metrics for metrics in logged if metrics]
    for candidate in candidates:
        if evaluated and all(candidate in metrics for metrics in evaluated):
            return candidate
    return next((candidate for candidate in candidates if any(candidate in metrics for metrics in evaluated)), None)


def summarize(runs: Sequence[RunLog], evaluation_metric: str | None) -> dict[str, Statistic]:
    """The quantities of the table for the seeds of one method. The keys are those of the JSON file."""

    def over_seeds(quantity: Callable[[RunLog], float | None]) -> Statistic:
        return Statistic(tuple(quantity(run) for run in runs))

    return {
        "steps": over_seeds(lambda run: float(run.num_steps)),
        "start_evaluation": over_seeds(lambda run: start_evaluation(run, evaluation_metric)),
        "final_evaluation": over_seeds(lambda run: final_evaluation(run, evaluation_metric)),
        "evaluation_gain": over_seeds(lambda run: evaluation_gain(run, evaluation_metric)),
        "final_reward": over_seeds(final_reward),
        "learning_rate": over_seeds(lambda run: mean(run.series(metrics.LEARNING_RATE).values())),
        "last_learning_rate": over_seeds(
            lambda run: next(reversed(run.series(metrics.LEARNING_RATE).values()), None)
        ),
        "lr_multiplier": over_seeds(lambda run: mean(run.series(metrics.LR_MULTIPLIER).values())),
        "rho": over_seeds(lambda run: mean(run.series(metrics.RHO).values())),
        "variance_ratio": over_seeds(lambda run: mean(run.series(metrics.VARIANCE_VS_LEAVE_ONE_OUT).values())),
        "train_runtime": over_seeds(train_runtime),
    }


def mean(values: Iterable[float]) -> float | None:
    """Arithmetic mean, `None` of nothing."""
    numbers = list(values)
    return float(np.mean(numbers)) if numbers else None


def start_evaluation(run: RunLog, metric: str | None) -> float | None:
    """The evaluation before the first optimizer step (`eval_on_start`); a later one is not the start."""
    return None if metric is None else run.series(metric).get(0)


def final_evaluation(run: RunLog, metric: str | None) -> float | None:
    """The last evaluation after at least one optimizer step."""
    series = {} if metric is None else run.series(metric)
    return next((series[step] for step in reversed(series) if step > 0), None)


def evaluation_gain(run: RunLog, metric: str | None) -> float | None:
    """Final minus start, `None` unless both are known."""
    start, final = start_evaluation(run, metric), final_evaluation(run, metric)
    return None if start is None or final is None else final - start


def final_reward(run: RunLog) -> float | None:
    """Mean of the training rewards that were logged in the last [`FINAL_STEPS`] steps of the run."""
    return mean(value for step, value in run.series(metrics.REWARD).items() if step > run.num_steps - FINAL_STEPS)


def train_runtime(run: RunLog) -> float | None:
    """
    Seconds that training took, evaluations included. `None` for a run that was resumed: the trainer times only the part
    after it resumed, which the steps it counted in that time reveal.
    """
    runtimes = run.series(metrics.TRAIN_RUNTIME)
    if not runtimes:
        return None
    step, runtime = list(runtimes.items())[-1]
    steps_per_second = run.series(metrics.TRAIN_STEPS_PER_SECOND).get(step)
    if steps_per_second is None:
        return runtime
    # The trainer rounds steps per second to 3 decimals, which a long run multiplies up.
    rounding = 0.0005 * runtime + 0.5
    return None if steps_per_second * runtime < run.num_steps - rounding else runtime


def smooth(values: Sequence[float], window: int) -> list[float]:
    """Centred moving average over `window` (odd) values, of which only those that exist count at the two ends."""
    half = window // 2
    return [float(np.mean(values[max(0, index - half) : index + half + 1])) for index in range(len(values))]


def seed_curve(runs: Sequence[RunLog], metric: str, *, window: int = 1) -> Curve | None:
    """
    Mean and band over the seeds that logged `metric`; every seed is smoothed by itself first.

    The curve ends with the seed that ends first: past that step its mean would jump to that of the remaining seeds.

    Returns:
        [`Curve`] or `None`: `None` if no seed logged the metric.
    """
    logged = [series for run in runs if (series := run.series(metric))]
    if not logged:
        return None
    last_step = min(max(series) for series in logged)
    by_step: dict[int, list[float]] = {}
    for series in logged:
        for step, value in zip(series, smooth(list(series.values()), window), strict=True):
            if step <= last_step:
                by_step.setdefault(step, []).append(value)
    steps = sorted(by_step)
    bands = [band(by_step[step], num_seeds=len(runs)) for step in steps]
    return Curve(
        steps=steps,
        mean=[float(np.mean(by_step[step])) for step in steps],
        low=[low for low, _ in bands],
        high=[high for _, high in bands],
    )


def band(values: Sequence[float], *, num_seeds: int) -> tuple[float, float]:
    """
    Lower and upper edge of the band around the mean of `values`, one per seed that logged at this step.

    [`band_name`] says what the edges are. That depends on the seeds of the method, not on how many logged at this step, so
    that one curve has one kind of band.
    """
    if num_seeds < MIN_SEEDS_FOR_BOOTSTRAP:
        return min(values), max(values)
    means = np.asarray(values)[_bootstrap_indices(len(values))].mean(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def band_name(num_seeds: int) -> str:
    """What the band over `num_seeds` seeds shows, in words."""
    return "min to max" if num_seeds < MIN_SEEDS_FOR_BOOTSTRAP else "95 % bootstrap interval"


@functools.cache
def _bootstrap_indices(num_seeds: int) -> np.ndarray:
    """The same resamples for every step, metric and call: a picture drawn twice is the same picture."""
    return np.random.default_rng(0).integers(num_seeds, size=(NUM_BOOTSTRAP_SAMPLES, num_seeds))
