"""The losses of PPO's family, each a line of one table over the same op.

docs/losses.md has their formulas, and their defaults beside those of verl, OpenRLHF and TRL.
"""

from __future__ import annotations

from typing import Any, NamedTuple

CRITIC, RETURNS = "gae", "returns"


class Preset(NamedTuple):
    """A loss by its name.

    Attributes:
        source: Where it comes from.
        advantages: `gae`, of a critic; `returns`: discounted ones, whitened over the batch; or a
            `kind` of `group_advantages`.
        loss: Options of `policy_loss` that make it what it is.
        defaults: Values of `PPOConfig` that take the place of its defaults.
    """

    source: str
    advantages: str
    loss: dict[str, Any]
    defaults: dict[str, Any]

    @property
    def needs_critic(self) -> bool:
        return self.advantages == CRITIC

    @property
    def needs_groups(self) -> bool:
        return self.advantages not in (CRITIC, RETURNS)

    @property
    def unread(self) -> tuple[str, ...]:
        """Fields of `PPOConfig` that mean nothing to this loss."""
        names: tuple[str, ...] = ()
        if not self.needs_critic:
            names += ("lam", "value_lam", "value_clip", "value_coef", "critic_learning_rate")
            names += ("whiten_rewards",)
        if self.needs_groups:
            names += ("gamma", "whiten_advantages")
        if self.loss["ratio"] == "none":
            names += ("clip_low", "clip_high")
        return names

    @property
    def aggregation(self) -> str:
        return self.loss["aggregation"]


def _group(**defaults: Any) -> dict[str, Any]:
    """What losses over groups of completions share: one pass, and no KL unless they name one."""
    return {"samples_per_prompt": 8, "epochs": 1, "kl_coef": 0.0, **defaults}


_TOKEN = {"ratio": "token", "aggregation": "token-mean"}

PRESETS: dict[str, Preset] = {
    "ppo": Preset("Schulman et al. 2017, arXiv:1707.06347", CRITIC, _TOKEN, {}),
    "vapo": Preset(
        "Yue et al. 2025, arXiv:2504.05118",
        CRITIC,
        _TOKEN,
        {"lam": "adaptive", "value_lam": 1.0, "clip_high": 0.28, "kl_coef": 0.0},
    ),
    "reinforce": Preset(
        "Williams 1992",
        RETURNS,
        {"ratio": "none", "aggregation": "token-mean"},
        {"epochs": 1},
    ),
    "reinforce++": Preset(
        "Hu et al. 2025, arXiv:2501.03262 (with a baseline by group)",
        "reinforce++",
        _TOKEN,
        _group(kl_loss_coef=0.001, kl_loss_kind="k2"),
    ),
    "rloo": Preset(
        "Ahmadian et al. 2024, arXiv:2402.14740",
        "rloo",
        {"ratio": "token", "aggregation": "seq-mean-token-sum"},
        _group(kl_coef=0.05),
    ),
    "grpo": Preset(
        "Shao et al. 2024, arXiv:2402.03300",
        "grpo",
        {"ratio": "token", "aggregation": "seq-mean-token-mean"},
        _group(kl_loss_coef=0.04, kl_loss_kind="k3"),
    ),
    "dr_grpo": Preset(
        "Liu et al. 2025, arXiv:2503.20783",
        "dr_grpo",
        {"ratio": "token", "aggregation": "constant"},
        _group(),
    ),
    "dapo": Preset("Yu et al. 2025, arXiv:2503.14476", "grpo", _TOKEN, _group(clip_high=0.28)),
    "gspo": Preset(
        "Zheng et al. 2025, arXiv:2507.18071",
        "grpo",
        {"ratio": "sequence", "aggregation": "seq-mean-token-mean"},
        _group(clip_low=3e-4, clip_high=4e-4),
    ),
    "cispo": Preset(
        "MiniMax 2025, arXiv:2506.13585",
        "grpo",
        {"ratio": "cispo", "aggregation": "token-mean"},
        _group(clip_low=1.0, clip_high=4.0),
    ),
}
