"""What a run tells: metrics as JSON lines and for TensorBoard, lines for people, and how far it is."""

import json
import logging
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, Any

from medreasoner_train.loop_options import LoopOptions

__all__ = ["RunLog"]

logger = logging.getLogger(__name__)


class RunLog:
    """``out/metrics.jsonl`` and, if asked, TensorBoard's files beside it; a context manager.

    Parameters
    ----------
    options
        Length and folder of the run, and who is shown how far it is.
    start
        Steps that were done before: the pace is that of the others.
    tensorboard
        Whether to write for TensorBoard; the package must be installed.
    silent
        Write and show nothing: another process of the run does.
    """

    def __init__(self, options: LoopOptions, *, start: int, tensorboard: bool = False, silent: bool = False) -> None:
        self._options, self._start, self._silent = options, start, silent
        self._file: IO[str] | None = None
        self._board: Any = None
        if not silent:
            options.out.mkdir(parents=True, exist_ok=True)
            self._file = (options.out / "metrics.jsonl").open("a", encoding="utf-8")
            self._board = _board(options.out) if tensorboard else None
        self._began = time.monotonic()

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()
        if self._board is not None:
            self._board.close()

    def spent(self) -> float:
        """Seconds since the run began or was resumed."""
        return time.monotonic() - self._began

    def pace(self, done: int, spent: float) -> dict[str, float]:
        """Seconds a step, and minutes that are left, as two metrics."""
        pace = spent / max(1, done - self._start)
        left = min(pace * (self._options.steps - done) / 60, self._options.minutes - spent / 60)
        return {"s_per_step": pace, "eta_min": max(0.0, left)}

    def show(self, done: int, spent: float) -> None:
        """Show how far the run is, to whom the options name."""
        if self._options.show is not None and not self._silent:
            left = self.pace(done, spent)["eta_min"]
            text = f"{done}/{self._options.steps} steps, {left:.0f} min left"
            self._options.show(min(1.0, self._options.progress(done, spent)), text)

    def write(self, step: int, row: Mapping[str, float], *, names: Iterable[str] | None = None) -> None:
        """Write a row of metrics; `names`: those of which a line is logged, all if None."""
        if self._file is None:
            return
        self._file.write(json.dumps({"step": step, **row}) + "\n")
        self._file.flush()
        if self._board is not None:
            for name, value in row.items():
                self._board.add_scalar(name, value, step)
        told = row if names is None else {name: row[name] for name in names if name in row}
        if told:
            logger.info("step=%d %s", step, " ".join(f"{name}={value:.4g}" for name, value in told.items()))


def _board(out: Path) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(out / "tensorboard"))
