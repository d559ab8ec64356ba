"""Length, pace and place of a training stage."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

__all__ = ["LoopOptions"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LoopOptions:
    """Length, pace and place of a stage.

    The rate warms up, stays, and falls linearly to zero over the last `cooldown` of the steps, so that a run can be
    prolonged from its last checkpoint before the cooldown. `minutes`: the time after which the run ends even if steps
    are left; the rate then falls over the last `cooldown` of that time. `device` is torch's name of one, such as
    ``cuda``; `workers` the processes that prepare batches (0: a thread, which is enough beside a CPU's steps).
    `show` is called after each step with how much of the run is over, in [0, 1], and words about it.
    """

    steps: int
    out: Path
    minutes: float = float("inf")
    device: str = "cpu"
    workers: int = 0
    lr: float = 1e-3
    matrix_lr: float = 2e-3
    weight_decay: float = 0.05
    warmup: int = 100
    cooldown: float = 0.35
    clip: float = 1.0
    save_every: int = 200
    log_every: int = 20
    seed: int = 0
    show: Callable[[float, str], None] | None = None

    def progress(self, step: int, seconds: float = 0.0) -> float:
        """How much of the run is over at `step`, that many seconds after it began or was resumed; 1 at its end."""
        return max(step / self.steps, seconds / 60 / self.minutes)

    def rate(self, step: int, seconds: float = 0.0) -> float:
        """Share of the full learning rate at `step`, in [0, 1]."""
        left = max(0.0, 1 - self.progress(step, seconds))
        return min(1.0, (step + 1) / max(1, self.warmup), left / max(self.cooldown, 1 / self.steps))
