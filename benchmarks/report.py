"""Times of two sides that took turns, as percentiles, a ratio with its spread, and a table."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from time import perf_counter, sleep
from typing import Any, Literal

import numpy as np

__all__ = ["Comparison", "Goal", "Report", "TakingTurns"]

_PAUSE_S = 0.02  # threads of one side's pool may spin for a while after its work


@dataclass(frozen=True, slots=True, kw_only=True)
class Goal:
    """What the ratio is wanted to be; ``"peer / ours"`` should be at least `bound`, ``"ours / peer"`` at most."""

    ratio: Literal["peer / ours", "ours / peer"]
    bound: float | None = None

    def verdict(self, ratio: float) -> str:
        """The goal in words, and whether it is met.

        >>> Goal(ratio="peer / ours", bound=4).verdict(5.2)
        'at least 4: met'
        """
        if self.bound is None:
            return ""
        more = self.ratio == "peer / ours"
        met = ratio >= self.bound if more else ratio < self.bound
        return f"{'at least' if more else 'under'} {self.bound:g}: {'met' if met else 'MISSED'}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Milliseconds of both sides, round by round; `theirs` is empty where there is no peer."""

    name: str
    ours: Sequence[float]
    theirs: Sequence[float]
    goal: Goal

    def ratios(self) -> tuple[float, float, float]:
        """Ratio of the medians; quartiles of the ratios of rounds that stood side by side.

        >>> Comparison(name="", ours=[1, 2, 3], theirs=[8, 8, 9], goal=Goal(ratio="peer / ours")).ratios()
        (4.0, 3.5, 6.0)
        """
        above, below = np.array(self.theirs), np.array(self.ours)
        if self.goal.ratio == "ours / peer":
            above, below = below, above
        low, high = np.percentile(above / below, [25, 75])
        return float(np.median(above) / np.median(below)), float(low), float(high)

    def summary(self) -> dict[str, Any]:
        """For the file of pytest-benchmark's ``--benchmark-json``."""
        facts: dict[str, Any] = {"ours_ms": _percentiles(self.ours), "rounds": len(self.ours)}
        if len(self.theirs):
            middle, low, high = self.ratios()
            facts |= {"peer_ms": _percentiles(self.theirs), "ratio": middle, "ratio_quartiles": [low, high]}
            facts |= {"ratio_is": self.goal.ratio, "goal": self.goal.verdict(middle)}
        return facts

    def line(self) -> str:
        """Row of the table."""
        text = f"{self.name:<34}" + _columns(self.ours)
        if not len(self.theirs):
            return text + f"{'-':>10}{'-':>10}"
        middle, low, high = self.ratios()
        spread = f"{middle:.2f} ({low:.2f} - {high:.2f})"
        verdict = self.goal.verdict(middle)
        row = text + _columns(self.theirs) + f"{len(self.ours):>8}  {spread:<26}{self.goal.ratio:<13}{verdict}"
        return row.rstrip()


@dataclass(slots=True)
class Report:
    """What the end of the test run prints."""

    notes: list[str] = field(default_factory=list)
    rows: list[Comparison] = field(default_factory=list)
    judged: bool = True

    def goal(self, ratio: Literal["peer / ours", "ours / peer"], bound: float | None = None) -> Goal:
        """A goal, without its bound where the weights are random: those answers run on and flatter ours."""
        return Goal(ratio=ratio, bound=bound if self.judged else None)

    def note(self, text: str) -> None:
        """Add a line above the table, once."""
        if text not in self.notes:
            self.notes.append(text)

    def lines(self) -> list[str]:
        """Notes and table."""
        if not self.rows:
            return self.notes
        head = f"{'milliseconds':<34}{'ours p50':>10}{'p95':>10}{'peer p50':>10}{'p95':>10}{'rounds':>8}"
        head += f"  {'ratio of p50 (quartiles)':<26}{'which is':<13}goal"
        return [*self.notes, "", head, *(row.line() for row in self.rows)]


class TakingTurns:
    """Measures two sides A B A B, so that whatever else the machine does falls on both.

    Parameters
    ----------
    ours, theirs
        Called with the number of the round; `theirs` None: only ours.
    """

    def __init__(self, ours: Callable[[int], object], theirs: Callable[[int], object] | None) -> None:
        self._ours, self._theirs = ours, theirs
        self._ours_ms: list[float] = []
        self._theirs_ms: list[float] = []

    def run(self, benchmark: Any, *, name: str, goal: Goal, rounds: int, warmup_rounds: int) -> Comparison:
        """Measure under pytest-benchmark, whose own table shows our side."""
        benchmark.group = "latency"
        # pytest-benchmark calls a set-up before every round, outside its clock: the peer's turn.
        benchmark.pedantic(self._our_turn, setup=self._their_turn, rounds=rounds, warmup_rounds=warmup_rounds)
        kept = rounds if benchmark.stats is not None else 1  # --benchmark-disable: one call
        compared = Comparison(name=name, ours=self._ours_ms[-kept:], theirs=self._theirs_ms[-kept:], goal=goal)
        benchmark.extra_info.update(compared.summary())
        return compared

    def _our_turn(self) -> None:
        self._ours_ms.append(_time_ms(self._ours, len(self._ours_ms)))

    def _their_turn(self) -> None:
        if self._theirs is not None:
            sleep(_PAUSE_S)
            self._theirs_ms.append(_time_ms(self._theirs, len(self._theirs_ms)))
        sleep(_PAUSE_S)


def _time_ms(call: Callable[[int], object], number: int) -> float:
    start = perf_counter()
    call(number)
    return (perf_counter() - start) * 1000


def _percentiles(times: Sequence[float]) -> dict[str, float]:
    middle, high = np.percentile(times, [50, 95])
    return {"p50": float(middle), "p95": float(high)}


def _columns(times: Sequence[float]) -> str:
    return "".join(f"{value:>10.2f}" for value in _percentiles(times).values())
