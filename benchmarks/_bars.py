"""What a benchmark found of a contender, and what we ask of it."""

from __future__ import annotations

from typing import NamedTuple


class Row(NamedTuple):
    """One contender in one table; seconds, bytes or FLOPs, bytes."""

    median: float
    best: float
    work: float
    peak: int | None
    returned: int

    @property
    def scratch(self) -> int:
        """Peak memory less the gradients that the call returns."""
        return max(0, (self.peak or 0) - self.returned)

    @property
    def rate(self) -> float:
        """Work a second, in the best round."""
        return self.work / self.best


class Bar(NamedTuple):
    """What we ask of a contender, in the tables whose title has `where`; printed, never asserted.

    `faster`: median time of the rival over the contender's. `scratch`: of the rival's. `share`: of
    the rival's rate, which is then a floor. `within`: median seconds, whatever the rival takes.
    """

    where: str
    contender: str
    rival: str
    faster: float | None = None
    scratch: float | None = None
    share: float | None = None
    within: float | None = None


def verdicts(bar: Bar, rows: dict[str, Row]) -> list[str]:
    """A line for each thing asked; none if the contender was not measured."""
    if bar.contender not in rows:
        return []
    if bar.rival not in rows:
        return [f"{bar.contender}: {bar.rival} was not measured, a bar is open"]
    ours, theirs = rows[bar.contender], rows[bar.rival]
    lines: list[str] = []

    def say(found: str, met: bool) -> None:
        lines.append(f"{found}: {'met' if met else 'MISSED'}")

    if bar.faster is not None:
        got = theirs.median / ours.median
        found = f"{bar.rival} / {bar.contender}: {got:.2f} in time, bar {bar.faster:.2f}"
        say(found, got >= bar.faster)
    if bar.scratch is not None and ours.peak is not None and theirs.scratch > 0:
        got = ours.scratch / theirs.scratch
        found = f"{bar.contender} / {bar.rival}: {got:.1%} of its memory beyond the gradients"
        say(f"{found}, bar {bar.scratch:.0%}", got <= bar.scratch)
    if bar.share is not None:
        got = ours.rate / theirs.rate
        found = f"{bar.contender}: {got:.1%} of the rate of {bar.rival}, bar {bar.share:.0%}"
        say(found, got >= bar.share)
    if bar.within is not None:
        found = f"{bar.contender}: {ours.median * 1e6:.1f} us, bar {bar.within * 1e6:.1f}"
        say(found, ours.median <= bar.within)
    return lines
