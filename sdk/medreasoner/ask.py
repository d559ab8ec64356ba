"""How a question is to be answered."""

import math
import time
from dataclasses import dataclass
from typing import Any

from medreasoner.errors import QueryError
from medreasoner.reasoner import Cancellation

__all__ = ["Ask"]

_MOST_SAMPLES = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """How a question is to be answered, and when to give up: `deadline` by `time.monotonic`, seconds.

    Raises
    ------
    QueryError
        If a number is out of range, or free text was asked for together with samples.
    """

    think: bool = False
    unconstrained: bool = False
    samples: int = 1
    temperature: float | None = None
    seed: int = 0
    deadline: float | None = None
    cancellation: Cancellation | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.samples <= _MOST_SAMPLES:
            raise QueryError(f"samples: expected 1 to {_MOST_SAMPLES}, got {self.samples!r:.40}")
        if self.temperature is not None and not 0 < self.temperature < math.inf:
            raise QueryError(f"temperature: expected a positive number, got {self.temperature!r:.40}")
        if self.seed < 0:
            raise QueryError(f"seed: expected at least 0, got {self.seed!r:.40}")
        if self.samples > 1 and self.unconstrained:
            raise QueryError("samples are drawn within the grammar of answers: leave out 'unconstrained'")

    @classmethod
    def within(cls, timeout_s: float | None, **options: Any) -> "Ask":
        """With a deadline so many seconds from now.

        Raises
        ------
        QueryError
            If it is no positive number.
        """
        if timeout_s is not None and not timeout_s > 0:
            raise QueryError(f"timeout_s: expected a positive number of seconds, got {timeout_s!r:.40}")
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        return cls(deadline=deadline, **options)
