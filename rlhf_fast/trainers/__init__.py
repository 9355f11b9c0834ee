"""The three stages of RLHF."""

from rlhf_fast.trainers.ppo import PPOTrainer
from rlhf_fast.trainers.reward_model import RewardTrainer
from rlhf_fast.trainers.sft import SFTTrainer

__all__ = ["PPOTrainer", "RewardTrainer", "SFTTrainer"]
