"""The ops: plain functions of tensors and numbers, each usable alone.

The name of an op fixes its mathematics, `backend` only who computes it.
"""

from rlhf_fast.ops._plan import LinearPlan, plan_linear_logprobs
from rlhf_fast.ops._products import ProductCount, count_products
from rlhf_fast.ops.discounted_returns import discounted_returns
from rlhf_fast.ops.full_kl import full_kl
from rlhf_fast.ops.gae import gae
from rlhf_fast.ops.group_advantages import group_advantages
from rlhf_fast.ops.importance_weights import importance_weights
from rlhf_fast.ops.kl_estimate import kl_estimate
from rlhf_fast.ops.linear_kl import linear_kl
from rlhf_fast.ops.linear_logprobs import linear_logprobs
from rlhf_fast.ops.linear_policy_loss import linear_policy_loss
from rlhf_fast.ops.masked import masked_mean, masked_var, masked_whiten
from rlhf_fast.ops.pairwise_loss import pairwise_loss
from rlhf_fast.ops.policy_loss import policy_loss
from rlhf_fast.ops.ppo_advantages import ppo_advantages
from rlhf_fast.ops.ranking_loss import ranking_loss
from rlhf_fast.ops.rating_loss import rating_loss
from rlhf_fast.ops.token_logprobs import token_logprobs
from rlhf_fast.ops.value_loss import value_loss

__all__ = [
    "LinearPlan",
    "ProductCount",
    "count_products",
    "discounted_returns",
    "full_kl",
    "gae",
    "group_advantages",
    "importance_weights",
    "kl_estimate",
    "linear_kl",
    "linear_logprobs",
    "linear_policy_loss",
    "masked_mean",
    "masked_var",
    "masked_whiten",
    "pairwise_loss",
    "plan_linear_logprobs",
    "policy_loss",
    "ppo_advantages",
    "ranking_loss",
    "rating_loss",
    "token_logprobs",
    "value_loss",
]
