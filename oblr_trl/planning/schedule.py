"""How many prompts, completions, passes and optimizer steps one generation batch makes: TRL's counting, spelt out."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """
    Counts of one run.

    Args:
        num_processes (`int`): Processes, one GPU each.
        micro_batch (`int`): `per_device_train_batch_size`.
        accumulation (`int`): `gradient_accumulation_steps`.
        steps_per_generation (`int`): Micro-batches that one generation batch is cut into.
        num_iterations (`int`): How often a generation batch is trained on.
        num_generations (`int`): Completions per prompt.
        needs_old_logps (`bool`): Whether the old log-probabilities take a forward pass of their own.
        needs_scores (`bool`): Whether there is a scoring pass.
        scores_ride (`bool`): Whether the scoring pass takes the place of that forward pass.
    """

    num_processes: int
    micro_batch: int
    accumulation: int
    steps_per_generation: int
    num_iterations: int
    num_generations: int
    needs_old_logps: bool
    needs_scores: bool
    scores_ride: bool

    @property
    def completions_per_process(self) -> int:
        """Completions of one generation batch on one process."""
        return self.micro_batch * self.steps_per_generation

    @property
    def completions_per_batch(self) -> int:
        """Completions of one generation batch."""
        return self.completions_per_process * self.num_processes

    @property
    def prompts_per_batch(self) -> int:
        """Prompts of one generation batch."""
        return self.completions_per_batch // self.num_generations

    @property
    def completions_per_step(self) -> int:
        """Completions of one optimizer step."""
        return self.micro_batch * self.num_processes * self.accumulation

    @property
    def prompts_per_step(self) -> float:
        """Prompts of one optimizer step; a fraction where steps cut through groups."""
        return self.completions_per_step / self.num_generations

    @property
    def steps_per_batch(self) -> float:
        """Optimizer steps on one generation batch; below 1 where several batches make a step."""
        return self.steps_per_generation * self.num_iterations / self.accumulation

    @property
    def old_logps_passes(self) -> int:
        """Forward passes of `micro_batch` sequences per process and generation batch for old log-probabilities alone."""
        return self.steps_per_generation if self.needs_old_logps and not self.scores_ride else 0

    @property
    def scoring_passes(self) -> int:
        """Scoring passes of `micro_batch` sequences per process and generation batch."""
        return self.steps_per_generation if self.needs_scores else 0
