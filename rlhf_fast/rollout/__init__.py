"""Generation: the engine interface and its implementations."""

from rlhf_fast.rollout.engine import RolloutEngine, Sampling
from rlhf_fast.rollout.hf import HFEngine

__all__ = ["HFEngine", "RolloutEngine", "Sampling"]
