"""Generation: the engine interface, its implementations, and what proves them right."""

from rlhf_fast.rollout._vllm_fit import vllm_unavailable_reason
from rlhf_fast.rollout.config import RolloutConfig
from rlhf_fast.rollout.engine import RolloutEngine, Sampling, SyncReport
from rlhf_fast.rollout.hf import HFEngine
from rlhf_fast.rollout.make import make_engine
from rlhf_fast.rollout.probe import Probe, RolloutMismatch, check_probe, precision, probe
from rlhf_fast.rollout.vllm import VLLMEngine
from rlhf_fast.rollout.weights import WeightsError, WeightSource

__all__ = [
    "HFEngine",
    "Probe",
    "RolloutConfig",
    "RolloutEngine",
    "RolloutMismatch",
    "Sampling",
    "SyncReport",
    "VLLMEngine",
    "WeightSource",
    "WeightsError",
    "check_probe",
    "make_engine",
    "precision",
    "probe",
    "vllm_unavailable_reason",
]
