"""The curves of a demo run as one picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

INK, ACCENT, SOFT = "#1b3a57", "#c8553d", "#8fa7bd"


def _rounds(values: Sequence[float], rounds: int) -> list[float]:
    size = len(values) // rounds
    return [sum(values[i * size : (i + 1) * size]) / size for i in range(rounds)]


def _smooth(values: Sequence[float], width: int) -> list[float]:
    windows = (values[max(0, i - width + 1) : i + 1] for i in range(len(values)))
    return [sum(window) / len(window) for window in windows]


def plot(
    path: Path,
    *,
    sft: list[dict[str, float]],
    reward: list[dict[str, float]],
    ppo: list[dict[str, float]],
    utilities: Sequence[float],
    report: dict[str, Any],
) -> None:
    """Draws losses, accuracy, learned reward, true utility and KL into a PNG at `path`.

    Args:
        path: Where the picture goes.
        sft, reward, ppo: The metrics of the three stages, a dict a step.
        utilities: True utility of every completion that PPO sampled, in order.
        report: The demo's report, for the horizontal lines.
    """
    figure = Figure(figsize=(12, 6.4), layout="constrained", dpi=110)
    axes = figure.subplots(2, 3)
    figure.suptitle("rlhf_fast demo: SFT, reward model, PPO", fontsize=14, color=INK)
    steps = [row["step"] for row in ppo]

    def draw(axis: Any, x: list[float], y: Sequence[float], title: str, xlabel: str) -> None:
        axis.plot(x, y, color=INK, linewidth=1.6)
        axis.set_title(title, fontsize=11)
        axis.set_xlabel(xlabel, fontsize=9)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)

    def line(axis: Any, y: float, label: str, color: str) -> None:
        axis.axhline(y, color=color, linestyle="--", linewidth=1.2, label=label)
        axis.legend(fontsize=8, frameon=False)

    draw(
        axes[0, 0],
        [row["step"] for row in sft],
        [row["loss"] for row in sft],
        "SFT: loss (nats a token)",
        "step",
    )
    draw(
        axes[0, 1],
        [row["step"] for row in reward],
        _smooth([row["accuracy"] for row in reward], 10),
        "reward model: training accuracy, mean of 10 steps",
        "step",
    )
    line(axes[0, 1], report["bayes_accuracy"], "Bayes accuracy", ACCENT)
    line(axes[0, 1], report["reward_model_accuracy"], "held-out accuracy", SOFT)
    draw(axes[0, 2], steps, [row["score"] for row in ppo], "PPO: learned reward", "iteration")
    draw(
        axes[1, 0],
        steps,
        _rounds(utilities, len(ppo)),
        "PPO: true utility (never shown to it)",
        "iteration",
    )
    line(axes[1, 0], report["utility_best"], "best attainable", ACCENT)
    draw(axes[1, 1], steps, [row["kl"] for row in ppo], "PPO: KL from the reference", "iteration")
    draw(
        axes[1, 2],
        steps,
        [row["explained_variance"] for row in ppo],
        "PPO: critic's explained variance",
        "iteration",
    )
    figure.savefig(path)
