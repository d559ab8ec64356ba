"""Whether other processes load the cores: a time taken then is not one of this program."""

import os
import time
from pathlib import Path

from medreasoner.errors import MedReasonerError

__all__ = ["LIMIT", "CoreWatch", "busy_sentence", "check_quiet"]

LIMIT = 0.15
"""Share of the usable cores that others may take."""

_SAMPLE_S = 1.0
_IDLE, _IOWAIT = 3, 4  # columns of /proc/stat behind the name
_N_COLUMNS = 8  # the further ones, of guests, are in the first already


class CoreWatch:
    """Counts from its making on what others take of the cores that this process may use.

    Time that a hypervisor gave to other machines counts as theirs.

    Parameters
    ----------
    ours
        Ids of processes that are not others, besides this one.
    """

    def __init__(self, *ours: int) -> None:
        self._ours = ours
        self._ticks, self._own = _core_ticks(), self._own_ticks()

    def share_of_others(self) -> float | None:
        """0 to 1; None where no /proc/stat tells."""
        now, own = _core_ticks(), self._own_ticks()
        if self._ticks is None or now is None:
            return None
        total, busy = now[0] - self._ticks[0], now[1] - self._ticks[1]
        return min(1.0, max(0.0, busy - (own - self._own)) / total) if total > 0 else 0.0

    def _own_ticks(self) -> float:
        spent = os.times()
        this = (spent.user + spent.system) * float(os.sysconf("SC_CLK_TCK"))
        return this + sum(_process_ticks(process) for process in self._ours)


def busy_sentence(share: float) -> str:
    """How loaded the machine was.

    >>> busy_sentence(0.5)
    'other processes took 50 % of the usable cores'
    """
    return f"other processes took {100 * share:.0f} % of the usable cores"


def check_quiet(*, anyway: bool = False, seconds: float = _SAMPLE_S) -> str | None:
    """Look at the cores for a while; what to print if it goes on though others load them, or nothing is known of them.

    Raises
    ------
    MedReasonerError
        If others load the cores, unless `anyway`.
    """
    watch = CoreWatch()
    time.sleep(seconds)
    share = watch.share_of_others()
    if share is None:
        return "whether other processes load the cores cannot be told here"
    if share <= LIMIT:
        return None
    if not anyway:
        raise MedReasonerError(
            f"{busy_sentence(share)} just now, so that times would say little; "
            "wait until they are done, or measure all the same with --anyway"
        )
    return f"BUSY: {busy_sentence(share)} before the runs"


def _core_ticks() -> tuple[int, int] | None:
    """Of the usable cores, clock ticks since the start: all, and those that were not idle."""
    try:
        lines = Path("/proc/stat").read_text().splitlines()
        usable = {f"cpu{core}" for core in os.sched_getaffinity(0)}
    except (OSError, AttributeError):
        return None
    total = busy = 0
    for line in lines:
        name, *columns = line.split()
        if name in usable:
            ticks = [int(column) for column in columns[:_N_COLUMNS]]
            total += sum(ticks)
            busy += sum(ticks) - ticks[_IDLE] - ticks[_IOWAIT]
    return (total, busy) if total else None


def _process_ticks(process: int) -> int:
    """Clock ticks of a process in user mode and in the kernel; 0 once it has ended."""
    try:
        columns = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0
    return int(columns[11]) + int(columns[12])
