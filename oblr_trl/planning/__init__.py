"""Arithmetic of memory, rollouts and cost, from a model's shape alone: no weights, no GPU, no transformers."""

from oblr_trl.planning.memory import MemoryItem, MemoryPlan, plan_memory
from oblr_trl.planning.schedule import Schedule
from oblr_trl.planning.setup import Adapter, Backend, Generation, Scoring, Setup
from oblr_trl.planning.shapes import PUBLISHED_SHAPES, ModelShape

__all__ = [
    "PUBLISHED_SHAPES",
    "Adapter",
    "Backend",
    "Generation",
    "MemoryItem",
    "MemoryPlan",
    "ModelShape",
    "Schedule",
    "Scoring",
    "Setup",
    "plan_memory",
]
