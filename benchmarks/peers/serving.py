"""How a side of a comparison answers the program that runs all of them in turn; needs nothing but Python.

A side prints one JSON line of facts when it is ready, and one for every line that it reads; it ends with its input.
"""

import json
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

__all__ = ["memory_mib", "run_number", "serve", "versions"]


def serve(start: Callable[[], tuple[Mapping[str, Any], Callable[[str], Mapping[str, Any]]]]) -> None:
    """Answer until the input ends.

    Parameters
    ----------
    start
        Loads, and returns the facts to print and what a line of the input calls.
    """
    # Libraries print what they like to the standard output: they get the error output instead.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def say(what: Mapping[str, Any]) -> None:
        answers.write(json.dumps(what) + "\n")
        answers.flush()

    try:
        facts, run = start()
        say({**facts, "memory_mib": memory_mib()})
        for line in sys.stdin:
            say({**run(line.strip()), "memory_mib": memory_mib()})
    except Exception as err:
        say({"error": f"{type(err).__name__}: {' '.join(str(err).split())}"})
        raise


def run_number(line: str) -> int:
    """Of a line of the input: the number of the run, and behind it what else is asked for."""
    return int(line.partition(" ")[0])


def memory_mib() -> Mapping[str, int]:
    """Peak of all memory of this process, mapped files included, and its own memory now, without them."""
    status = Path("/proc/self/status").read_text()
    found = {key: re.search(rf"{key}:\s*(\d+)", status) for key in ("VmHWM", "RssAnon")}
    return {key: int(value[1]) // 1024 for key, value in found.items() if value}


def versions(names: Sequence[str]) -> Mapping[str, str]:
    """Installed versions."""
    return {name: version(name) for name in names}
