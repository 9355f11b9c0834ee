"""PPO and reward-model training for language models, on fused kernels, with a CPU path.

The names below are imported on first use, so that `import rlhf_fast.ops` needs torch alone.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlhf_fast.api import ppo, reward, sft
    from rlhf_fast.config import PPOConfig, RewardConfig, SFTConfig
    from rlhf_fast.lora import LoraConfig
    from rlhf_fast.scalar_models import RewardModel
    from rlhf_fast.trainers import PPOTrainer, RewardTrainer, SFTTrainer

__version__ = "0.1.0"

_HOMES = {
    "sft": "rlhf_fast.api",
    "reward": "rlhf_fast.api",
    "ppo": "rlhf_fast.api",
    "SFTConfig": "rlhf_fast.config",
    "RewardConfig": "rlhf_fast.config",
    "PPOConfig": "rlhf_fast.config",
    "LoraConfig": "rlhf_fast.lora",
    "RewardModel": "rlhf_fast.scalar_models",
    "SFTTrainer": "rlhf_fast.trainers",
    "RewardTrainer": "rlhf_fast.trainers",
    "PPOTrainer": "rlhf_fast.trainers",
}

__all__ = [
    "LoraConfig",
    "PPOConfig",
    "PPOTrainer",
    "RewardConfig",
    "RewardModel",
    "RewardTrainer",
    "SFTConfig",
    "SFTTrainer",
    "__version__",
    "ppo",
    "reward",
    "sft",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'rlhf_fast' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
